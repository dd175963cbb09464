"""What a decoder consists of: frozen dataclasses that check themselves."""

import dataclasses
import functools
import math
from typing import Any, get_args

from sparsek_jax.ops.attention import Implementation
from sparsek_jax.ops.gating import GATINGS

KINDS = (
    *("sparsek", "dense", "window", "sinks", "random", "key_norm", "strided"),
    *("bigbird", "moba", "nsa", "lsh", "gated_linear", "sparsek_linear"),
)
# With parameters that other kinds lack, and that are no scorers.
KINDS_WITH_PARAMETERS = ("nsa", "gated_linear", "sparsek_linear")
# Of "lsh". A bucket holds its share of k, on average, in texts of 16 k tokens.
LSH_ROUNDS = 4
LSH_BUCKETS = 64
ROPE_SCALINGS = ("none", "linear", "llama3")


def has_scorer(kind: str) -> bool:
    """Whether layers of this kind of attention learn what to select, with a scoring network."""
    return kind in ("sparsek", "sparsek_linear")


@dataclasses.dataclass(frozen=True, kw_only=True)
class AttentionConfig:
    """One attention layer.

    Attributes:
      kind: One of `KINDS` (`nn/alternatives` says what they are), in every layer unless
        `pattern` is given.
      pattern: Kinds that repeat over the layers, such as ("window", "sparsek").
      num_heads: Query heads N.
      num_kv_heads: Key and value heads K; N is a multiple.
      head_dim: Size H of a head.
      num_selected: k, keys that a query selects (all kinds but dense, window and
        gated_linear); of "lsh", a multiple of its `LSH_ROUNDS` rounds.
      sliding_window: w, newest keys that a query always sees (all kinds but dense; "moba" selects
        so many more instead).
      block_size: Keys that "bigbird", "moba" and "nsa" select together; divides what they select.
      gating: Of SparseK, as in `sparsek_attention`; what no scorer selects has no gates.
      implementation: Of the SparseK operator, with which kinds attend that select keys and not
        blocks, one that it has; None for the best one.
      qk_norm: RMSNorm over every query and key head (Qwen3).
      qkv_bias: Biases in the query, key and value projections.
      out_bias: Bias in the output projection.
      rope_theta: Base of the rotary frequencies.
      rope_scaling: "none"; "linear": all frequencies divided by `rope_factor`; "llama3": the low
        ones only, and those between the low and the high ones in part.
      rope_factor: What scaled frequencies are divided by.
      rope_low_freq_factor: A frequency of fewer turns in `rope_original_length` tokens is low.
      rope_high_freq_factor: A frequency of more turns is high.
      rope_original_length: Context before the model was extended.
      rotary_fraction: Leading fraction of a head that is rotated (GPT-NeoX).
      shared_scores: SparseK's scorer gives one score for all KV heads instead of one for each.
      timestep_norm: It normalises scores causally.
      score_scale: Standard deviation of its first scores, about.
      slope: What its scores gain per position.
      learned_slope: Each score learns such a gain in addition: how fast its head forgets.
      num_sinks: First tokens of a document that are always selected, among the k (all kinds but
        dense and window).
    """

    kind: str = "sparsek"
    pattern: tuple[str, ...] = ()
    num_heads: int
    num_kv_heads: int
    head_dim: int
    num_selected: int = 512
    sliding_window: int = 512
    block_size: int = 64
    gating: str = "soft"
    implementation: str | None = None
    qk_norm: bool = False
    qkv_bias: bool = False
    out_bias: bool = False
    rope_theta: float = 1e4
    rope_scaling: str = "none"
    rope_factor: float = 1.0
    rope_low_freq_factor: float = 1.0
    rope_high_freq_factor: float = 4.0
    rope_original_length: int = 8192
    rotary_fraction: float = 1.0
    shared_scores: bool = False
    timestep_norm: bool = True
    score_scale: float = 1.0
    slope: float = 1e-6
    learned_slope: bool = False
    num_sinks: int = 0

    def __post_init__(self):
        expect = functools.partial(_expect, self, "attention")
        for field in ("num_heads", "num_kv_heads", "head_dim", "num_selected", "block_size"):
            expect(field, _is_int(getattr(self, field), 1), "an int of at least 1")
        expect(
            "num_heads",
            self.num_heads % self.num_kv_heads == 0,
            f"a multiple of attention.num_kv_heads={self.num_kv_heads}",
        )
        expect("kind", self.kind in KINDS, f"one of {KINDS}")
        expect(
            "pattern",
            isinstance(self.pattern, tuple) and all(kind in KINDS for kind in self.pattern),
            f"a tuple, each one of {KINDS}",
        )
        kinds = set(self.pattern or (self.kind,))
        least = 1 if kinds & {"window", "bigbird", "nsa", "lsh", "gated_linear"} else 0
        expect("sliding_window", _is_int(self.sliding_window, least), f"an int of at least {least}")
        expect(
            "num_selected",
            not kinds & {"bigbird", "nsa"} or self.num_selected % self.block_size == 0,
            f"a multiple of attention.block_size={self.block_size}",
        )
        expect(
            "num_selected",
            "lsh" not in kinds or self.num_selected % LSH_ROUNDS == 0,
            f"a multiple of the {LSH_ROUNDS} rounds of hashing",
        )
        expect(
            "sliding_window",
            "moba" not in kinds or (self.num_selected + self.sliding_window) % self.block_size == 0,
            f"a sum with attention.num_selected={self.num_selected} that is a multiple of "
            f"attention.block_size={self.block_size}",
        )
        expect("gating", self.gating in GATINGS, f"one of {GATINGS}")
        implementations = (None, *get_args(Implementation))
        expect(
            "implementation", self.implementation in implementations, f"one of {implementations}"
        )
        flags = ("qk_norm", "qkv_bias", "out_bias", "shared_scores", "timestep_norm")
        for field in (*flags, "learned_slope"):
            expect(field, isinstance(getattr(self, field), bool), "True or False")
        positive = ("rope_theta", "rope_factor", "rope_low_freq_factor", "rope_high_freq_factor")
        positive += ("score_scale",)
        for field in (*positive, "rotary_fraction", "slope"):
            expect(field, _is_number(getattr(self, field)), "a finite number")
        for field in positive:
            expect(field, getattr(self, field) > 0, "a number above 0")
        expect("rope_scaling", self.rope_scaling in ROPE_SCALINGS, f"one of {ROPE_SCALINGS}")
        expect(
            "rope_high_freq_factor",
            self.rope_high_freq_factor > self.rope_low_freq_factor,
            f"more than attention.rope_low_freq_factor={self.rope_low_freq_factor}",
        )
        expect(
            "rope_original_length", _is_int(self.rope_original_length, 1), "an int of at least 1"
        )
        expect(
            "rotary_fraction",
            0 <= self.rotary_fraction <= 1 and self.rotary_dim % 2 == 0,
            f"a part of attention.head_dim={self.head_dim} that is an even number of channels",
        )
        expect("slope", self.slope >= 0, "at least 0")
        expect(
            "num_sinks",
            _is_int(self.num_sinks, 0) and self.num_sinks <= self.num_selected,
            f"an int from 0 to attention.num_selected={self.num_selected}",
        )

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
        expect = functools.partial(_expect, self, "model")
        for field in ("vocab_size", "num_layers", "d_model", "mlp_dim"):
            expect(field, _is_int(getattr(self, field), 1), "an int of at least 1")
        expect("attention", isinstance(self.attention, AttentionConfig), "an AttentionConfig")
        choices = {
            "norm": ("rmsnorm", "layernorm"),
            "activation": ("swiglu", "gelu"),
            "remat": ("none", "full", "dots"),
            "dtype": ("float32", "bfloat16"),
        }
        for field, allowed in choices.items():
            expect(field, getattr(self, field) in allowed, f"one of {allowed}")
        for field in ("mlp_bias", "parallel_residual", "tie_embeddings", "scan_layers"):
            expect(field, isinstance(getattr(self, field), bool), "True or False")
        expect("norm_eps", _is_number(self.norm_eps) and self.norm_eps > 0, "a number above 0")
        expect(
            "num_layers",
            not self.scan_layers or self.num_layers % self.period == 0,
            f"a multiple of the {self.period} kinds of attention.pattern when model.scan_layers "
            "is set",
        )

    @property
    def period(self) -> int:
        """Layers after which the kinds of attention repeat."""
        return len(self.attention.pattern) or 1


def _expect(config: Any, section: str, field: str, condition: bool, expectation: str) -> None:
    if not condition:
        value = getattr(config, field)
        raise ValueError(f"{section}.{field}={value!r}; expected {expectation}")


def _is_int(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
