"""Configurations of the layers, checked when they are made."""

import dataclasses
import math
from typing import Any, Literal, get_args

from sparsek_jax.ops.attention import Gating, Implementation

AttentionKind = Literal["sparsek", "dense", "window"]
NormKind = Literal["rmsnorm", "layernorm"]
Activation = Literal["swiglu", "gelu"]
Remat = Literal["none", "full", "dots"]
Dtype = Literal["float32", "bfloat16"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class AttentionConfig:
    """Self-attention of every layer of a decoder.

    Attributes:
      num_heads: N, query heads.
      num_kv_heads: K, key and value heads; divides N.
      head_dim: H, size of one head.
      kind: "sparsek"; "dense", over all earlier tokens; "window", over the newest `sliding_window`.
      pattern: Kinds repeated over the layers, e.g. ("window", "sparsek"); (): `kind` in every one.
      num_selected: k of the sparsek kind, at least 1.
      sliding_window: w, the newest w tokens, the query's own included, at least 0 (window kind:
        at least 1).
      gating: "soft" or "straight_through", see `sparsek_jax.sparsek_attention`.
      implementation: Of `sparsek_jax.sparsek_attention`; None for the best.
      qk_norm: RMSNorm with a learnable gain on each query and key head, before the rotation
        (Qwen3).
      qkv_bias: Biases of the query, key and value projections.
      out_bias: Bias of the output projection.
      rope_theta: Base of the wavelengths of the rotary embedding.
      rotary_fraction: Part of each head that is rotated, 0 to 1 (GPT-NeoX: 0.25).
      shared_scores: One score per token for all KV heads, instead of one per KV head.
      timestep_norm: Normalise scores by their mean and variance so far.
      slope: Added to the score per position, so that newer tokens win ties; at least 0.

    Raises:
      ValueError: A field has an impossible value; the message names it.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    kind: AttentionKind = "sparsek"
    pattern: tuple[AttentionKind, ...] = ()
    num_selected: int = 512
    sliding_window: int = 512
    gating: Gating = "soft"
    implementation: Implementation | None = None
    qk_norm: bool = False
    qkv_bias: bool = False
    out_bias: bool = False
    rope_theta: float = 1e4
    rotary_fraction: float = 1.0
    shared_scores: bool = False
    timestep_norm: bool = True
    slope: float = 1e-6

    def __post_init__(self):
        for field in ("num_heads", "num_kv_heads", "head_dim", "num_selected"):
            _check_int(self, field, 1)
        _check_int(self, "sliding_window", 0)
        _require(
            self.num_heads % self.num_kv_heads == 0,
            self,
            "num_kv_heads",
            f"a divisor of num_heads={self.num_heads}",
        )
        kinds = get_args(AttentionKind)
        _check_choice(self, "kind", kinds)
        _require(
            isinstance(self.pattern, tuple) and all(kind in kinds for kind in self.pattern),
            self,
            "pattern",
            f"a tuple of {list(kinds)}",
        )
        if "window" in (self.pattern or (self.kind,)):
            _require(
                self.sliding_window >= 1, self, "sliding_window", "at least 1 for the window kind"
            )
        _check_choice(self, "gating", get_args(Gating))
        _check_choice(self, "implementation", (None, *get_args(Implementation)))
        for field in ("qk_norm", "qkv_bias", "out_bias", "shared_scores", "timestep_norm"):
            _check_bool(self, field)
        for field in ("rope_theta", "rotary_fraction", "slope"):
            _check_number(self, field)
        _require(self.rope_theta > 0, self, "rope_theta", "a number above 0")
        _require(0 <= self.rotary_fraction <= 1, self, "rotary_fraction", "a number from 0 to 1")
        _require(
            self.rotary_dim % 2 == 0,
            self,
            "rotary_fraction",
            f"an even number of rotated dimensions, not {self.rotary_dim} of "
            f"head_dim={self.head_dim}",
        )
        _require(self.slope >= 0, self, "slope", "at least 0")

    @property
    def rotary_dim(self) -> int:
        """Dimensions of each head that the rotary embedding turns."""
        return int(self.head_dim * self.rotary_fraction)

    @property
    def num_scores(self) -> int:
        """Scores per token."""
        return 1 if self.shared_scores else self.num_kv_heads

    def kind_of(self, layer: int) -> AttentionKind:
        """Returns the kind of attention of a layer, counted from 0."""
        return self.pattern[layer % len(self.pattern)] if self.pattern else self.kind


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """A decoder-only language model.

    The defaults give Llama's block. Qwen3: `attention.qk_norm`. GPT-NeoX: norm="layernorm",
    activation="gelu", mlp_bias, parallel_residual, no tie_embeddings, and in `attention` both
    biases and a rotary_fraction.

    Attributes:
      vocab_size: Number of tokens.
      num_layers: Number of blocks.
      d_model: Width of the residual stream.
      mlp_dim: Hidden width of the MLP.
      attention: The attention of the layers.
      norm: "rmsnorm", or "layernorm" (with a bias).
      norm_eps: Added to the variance in every norm but the scorer's.
      activation: "swiglu" (three matrices), or "gelu" (two matrices, the exact GELU).
      mlp_bias: Biases in the MLP.
      parallel_residual: Attention and MLP both read the block's input, through their own norms.
      tie_embeddings: The output projection is the embedding table.
      remat: What the backward pass recomputes in each block: "none"; "full", everything; "dots",
        everything but the products with weights.
      scan_layers: Compile one period of the pattern and scan over it. Then `layers` holds one
        period, whose parameters have a leading axis of size num_layers / period.
      dtype: Of the computation. Parameters, scores and logits are always float32.

    Raises:
      ValueError: A field has an impossible value; the message names it.
    """

    vocab_size: int
    num_layers: int
    d_model: int
    mlp_dim: int
    attention: AttentionConfig
    norm: NormKind = "rmsnorm"
    norm_eps: float = 1e-6
    activation: Activation = "swiglu"
    mlp_bias: bool = False
    parallel_residual: bool = False
    tie_embeddings: bool = True
    remat: Remat = "none"
    scan_layers: bool = False
    dtype: Dtype = "float32"

    def __post_init__(self):
        for field in ("vocab_size", "num_layers", "d_model", "mlp_dim"):
            _check_int(self, field, 1)
        _require(
            isinstance(self.attention, AttentionConfig), self, "attention", "an AttentionConfig"
        )
        _check_choice(self, "norm", get_args(NormKind))
        _check_number(self, "norm_eps")
        _require(self.norm_eps > 0, self, "norm_eps", "a number above 0")
        _check_choice(self, "activation", get_args(Activation))
        for field in ("mlp_bias", "parallel_residual", "tie_embeddings", "scan_layers"):
            _check_bool(self, field)
        _check_choice(self, "remat", get_args(Remat))
        _check_choice(self, "dtype", get_args(Dtype))
        if self.scan_layers:
            _require(
                self.num_layers % self.period == 0,
                self,
                "num_layers",
                f"a multiple of the {self.period} kinds of attention.pattern, which "
                "scan_layers=True scans over",
            )

    @property
    def period(self) -> int:
        """Layers after which the kinds of attention repeat."""
        return max(len(self.attention.pattern), 1)


def _require(condition: bool, config: Any, field: str, expected: str) -> None:
    if not condition:
        raise ValueError(f"{field}={getattr(config, field)!r}; expected {expected}")


def _check_int(config: Any, field: str, least: int) -> None:
    value = getattr(config, field)
    is_int = isinstance(value, int) and not isinstance(value, bool)
    _require(is_int and value >= least, config, field, f"an int of at least {least}")


def _check_number(config: Any, field: str) -> None:
    value = getattr(config, field)
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    _require(is_number and math.isfinite(value), config, field, "a finite number")


def _check_bool(config: Any, field: str) -> None:
    _require(isinstance(getattr(config, field), bool), config, field, "True or False")


def _check_choice(config: Any, field: str, choices: tuple) -> None:
    _require(getattr(config, field) in choices, config, field, f"one of {list(choices)}")
