"""Floating-point operations that training takes, counting only what sparse attention computes."""

import numpy as np
from jaxtyping import Int

from sparsek_jax.nn import DecoderConfig
from sparsek_jax.nn.config import LSH_BUCKETS, LSH_ROUNDS, has_scorer

# Dense bfloat16 peak in FLOP/s by a part of `jax.Device.device_kind`; vendors' data sheets.
_PEAK = {
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "A100": 312e12,
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5p": 459e12,
    "TPU v6 lite": 918e12,
    "TPU v6e": 918e12,
    "TPU v5": 459e12,  # as JAX names the v5p
}


def peak_flops(device_kind: str) -> float | None:
    """Peak bfloat16 FLOP/s of a device, or None if it is not known."""
    return next((peak for name, peak in _PEAK.items() if name in device_kind), None)


def attended_keys(
    kind: str,
    positions: Int[np.ndarray, "..."],
    *,
    num_selected: int,
    sliding_window: int,
    block_size: int = 1,
) -> int:
    """Query-key pairs of one head, for queries at these positions of their documents.

    Of "bigbird", the most there can be: its blocks may lie partly in the window, or in the future.
    Also of "lsh": buckets may hold less than their share, and the same keys in several rounds.
    Of "nsa", those of all three branches; of "gated_linear", those of the window; of
    "sparsek_linear", those of SparseK.
    """
    positions = positions.astype(np.int64)
    visible = positions + 1
    if kind == "dense":
        return int(np.sum(visible))

    def in_blocks(num_keys):
        past = positions // block_size
        chosen = np.minimum(past, num_keys // block_size - 1)
        return visible + (chosen - past) * block_size

    if kind == "moba":
        return int(np.sum(in_blocks(num_selected + sliding_window)))
    window = np.minimum(visible, sliding_window)
    if kind == "nsa":
        return int(np.sum(window + in_blocks(num_selected) + visible // block_size))
    if kind in ("window", "gated_linear"):
        return int(np.sum(window))
    return int(np.sum(window + np.minimum(visible - window, num_selected)))


def train_flops(config: DecoderConfig, positions: Int[np.ndarray, "..."]) -> float:
    """FLOPs of forward and backward for a batch, without recomputation.

    A multiply-add counts as two; the backward pass costs twice the forward pass.

    Args:
      config: Of the model.
      positions: Of the batch's tokens in their documents.

    Returns:
      The floating-point operations.
    """
    attention = config.attention
    query_dim = attention.num_heads * attention.head_dim
    kv_dim = attention.num_kv_heads * attention.head_dim
    num_scores = 1 if attention.shared_scores else attention.num_kv_heads
    mlp = (3 if config.activation == "swiglu" else 2) * config.d_model * config.mlp_dim
    num_tokens = positions.size
    multiply_adds = num_tokens * config.d_model * config.vocab_size
    for layer in range(config.num_layers):
        kind = attention.layer_kind(layer)
        projections = config.d_model * 2 * (query_dim + kv_dim)
        if has_scorer(kind):
            projections += config.d_model * num_scores
        pairs = attended_keys(
            kind,
            positions,
            num_selected=attention.num_selected,
            sliding_window=attention.sliding_window,
            block_size=attention.block_size,
        )
        if kind == "moba":
            # Products of queries with the mean keys of past blocks; there are no values.
            pairs += int(np.sum(positions.astype(np.int64) // attention.block_size)) / 2
        if kind == "lsh":
            # Products of queries and of keys with the random directions.
            projections += (query_dim + kv_dim) * LSH_ROUNDS * LSH_BUCKETS // 2
        if kind in ("gated_linear", "sparsek_linear"):
            # Output gates; each token changes the states, and its queries read them.
            projections += config.d_model * attention.num_heads
            projections += (kv_dim + query_dim) * attention.head_dim
        if kind == "gated_linear":
            # Forget gates.
            rank = max(config.d_model // 64, 1)
            projections += config.d_model * rank + rank * kv_dim
        if kind == "nsa":
            # Its gates, and its MLP on keys and on values.
            width = max(attention.head_dim // 8, 1)
            projections += 3 * config.d_model * attention.num_heads + 4 * kv_dim * width
        multiply_adds += num_tokens * (projections + mlp) + 2 * query_dim * pairs
    return 6.0 * multiply_adds
