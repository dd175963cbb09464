"""Scorers that start from what a model attends to, instead of at random.

A scorer is linear in the normalised hidden state, so whatever is wanted of the keys becomes a
kernel: exactly, where it is linear itself, else by ridge regression over a calibration text, which
the model reads once with dense attention, one layer after the other.

- "attention_mass": the logarithm of the attention that a key gets from queries that it has left the
  window of. What heavy-hitter caches (H2O, arXiv 2306.14048) observe, predicted from the key alone.
  That attention fades with distance, in each head at another rate r, so it is measured against
  exp(-r distance): of several rates the one is taken with which selection changes attention least.
  The slope is twice that.
- "mean_query": the logit of the mean query, turned by the mean of the rotations from the window's
  end to the row's. Exactly linear, but for a norm of keys, whose division by their length is left
  out.
- "key_norm": minus the key's length, as keys of small norm are attended more (Devoto et al. 2024,
  arXiv 2406.11430).

SparseK ignores a shift of all scores, and a start fixes their scale: scores, without what the slope
adds, get the standard deviation asked for.
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
from sparsek_jax.nn.config import has_scorer
from sparsek_jax.nn.decoder import Block
from sparsek_jax.nn.rotary import apply_rotary, rotary_frequencies
from sparsek_jax.nn.scorer import keep_sinks
from sparsek_jax.ops.selection import causal_selection
from sparsek_jax.ops.tracing import computed_once
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
# Rates of forgetting to choose from: by how much attention fades, on a logarithmic scale, while k
# keys come.
RATES = (0, 1 / 32, 1 / 16, 1 / 8, 1 / 4, 1 / 2, 1, 2)
# Slope over the rate of least divergence: nats ask for more recent keys (docs/pretrained.md).
_HASTE = 2.0


@dataclasses.dataclass(frozen=True)
class Start:
    """What the scorer of a layer starts from.

    Attributes:
      kernel: `[d_model, K]`, or `[d_model, 1]` where scores are shared.
      slope: Per position, of each score.
    """

    kernel: Float32[np.ndarray, "D K"]
    slope: Float32[np.ndarray, " K"]


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


def scorer_starts(
    params: Params,
    config: nn.DecoderConfig,
    tokens: Int[np.ndarray, "R T"],
    *,
    methods: Sequence[Method] = ("attention_mass",),
    scale: float = DEFAULT_SCALE,
) -> Iterator[tuple[int, dict[Method, Start]]]:
    """Starts for the scorers of a decoder, layer by layer, from one pass over a text.

    Memory: the hidden states of all tokens, and for one row at a time the attention of 128 queries.

    Args:
      params: Of the decoder with every layer by itself (`unstack_layers`); scorers are not used.
      config: Of the decoder. SparseK layers attend densely here, so that they drop nothing, and
        other ones as they are. k, w and the sinks are those that slopes are chosen for; without
        `learned_slope` slopes are 0.
      tokens: Rows of text, each a document, longer than the window.
      methods: Some of METHODS; the module says what they are.
      scale: Standard deviation of the scores over the text.

    Yields:
      For every SparseK layer its index and every method's start.
    """
    config = dataclasses.replace(config, remat="none", scan_layers=False, dtype="float32")
    programs: dict[str, _Programs] = {}
    with jax.default_matmul_precision("highest"):
        table = jnp.asarray(params["embedding"])
        hidden = [jnp.take(table, row[None], axis=0) for row in jnp.asarray(tokens)]
        for layer in range(config.num_layers):
            kind = config.attention.layer_kind(layer)
            used = "dense" if has_scorer(kind) else kind
            if used not in programs:
                programs[used] = _Programs(config, used, methods)
            program = programs[used]
            weights = program.weights(params, layer)
            if has_scorer(kind):
                yield layer, program.starts(weights, hidden, scale)
            hidden = [program.apply(weights, x, layer) for x in hidden]


class _Programs:
    """A kind of block, compiled: what it does to a row, and what is observed of its attention."""

    def __init__(self, config: nn.DecoderConfig, kind: str, methods: Sequence[Method]):
        self.config, self.methods = config.attention, methods
        self.definition = define(lambda: Block(config, kind, rngs=nnx.Rngs(0)))
        rates = RATES if config.attention.learned_slope else (0,)
        self.rates = np.array(rates) / config.attention.num_selected
        self.apply = jax.jit(self._apply)
        self.observe = jax.jit(self._observe)
        self.divergence = jax.jit(self._divergence)

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
        """Of one row: inputs of the scorer, their weights, what is aimed at, and the mean query.

        Targets of "attention_mass" are those of all heads for one rate after the other.
        """
        config = self.config
        x, query, key = self._heads(weights, hidden)
        length = x.shape[1]
        seen_by = jnp.maximum(length - config.sliding_window - jnp.arange(length), 0)
        weight = jnp.minimum(seen_by / (_TRUSTED * length), 1.0)
        targets = {}
        if "attention_mass" in self.methods:
            mass = far_attention(*self._rotated(query, key), sliding_window=config.sliding_window)
            found = log_importance(
                self._shared(mass), self.rates, sliding_window=config.sliding_window
            )
            targets["attention_mass"] = found.reshape(length, -1)
        if "key_norm" in self.methods:
            targets["key_norm"] = -self._shared(jnp.linalg.norm(key[0], axis=-1))
        return x[0], weight, targets, query[0].mean(0)

    def _divergence(self, weights, hidden, kernels):
        """`selection_divergence` in one row with the scores of every rate, `[rates, K]`."""
        config = self.config
        x, query, key = self._heads(weights, hidden)
        scores = jnp.einsum("td,drk->trk", x[0], kernels)
        return selection_divergence(
            *self._rotated(query, key),
            sloped_scores(scores, self.rates, num_sinks=config.num_sinks),
            num_selected=config.num_selected,
            sliding_window=config.sliding_window,
        )

    def _heads(self, weights, hidden):
        """What the scorer reads, and query and key heads, normalised but not rotated."""
        block = self.definition.merge(weights)
        attention, x = block.attention, block.attention_norm(hidden)
        query, key = (
            _normed_heads(layer(x), norm, self.config.head_dim)
            for layer, norm in (
                (attention.query, attention.query_norm),
                (attention.key, attention.key_norm),
            )
        )
        return x, query, key

    def _rotated(self, *heads):
        positions, frequencies = (
            jnp.arange(heads[0].shape[1])[None],
            rotary_frequencies(self.config),
        )
        return (apply_rotary(x, positions, frequencies=frequencies)[0] for x in heads)

    def _shared(self, x):
        return x.mean(-1, keepdims=True) if self.config.shared_scores else x

    def starts(
        self, weights: Params, hidden: Sequence[Float[Array, "1 T D"]], scale: float
    ) -> dict[Method, Start]:
        """Every method's start for one layer, from the rows that it gets."""
        observed = [self.observe(weights, x) for x in hidden]
        found = {}
        for method in self.methods:
            moments = functools.reduce(
                operator.add, (Moments.of(w, x, y.get(method)) for x, w, y, _ in observed)
            )
            slope = 0.0
            if method == "mean_query":
                attention = self.definition.merge(weights).attention
                query = jnp.mean(jnp.stack([query for *_, query in observed]), axis=0)
                distances = jnp.arange(self.config.sliding_window, hidden[0].shape[1])
                kernel = self._shared(mean_query_kernel(attention, query, distances))
                kernel = np.asarray(kernel, np.float64)
            elif method == "key_norm":
                kernel = ridge(moments)
            else:
                kernel, rate = self._fading(weights, hidden, ridge(moments))
                slope = _HASTE * rate
            deviation = np.sqrt(np.einsum("dk,de,ek->k", kernel, moments.covariance, kernel))
            gain = scale / np.maximum(deviation, 1e-12)
            slope = np.broadcast_to(gain * slope, gain.shape)
            found[method] = Start((gain * kernel).astype(np.float32), slope.astype(np.float32))
        return found

    def _fading(self, weights, hidden, kernels):
        """Of kernels for every rate and head, `[d_model, rates * K]`, each head's best, and rates.

        Best is what changes attention least; among equals the slower rate.
        """
        if len(self.rates) == 1:
            return kernels, self.rates
        kernels = kernels.reshape(len(kernels), len(self.rates), -1)
        as_array = jnp.asarray(kernels, jnp.float32)
        lost = sum(np.asarray(self.divergence(weights, x, as_array), np.float64) for x in hidden)
        best = lost.argmin(axis=0)
        return kernels[:, best, np.arange(len(best))], self.rates[best]


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

    def chunk(total, inputs):
        return total + inputs[0].sum(2).mean(1), None

    total = jnp.zeros((key.shape[1], len(key)))
    return _far_scan(query, key, sliding_window, chunk, total, ()).T


