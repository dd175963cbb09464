"""Selections that know what will be asked for, which `benchmarks.hindsight` measures."""

import jax
import jax.numpy as jnp
import numpy as np

from sparsek_jax.pretrained.scorer_start import (
    RATES,
    far_attention,
    log_importance,
    selection_divergence,
    sloped_scores,
)

# Queries that attend at a time.
_CHUNK = 128
# Halvings of the interval of logarithms in which the k-th largest attention of a query lies.
_HALVINGS = 24
_LEAST_LOG2 = -40.0


def kept_by_query(far, later, num_selected):
    """Which keys each query keeps: those that it attends to most.

    Args:
      far: Attention beyond the window, a mean over the query heads of a KV head, `[K, C, T]`.
      later: Not used.
      num_selected: k.

    Returns:
      At most k of each query, `[K, C, T]`.
    """
    del later
    logs = jnp.log2(far)

    def halve(_, interval):
        low, high = interval
        middle = (low + high) / 2
        many = (logs > middle).sum(-1, keepdims=True) > num_selected
        return jnp.where(many, middle, low), jnp.where(many, high, middle)

    ends = jnp.full((*far.shape[:2], 1), _LEAST_LOG2), jnp.zeros((*far.shape[:2], 1))
    return logs > jax.lax.fori_loop(0, _HALVINGS, halve, ends)[1]


def kept_by_foresight(far, later, num_selected):
    """Which keys a chunk of queries keeps: those that get most from it and all later queries.

    Args:
      far: As for `kept_by_query`.
      later: What every key gets of this chunk's queries and later ones, `[K, T]`.
      num_selected: k.

    Returns:
      The same k of all the queries, `[K, 1, T]`, some of them in the window of some query.
    """
    # Keys that are still in the window of all these queries cannot be selected yet.
    found = jnp.where((far > 0).any(1), later, 0.0)
    least = jax.lax.top_k(found, min(num_selected, found.shape[-1]))[0][:, -1:]
    return (found >= jnp.maximum(least, jnp.finfo(found.dtype).tiny))[:, None]


def kept_attention(query, key, value, kept, *, num_selected, sliding_window):
    """Attention to the window and the keys that `kept` chooses, of one row.

    Args:
      query: `[T, N, H]`.
      key: `[T, K, H]`.
      value: `[T, K, H]`.
      kept: `kept_by_query` or `kept_by_foresight`.
      num_selected: k.
      sliding_window: w.

    Returns:
      `[T, N, H]`, of the values' dtype.
    """
    length, num_heads, head_dim = query.shape
    padded = jnp.pad(query, ((0, -length % _CHUNK), (0, 0), (0, 0)))
    chunks = padded.reshape(-1, _CHUNK, key.shape[1], num_heads // key.shape[1], head_dim)
    positions = jnp.arange(len(padded)).reshape(-1, _CHUNK)

    def attention(query, position):
        logits = jnp.einsum("tkgh,skh->kgts", query, key, preferred_element_type=jnp.float32)
        distance = position[:, None] - jnp.arange(length)
        weights = jax.nn.softmax(
            jnp.where(distance >= 0, logits * head_dim**-0.5, -jnp.inf), axis=-1
        )
        return jnp.where((position < length)[:, None], weights, 0.0), distance >= sliding_window

    def gets(inputs):
        weights, is_far = attention(*inputs)
        return jnp.where(is_far, weights, 0.0).sum(2).mean(1)

    def attend(inputs):
        query, position, later = inputs
        weights, is_far = attention(query, position)
        far = jnp.where(is_far, weights, 0.0).mean(1)
        chosen = kept(far, later, num_selected)
        weights = jnp.where(is_far & ~chosen[:, None], 0.0, weights)
        weights /= jnp.maximum(weights.sum(-1, keepdims=True), jnp.finfo(jnp.float32).tiny)
        return jnp.einsum("kgts,skh->tkgh", weights.astype(value.dtype), value)

    by_chunk = jax.lax.map(gets, (chunks, positions))
    later = jnp.cumsum(by_chunk[::-1], axis=0)[::-1]
    out = jax.lax.map(attend, (chunks, positions, later))
    return out.reshape(-1, num_heads, head_dim)[:length]


def hindsight_scores(query, key, *, num_selected, sliding_window, num_sinks):
    """The scores that calibration would like to predict, of one row.

    Args:
      query: Rotated, `[T, N, H]`.
      key: Rotated, `[T, K, H]`.
      num_selected: k.
      sliding_window: w.
      num_sinks: First tokens with the highest scores.

    Returns:
      For each KV head those of the rate of forgetting with which attention changes least,
      `[1, T, K]`.
    """
    rates = np.array(RATES) / num_selected
    mass = far_attention(query, key, sliding_window=sliding_window)
    scores = log_importance(mass, rates, sliding_window=sliding_window)
    scores = sloped_scores(scores, rates, num_sinks=num_sinks)
    lost = selection_divergence(
        query, key, scores, num_selected=num_selected, sliding_window=sliding_window
    )
    best = lost.argmin(axis=0)
    return jnp.take_along_axis(scores, best[None, None], axis=1)[:, 0][None]
