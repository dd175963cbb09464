"""Scorers that start from what a model attends to, instead of at random.

A scorer is linear in the normalised hidden state, so whatever is wanted of the keys becomes a
kernel: exactly, where it is linear itself, else by ridge regression over a calibration text, which
the model reads once with dense attention, one layer after the other.

- "attention_mass": the logarithm of the attention that a key gets from queries that it has left the
  window of. What heavy-hitter caches (H2O, arXiv 2306.14048) observe, predicted from the key alone.
- "mean_query": the logit of the mean query, turned by the mean of the rotations from the window's
  end to the row's. Exactly linear, but for a norm of keys, whose division by their length is left
  out.
- "key_norm": minus the key's length, as keys of small norm are attended more (Devoto et al. 2024,
  arXiv 2406.11430).

SparseK ignores a shift of all scores, and a start fixes their scale, so only the direction of a
kernel matters: scores get the standard deviation asked for.
"""

from __future__ import annotations

import dataclasses
import functools
import operator
from collections.abc import Iterator, Sequence
from typing import Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Float32, Float64, Int

from sparsek_jax import nn
from sparsek_jax.nn.attention import Attention
from sparsek_jax.nn.decoder import Block
from sparsek_jax.nn.rotary import apply_rotary, rotary_frequencies
from sparsek_jax.training.parameters import Params, define

Method = Literal["attention_mass", "mean_query", "key_norm"]
METHODS: tuple[str, ...] = get_args(Method)

# With which soft gates start almost as close to dense attention as hard ones (docs/pretrained.md).
DEFAULT_SCALE = 4.0

# Of the mean variance of a channel: what is added to the covariance's diagonal.
_RIDGE = 0.01
# Keys that fewer queries than this share of a row have seen from afar count less, as their mean is
# over few.
_TRUSTED = 0.25
_CHUNK = 128
# The logarithm's floor: attention that is nothing to a row of a thousand tokens.
_LEAST_MASS = 1e-7


@dataclasses.dataclass
class Moments:
    """Weighted sums over tokens, for regressions of targets y on x; float64.

    Attributes:
      weight: Sum of the weights.
      x: Of the inputs, `[D]`.
      y: Of the targets, `[K]`.
      xx: Of the inputs' products, `[D, D]`.
      xy: Of inputs times targets, `[D, K]`.
    """

    weight: Float64[np.ndarray, ""]
    x: Float64[np.ndarray, " D"]
    y: Float64[np.ndarray, " K"]
    xx: Float64[np.ndarray, "D D"]
    xy: Float64[np.ndarray, "D K"]

    @classmethod
    def of(cls, weight: Array, x: Array, y: Array | None) -> Moments:
        """The sums over one row: `weight` `[T]`, `x` `[T, D]` and `y` `[T, K]`, or no targets."""
        y = np.zeros((len(x), 0)) if y is None else y
        weight, x, y = (np.asarray(array, np.float64) for array in (weight, x, y))
        weighted = weight[:, None] * x
        return cls(weight.sum(), weighted.sum(0), weight @ y, weighted.T @ x, weighted.T @ y)

    def __add__(self, other: Moments) -> Moments:
        pairs = ((getattr(self, f.name), getattr(other, f.name)) for f in dataclasses.fields(self))
        return Moments(*(one + two for one, two in pairs))

    @property
    def covariance(self) -> Float64[np.ndarray, "D D"]:
        """Of the inputs."""
        mean = self.x / self.weight
        return self.xx / self.weight - np.outer(mean, mean)


def ridge(moments: Moments, *, strength: float = _RIDGE) -> Float64[np.ndarray, "D K"]:
    """Weights of the regression of y on x with an intercept, which is left out.

    Args:
      moments: Of x and y.
      strength: What is added to the diagonal of x's covariance, over the diagonal's mean.
    """
    covariance = moments.covariance
    mean_x, mean_y = moments.x / moments.weight, moments.y / moments.weight
    products = moments.xy / moments.weight - np.outer(mean_x, mean_y)
    size = len(covariance)
    penalty = strength * max(np.trace(covariance) / size, np.finfo(np.float64).tiny)
    return np.linalg.solve(covariance + penalty * np.eye(size), products)