def log_importance(
    mass: Float[Array, "T K"], rates: Float[np.ndarray, " R"], *, sliding_window: int
) -> Float[Array, "T R K"]:
    """What keys are worth, if their attention is exp(log importance - rate * distance).

    Args:
      mass: What every key gets from the queries of its row that have it not in the window.
      rates: At which attention may fade, per position.
      sliding_window: w.

    Returns:
      For every rate, but for a constant that depends on it. It means nothing for the last w keys.
    """
    seen_by = jnp.maximum(len(mass) - sliding_window - jnp.arange(len(mass)), 1)[:, None]
    rates = rates.astype(np.float32)
    # The sum of exp(-rate * distance), over that at the window's end: a geometric series.
    ends = -np.expm1(-np.where(rates > 0, rates, 1))
    expected = jnp.where(rates > 0, -jnp.expm1(-rates * seen_by) / ends, seen_by)
    return jnp.log(jnp.maximum(mass[:, None] / expected[..., None], _LEAST_MASS))


def sloped_scores(
    scores: Float[Array, "T R S"], rates: Float[np.ndarray, " R"], *, num_sinks: int
) -> Float[Array, "T R S"]:
    """Adds each rate's slope to the scores of one row, and raises its sinks.

    Args:
      scores: For every rate.
      rates: Per position.
      num_sinks: First tokens with the highest scores.
    """
    positions = jnp.arange(len(scores))
    scores += (rates[:, None] * positions[:, None, None]).astype(jnp.float32)
    flat = scores.reshape(1, len(scores), -1)
    return keep_sinks(flat, positions[None], num_sinks).reshape(scores.shape)


