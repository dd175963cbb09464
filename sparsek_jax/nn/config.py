"""What a decoder consists of: frozen dataclasses that check themselves."""

import dataclasses
from typing import Any

KINDS = ("sparsek", "dense", "window")


def _expect(condition: bool, field: str, value: Any, expectation: str) -> None:
    if not condition:
        raise ValueError(f"{field}={value!r}; expected {expectation}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class AttentionConfig:
    """One attention layer.

    Attributes:
      kind: "sparsek", "dense" or "window", in every layer unless `pattern` is given.
      pattern: Kinds that repeat over the layers, such as ("window", "sparsek").
      num_heads: Query heads N.
      num_kv_heads: Key and value heads K; N is a multiple.
      head_dim: Size H of a head.
      num_selected: k, keys that a query selects.
      sliding_window: w, newest keys that a query always sees (SparseK and window).
      gating: "soft" or "straight_through".
      implementation: Of the SparseK operator; None for the best one.
      qk_norm: RMSNorm over every query and key head (Qwen3).
      qkv_bias: Biases in the query, key and value projections.
      out_bias: Bias in the output projection.
      rope_theta: Base of the rotary frequencies.
      rotary_fraction: Leading fraction of a head that is rotated (GPT-NeoX).
      shared_scores: One score for all KV heads instead of one for each.
      timestep_norm: Causal normalisation of the scores.
      slope: What a score gains per position.
    """

    kind: str = "sparsek"
    pattern: tuple[str, ...] = ()
    num_heads: int
    num_kv_heads: int
    head_dim: int
    num_selected: int = 512
    sliding_window: int = 512
    gating: str = "soft"
    implementation: str | None = None
    qk_norm: bool = False
    qkv_bias: bool = False
    out_bias: bool = False
    rope_theta: float = 1e4
    rotary_fraction: float = 1.0
    shared_scores: bool = False
    timestep_norm: bool = True
    slope: float = 1e-6

    def __post_init__(self):
        one_of = f"one of {KINDS}"
        _expect(self.kind in KINDS, "attention.kind", self.kind, one_of)
        for kind in self.pattern:
            _expect(kind in KINDS, "attention.pattern", self.pattern, f"each {one_of}")
        for field in ("num_heads", "num_kv_heads", "head_dim", "num_selected"):
            value = getattr(self, field)
            _expect(value >= 1, f"attention.{field}", value, "at least 1")
        _expect(
            self.num_heads % self.num_kv_heads == 0,
            "attention.num_heads",
            self.num_heads,
            f"a multiple of attention.num_kv_heads={self.num_kv_heads}",
        )
        least = 1 if "window" in (self.kind, *self.pattern) else 0
        _expect(
            self.sliding_window >= least,
            "attention.sliding_window",
            self.sliding_window,
            f"at least {least}",
        )
        gatings = ("soft", "straight_through")
        _expect(self.gating in gatings, "attention.gating", self.gating, f"one of {gatings}")
        implementations = (None, "reference", "xla")
        _expect(
            self.implementation in implementations,
            "attention.implementation",
            self.implementation,
            f"one of {implementations}",
        )
        _expect(self.rope_theta > 0, "attention.rope_theta", self.rope_theta, "above 0")
        _expect(
            0 <= self.rotary_fraction <= 1 and self.rotary_dim % 2 == 0,
            "attention.rotary_fraction",
            self.rotary_fraction,
            f"a part of attention.head_dim={self.head_dim} that is an even number of channels",
        )
        _expect(self.slope >= 0, "attention.slope", self.slope, "at least 0")

    @property
    def rotary_dim(self) -> int:
        """Channels of a head that are rotated."""
        return round(self.rotary_fraction * self.head_dim)

    def layer_kind(self, layer: int) -> str:
        """Attention kind of a layer."""
        return self.pattern[layer % len(self.pattern)] if self.pattern else self.kind


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """A decoder-only language model.

    The defaults make a Llama block. Qwen3 adds `attention.qk_norm`; GPT-NeoX is `norm="layernorm"`,
    `activation="gelu"`, the biases, `parallel_residual`, a partial rotary and untied embeddings.

    Attributes:
      vocab_size: Rows of the embedding.
      num_layers: Blocks.
      d_model: Width of the residual stream.
      mlp_dim: Width of the MLP.
      attention: The attention layers.
      norm: "rmsnorm" or "layernorm" (with bias).
      norm_eps: Added to the variance.
      activation: "swiglu" (gated) or "gelu".
      mlp_bias: Biases in the MLP.
      parallel_residual: Attention and MLP read the same residual instead of one after the other.
      tie_embeddings: The output projection is the embedding's transpose.
      remat: "none"; "full": recompute every block in the backward pass; "dots": keep its
        products with weights, recompute the rest.
      scan_layers: Stack the layers' parameters and scan over them, which compiles one block (one
        repetition of `attention.pattern`) instead of all.
      dtype: "float32" or "bfloat16", of activations. Parameters and scores are always float32.
    """

    vocab_size: int
    num_layers: int
    d_model: int
    mlp_dim: int
    attention: AttentionConfig
    norm: str = "rmsnorm"
    norm_eps: float = 1e-6
    activation: str = "swiglu"
    mlp_bias: bool = False
    parallel_residual: bool = False
    tie_embeddings: bool = True
    remat: str = "none"
    scan_layers: bool = False
    dtype: str = "float32"

    def __post_init__(self):
        for field in ("vocab_size", "num_layers", "d_model", "mlp_dim"):
            value = getattr(self, field)
            _expect(value >= 1, f"model.{field}", value, "at least 1")
        choices = {
            "norm": ("rmsnorm", "layernorm"),
            "activation": ("swiglu", "gelu"),
            "remat": ("none", "full", "dots"),
            "dtype": ("float32", "bfloat16"),
        }
        for field, allowed in choices.items():
            value = getattr(self, field)
            _expect(value in allowed, f"model.{field}", value, f"one of {allowed}")
        _expect(self.norm_eps > 0, "model.norm_eps", self.norm_eps, "above 0")
        period = len(self.attention.pattern)
        _expect(
            not (self.scan_layers and period and self.num_layers % period),
            "model.num_layers",
            self.num_layers,
            f"a multiple of the {period} kinds of attention.pattern when model.scan_layers is set",
        )