def mean_query_kernel(
    attention: Attention, query: Float[Array, "N H"], distances: Int[Array, " n"]
) -> Float32[Array, "D K"]:
    """The kernel whose scores are the logits of one query, before scaling, for the mean distance.

    Args:
      attention: A layer.
      query: Not rotated, one for each query head, `[N, H]`; averaged over each KV head.
      distances: From the key to the query, over which its rotation is averaged.

    Returns:
      `[d_model, K]`.
    """
    config = attention.config
    frequencies = rotary_frequencies(config)
    angle = distances[:, None].astype(jnp.float32) * frequencies
    cos, sin = jnp.cos(angle).mean(0), jnp.sin(angle).mean(0)
    query = query.reshape(config.num_kv_heads, -1, config.head_dim).mean(1)
    half = len(frequencies)
    first, second = query[:, :half], query[:, half : 2 * half]
    # The logit of a key at j and a query at t is that of the query turned by t - j.
    query = jnp.concatenate(
        [first * cos - second * sin, second * cos + first * sin, query[:, 2 * half :]], axis=-1
    )
    if attention.key_norm is not None:
        query = query * attention.key_norm.scale[...]
    kernel = attention.key.kernel[...].reshape(-1, config.num_kv_heads, config.head_dim)
    return jnp.einsum("dkh,kh->dk", kernel, query, precision="highest")


def scorer_kernels(
    params: Params,
    config: nn.DecoderConfig,
    tokens: Int[np.ndarray, "R T"],
    *,
    methods: Sequence[Method] = ("attention_mass",),
    scale: float = DEFAULT_SCALE,
) -> Iterator[tuple[int, dict[Method, Float32[np.ndarray, "D K"]]]]:
    """Kernels of the scorers of a decoder, layer by layer, from one pass over a text.

    Memory: the hidden states of all tokens, and for one row at a time the attention of 128 queries.

    Args:
      params: Of the decoder with every layer by itself (`unstack_layers`); scorers are not used.
      config: Of the decoder. SparseK layers attend densely here, other ones as they are.
      tokens: Rows of text, each a document, longer than the window.
      methods: Some of METHODS; the module says what they are.
      scale: Standard deviation of the scores over the text.

    Yields:
      For every SparseK layer its index and every method's kernel, `[d_model, K]`, or `[d_model, 1]`
      where scores are shared.
    """
    config = dataclasses.replace(config, remat="none", scan_layers=False, dtype="float32")
    programs: dict[str, _Programs] = {}
    with jax.default_matmul_precision("highest"):
        table = jnp.asarray(params["embedding"])
        hidden = [jnp.take(table, row[None], axis=0) for row in jnp.asarray(tokens)]
        for layer in range(config.num_layers):
            kind = config.attention.layer_kind(layer)
            used = "dense" if kind == "sparsek" else kind
            if used not in programs:
                programs[used] = _Programs(config, used, methods)
            program = programs[used]
            weights = program.weights(params, layer)
            if kind == "sparsek":
                yield layer, program.kernels(weights, hidden, scale)
            hidden = [program.apply(weights, x, layer) for x in hidden]