def selection_divergence(
    query: Float[Array, "T N H"],
    key: Float[Array, "T K H"],
    scores: Float[Array, "T R S"],
    *,
    num_selected: int,
    sliding_window: int,
) -> Float[Array, "R S"]:
    """How far attention to the window and to selected keys is from dense causal attention.

    Without the other keys a softmax is what it was, over the share p of its sum that is left: its
    Kullback-Leibler divergence from the whole one is -log p.

    Args:
      query: Rotated, of one row.
      key: Rotated.
      scores: R of them for each KV head, or shared by all (S = 1).
      num_selected: k.
      sliding_window: w.

    Returns:
      Divergence in nats, summed over queries, as a mean over the query heads of a KV head, or over
      all where scores are shared.
    """
    length, rates, num_scores = scores.shape
    scores = computed_once(scores.reshape(1, length, -1))
    selection = causal_selection(scores, num_selected=num_selected, sliding_window=sliding_window)
    scores, cutoff_score, cutoff_index = (
        x.reshape(length, rates, num_scores)
        for x in (scores, selection.cutoff_score, selection.cutoff_index)
    )
    key_position = jnp.arange(length)

    def chunk(total, inputs):
        attention, cutoff_score, cutoff_index = inputs
        near = 1 - attention.sum(-1)

        def one(inputs):
            # Axes: score, query head, query, key.
            score, cutoff, index = (x.T[:, None] for x in inputs)
            score, cutoff, index = score[..., None, :], cutoff[..., None], index[..., None]
            selected = (score > cutoff) | ((score == cutoff) & (key_position <= index))
            kept = near + jnp.where(selected, attention, 0.0).sum(-1)
            divergence = -jnp.log(jnp.maximum(kept, _LEAST_MASS)).sum(-1)
            return divergence.reshape(num_scores, -1).mean(-1)

        by_rate = tuple(jnp.moveaxis(x, 1, 0) for x in (scores, cutoff_score, cutoff_index))
        return total + jax.lax.map(one, by_rate), None

    total = jnp.zeros((rates, num_scores))
    return _far_scan(query, key, sliding_window, chunk, total, (cutoff_score, cutoff_index))


def _normed_heads(x, norm, head_dim):
    x = x.reshape(*x.shape[:2], -1, head_dim)
    return x if norm is None else norm(x)


def _far_scan(query, key, sliding_window, step, carry, by_query):
    """Scans over chunks of queries with their attention to keys beyond the window.

    `step` gets the carry and `(attention, *chunks of by_query)`. Attention is `[K, N / K, C, T]`;
    queries that fill the last chunk have none.
    """
    length, num_heads, head_dim = query.shape
    padding = -length % _CHUNK

    def chunks(x):
        x = jnp.pad(x, ((0, padding), *((0, 0),) * (x.ndim - 1)))
        return x.reshape(-1, _CHUNK, *x.shape[1:])

    query = chunks(query)
    grouped = query.reshape(*query.shape[:2], key.shape[1], num_heads // key.shape[1], head_dim)
    key_position = jnp.arange(length)

    def attend(carry, inputs):
        query, position, *rest = inputs
        logits = jnp.einsum("tkgh,skh->kgts", query, key) * head_dim**-0.5
        logits = jnp.where(key_position <= position[:, None], logits, -jnp.inf)
        far = (key_position <= position[:, None] - sliding_window) & (position < length)[:, None]
        attention = jnp.where(far, jax.nn.softmax(logits, axis=-1), 0.0)
        return step(carry, (attention, *rest))

    positions = jnp.arange(length + padding).reshape(-1, _CHUNK)
    inputs = (grouped, positions, *map(chunks, by_query))
    return jax.lax.scan(attend, carry, inputs)[0]
