"""Floating-point operations that training takes, counting only what sparse attention computes."""

import numpy as np

from sparsek_jax.nn import DecoderConfig

# Dense bfloat16 peak in FLOP/s by a part of `jax.Device.device_kind`; vendors' data sheets.
_PEAK = {
    "H200": 989e12,
    "H100": 989e12,
    "A100": 312e12,
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5p": 459e12,
    "TPU v6 lite": 918e12,
    "TPU v6e": 918e12,
}


def peak_flops(device_kind: str) -> float | None:
    """Peak bfloat16 FLOP/s of a device, or None if it is not known."""
    return next((peak for name, peak in _PEAK.items() if name in device_kind), None)


def attended_keys(kind: str, seq_len: int, *, num_selected: int, sliding_window: int) -> int:
    """Query-key pairs of one head over a row of one document."""
    position = np.arange(seq_len, dtype=np.int64)
    if kind == "dense":
        return int(np.sum(position + 1))
    window = np.minimum(position + 1, sliding_window)
    if kind == "window":
        return int(np.sum(window))
    pool = position + 1 - window
    return int(np.sum(window + np.minimum(pool, num_selected)))


def train_flops_per_row(config: DecoderConfig, seq_len: int) -> float:
    """FLOPs of forward and backward for one row of `seq_len` tokens, without recomputation.

    A multiply-add counts as two; the backward pass costs twice the forward pass. Packed documents
    attend to fewer keys than counted here.
    """
    attention = config.attention
    query_dim = attention.num_heads * attention.head_dim
    kv_dim = attention.num_kv_heads * attention.head_dim
    num_scores = 1 if attention.shared_scores else attention.num_kv_heads
    mlp = (3 if config.activation == "swiglu" else 2) * config.d_model * config.mlp_dim
    multiply_adds = seq_len * config.d_model * config.vocab_size
    for layer in range(config.num_layers):
        kind = attention.layer_kind(layer)
        projections = config.d_model * 2 * (query_dim + kv_dim)
        if kind == "sparsek":
            projections += config.d_model * num_scores
        pairs = attended_keys(
            kind,
            seq_len,
            num_selected=attention.num_selected,
            sliding_window=attention.sliding_window,
        )
        multiply_adds += seq_len * (projections + mlp) + 2 * query_dim * pairs
    return 6.0 * multiply_adds