class _Programs:
    """A kind of block, compiled: what it does to a row, and what is observed of its attention."""

    def __init__(self, config: nn.DecoderConfig, kind: str, methods: Sequence[Method]):
        self.config, self.methods = config.attention, methods
        self.definition = define(lambda: Block(config, kind, rngs=nnx.Rngs(0)))
        self.apply = jax.jit(self._apply)
        self.observe = jax.jit(self._observe)

    def weights(self, params: Params, layer: int) -> Params:
        """The parameters of one layer by the names they have in a block."""
        return {
            name: jnp.asarray(params[f"layers.{layer}.{name}"]) for name in self.definition.abstract
        }

    def _apply(self, weights, hidden, layer):
        positions = jnp.arange(hidden.shape[1])[None]
        block = self.definition.merge(weights)
        return block(hidden, positions=positions, segment_ids=None, sharding=None, layer=layer)[0]

    def _observe(self, weights, hidden):
        """Of one row: inputs of the scorer, weights and targets, and the mean query."""
        config, block = self.config, self.definition.merge(weights)
        attention = block.attention
        x = block.attention_norm(hidden)
        query = _heads(attention.query(x), attention.query_norm, config.head_dim)
        key = _heads(attention.key(x), attention.key_norm, config.head_dim)
        length = x.shape[1]
        seen_by = jnp.maximum(length - config.sliding_window - jnp.arange(length), 0)
        weight = jnp.minimum(seen_by / (_TRUSTED * length), 1.0)
        targets = {}
        if "attention_mass" in self.methods:
            positions, frequencies = jnp.arange(length)[None], rotary_frequencies(config)
            rotated = (apply_rotary(h, positions, frequencies=frequencies)[0] for h in (query, key))
            mass = far_attention(*rotated, sliding_window=config.sliding_window)
            mass = self._shared(mass / jnp.maximum(seen_by, 1)[:, None])
            targets["attention_mass"] = jnp.log(jnp.maximum(mass, _LEAST_MASS))
        if "key_norm" in self.methods:
            targets["key_norm"] = -self._shared(jnp.linalg.norm(key[0], axis=-1))
        return x[0], weight, targets, query[0].mean(0)

    def _shared(self, x):
        return x.mean(-1, keepdims=True) if self.config.shared_scores else x

    def kernels(
        self, weights: Params, hidden: Sequence[Float[Array, "1 T D"]], scale: float
    ) -> dict[Method, Float32[np.ndarray, "D K"]]:
        """Every method's kernel of one layer, from the rows that it gets."""
        observed = [self.observe(weights, x) for x in hidden]
        found = {}
        for method in self.methods:
            moments = functools.reduce(
                operator.add, (Moments.of(w, x, y.get(method)) for x, w, y, _ in observed)
            )
            if method == "mean_query":
                attention = self.definition.merge(weights).attention
                query = jnp.mean(jnp.stack([query for *_, query in observed]), axis=0)
                distances = jnp.arange(self.config.sliding_window, hidden[0].shape[1])
                kernel = self._shared(mean_query_kernel(attention, query, distances))
                kernel = np.asarray(kernel, np.float64)
            else:
                kernel = ridge(moments)
            deviation = np.sqrt(np.einsum("dk,de,ek->k", kernel, moments.covariance, kernel))
            found[method] = (kernel * (scale / np.maximum(deviation, 1e-12))).astype(np.float32)
        return found


def far_attention(
    query: Float[Array, "T N H"], key: Float[Array, "T K H"], *, sliding_window: int
) -> Float[Array, "T K"]:
    """What every key gets of dense causal attention from queries that have it not in the window.

    Args:
      query: Rotated, of one row.
      key: Rotated.
      sliding_window: w; query t has the keys at `j <= t - w` not in it.

    Returns:
      Attention summed over those queries, and averaged over the query heads of a KV head.
    """
    length, num_heads, head_dim = query.shape
    padding = -length % _CHUNK
    grouped = jnp.pad(query, ((0, padding), (0, 0), (0, 0)))
    grouped = grouped.reshape(-1, _CHUNK, key.shape[1], num_heads // key.shape[1], head_dim)
    key_position = jnp.arange(length)

    def chunk(total, inputs):
        query, position = inputs
        logits = jnp.einsum("tkgh,skh->kgts", query, key) * head_dim**-0.5
        logits = jnp.where(key_position <= position[:, None], logits, -jnp.inf)
        far = (key_position <= position[:, None] - sliding_window) & (position < length)[:, None]
        return total + jnp.where(far, jax.nn.softmax(logits, axis=-1), 0.0).sum(2).mean(1), None

    positions = jnp.arange(length + padding).reshape(-1, _CHUNK)
    total, _ = jax.lax.scan(chunk, jnp.zeros((key.shape[1], length)), (grouped, positions))
    return total.T


def _heads(x, norm, head_dim):
    x = x.reshape(*x.shape[:2], -1, head_dim)
    return x if norm is None else norm(x)
