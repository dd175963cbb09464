"""What generation remembers of all tokens so far: constant in size, exact to rounding.

Per KV head the cache holds the keys and values of the newest w tokens and of the k selected ones,
for a dropped key never returns. Soft gates also need their threshold tau, and that depends on the
scores of dropped keys above it: these scores, without keys and values, form the support.

One token is appended by comparing the key that leaves the window with the worst selected one. Many
tokens are appended by attention over a short sequence, what is remembered in front of the tokens.
"""

import dataclasses
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Float32, Int, Int32

from sparsek_jax.ops.attention import (
    Implementation,
    check_attention_arguments,
    check_implementation,
    sparsek_attention,
)
from sparsek_jax.ops.checks import check_array, check_int
from sparsek_jax.ops.gating import (
    Gating,
    check_gating,
    gated_logits,
    gates_sum,
    is_soft,
    least_gate,
)
from sparsek_jax.ops.lifetimes import dropped_keys
from sparsek_jax.ops.products import einsum_f32
from sparsek_jax.ops.ring import ages, rows_in_order
from sparsek_jax.ops.selection import document_bounds
from sparsek_jax.ops.tracing import computed_once

# The search for tau narrows its bracket, of width one, by the factor `_SECTIONS` in every round:
# to 2^-24, the spacing of float32 below one. Rounds are launches, so few wide ones suit a GPU.
_SECTIONS = 64
_ROUNDS = 4


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["score", "tau", "num_lost", "lost_mass"],
    meta_fields=[],
)
@dataclasses.dataclass(frozen=True)
class Support:
    """What soft gates need of the keys that were dropped.

    Attributes:
      score: Scores of dropped keys above tau; -inf where there is none.
      tau: Threshold of the newest query; -inf while no key was dropped.
      num_lost: How many scores above tau had no room in `score`. While zero, tau is exact.
      lost_mass: Sum of their gates, each when it was lost. At the cache's tau, the gates of all
        keys so far sum to at most k plus this.
    """

    score: Float32[Array, "B S P"]
    tau: Float32[Array, "B S"]
    num_lost: Int32[Array, "B S"]
    lost_mass: Float32[Array, "B S"]


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["key", "value", "score", "position", "length", "support"],
    meta_fields=["num_selected", "sliding_window", "gating"],
)
@dataclasses.dataclass(frozen=True)
class SparseKCache:
    """The remembered past of one attention layer, `init_cache` makes an empty one.

    S is the number of scores per token: the KV heads, or 1. Rows 0 to k - 1 hold the selected keys
    in no order, row k + p % w the window's token p. Axis 0 of every array is the batch, axis 1 of
    every array but `length` the heads; both may be sharded.

    Attributes:
      key: Keys as they were given to `extend_cache`.
      value: Values.
      score: Scores; -inf in an empty row.
      position: How many tokens came before the row's token; -1 in an empty row.
      length: Tokens so far, for every member of the batch.
      support: Scores of dropped keys; None if gates are 1 in the forward pass.
      num_selected: k.
      sliding_window: w.
      gating: As in `sparsek_attention`.
    """

    key: Float[Array, "B K k+w H"]
    value: Float[Array, "B K k+w H"]
    score: Float32[Array, "B S k+w"]
    position: Int32[Array, "B S k+w"]
    length: Int32[Array, " B"]
    support: Support | None
    num_selected: int
    sliding_window: int
    gating: Gating


class Dropped(NamedTuple):
    """The key that every new query is the first not to attend to any more; it drops at most one.

    Attributes:
      key: Of the dropped token; zero where there is none.
      value: As `key`.
      exists: Whether the query drops a key.
    """

    key: Float[Array, "B C K H"]
    value: Float[Array, "B C K H"]
    exists: Bool[Array, "B C K"]


# By field, what an empty cache consists of.
_EMPTY = {
    "key": 0,
    "value": 0,
    "score": -np.inf,
    "position": -1,
    "length": 0,
    "tau": -np.inf,
    "num_lost": 0,
    "lost_mass": 0,
}


def init_cache(
    batch_size: int,
    *,
    num_kv_heads: int,
    head_dim: int,
    num_selected: int,
    sliding_window: int = 0,
    gating: Gating = "soft",
    shared_scores: bool = False,
    support_size: int | None = None,
    dtype: jax.typing.DTypeLike = jnp.float32,
) -> SparseKCache:
    """Makes an empty cache; its size does not depend on how many tokens will be appended.

    Args:
      batch_size: B.
      num_kv_heads: K.
      head_dim: H.
      num_selected: k, as in `sparsek_attention`.
      sliding_window: w, as in `sparsek_attention`.
      gating: As in `sparsek_attention`. "straight_through" needs no scores of dropped keys.
      shared_scores: Whether all KV heads have one score per token.
      support_size: For soft gates, how many scores of dropped keys are remembered per score head;
        4 k by default.
      dtype: Of keys and values.

    Raises:
      TypeError: An argument is not an int, or `dtype` is no floating-point dtype.
      ValueError: An argument is out of range.
    """
    check_gating(gating)
    try:
        is_floating = jnp.issubdtype(dtype, jnp.floating)
    except TypeError:
        is_floating = False
    if not is_floating:
        raise TypeError(f"dtype={dtype!r} must be a floating-point dtype")
    for name, value, least in (
        ("batch_size", batch_size, 0),
        ("num_kv_heads", num_kv_heads, 1),
        ("head_dim", head_dim, 1),
        ("num_selected", num_selected, 1),
        ("sliding_window", sliding_window, 0),
        ("support_size", 1 if support_size is None else support_size, 1),
    ):
        check_int(name, value, least)
    if not is_soft(gating) and support_size is not None:
        raise ValueError(
            f"support_size={support_size} is of no use with gating={gating!r}; expected None"
        )
    num_scores = 1 if shared_scores else num_kv_heads
    rows = num_selected + sliding_window

    def empty(field, *shape, dtype):
        return jnp.full((batch_size, *shape), _EMPTY[field], dtype)

    support = None
    if is_soft(gating):
        size = default_support_size(num_selected) if support_size is None else support_size
        support = Support(
            score=empty("score", num_scores, size, dtype=jnp.float32),
            tau=empty("tau", num_scores, dtype=jnp.float32),
            num_lost=empty("num_lost", num_scores, dtype=jnp.int32),
            lost_mass=empty("lost_mass", num_scores, dtype=jnp.float32),
        )
    return SparseKCache(
        key=empty("key", num_kv_heads, rows, head_dim, dtype=dtype),
        value=empty("value", num_kv_heads, rows, head_dim, dtype=dtype),
        score=empty("score", num_scores, rows, dtype=jnp.float32),
        position=empty("position", num_scores, rows, dtype=jnp.int32),
        length=empty("length", dtype=jnp.int32),
        support=support,
        num_selected=num_selected,
        sliding_window=sliding_window,
        gating=gating,
    )


def default_support_size(num_selected: int) -> int:
    """How many scores of dropped keys are remembered unless another number is asked for."""
    return 4 * num_selected


def reset_cache(cache: SparseKCache, rows: Bool[Array, " B"]) -> SparseKCache:
    """Empties the cache of some members of the batch, for their next sequence.

    Args:
      cache: The cache.
      rows: Which members, bool `[B]`.

    Raises:
      TypeError: `rows` is not a bool array.
      ValueError: `rows` has the wrong shape.
    """
    rows = jnp.asarray(rows)
    if rows.dtype != bool:
        raise TypeError(f"rows must be a bool array, got dtype {rows.dtype}")
    if rows.shape != cache.length.shape:
        raise ValueError(f"rows has shape {rows.shape}, expected [B] = {cache.length.shape}")

    def emptied(path, x):
        return _where(rows, jnp.asarray(_EMPTY[path[-1].name], x.dtype), x)

    return jax.tree_util.tree_map_with_path(emptied, cache)


def extend_cache(
    cache: SparseKCache,
    query: Float[Array, "B C N H"],
    key: Float[Array, "B C K H"],
    value: Float[Array, "B C K H"],
    scores: Float[Array, "B C S"],
    *,
    scale: float | None = None,
    num_tokens: Int[Array, " B"] | None = None,
    implementation: Implementation | None = None,
    return_dropped: bool = False,
) -> (
    tuple[SparseKCache, Float[Array, "B C N H"]]
    | tuple[SparseKCache, Float[Array, "B C N H"], Dropped]
):
    """Appends C tokens and attends from each to itself and what came before.

    However a sequence is cut into calls, the outputs are those of one `sparsek_attention` over all
    of it, up to rounding, as long as `cache.support.num_lost` is zero.

    One token, C = 1, takes time O(k + w). More take one attention over k + w + P + C tokens, P
    being the support's size: a long prompt is best cut into chunks of a few thousand tokens.

    Args:
      cache: What came before. A jit that replaces it should donate it.
      query: `[B, C, N, H]`, N a multiple of K, dtype of the cache.
      key: `[B, C, K, H]`, dtype of the cache; keys are remembered as they are given, with whatever
        position they encode.
      value: `[B, C, K, H]`, dtype of the cache.
      scores: Importance of every key, `[B, C, K]` or, shared by all KV heads, `[B, C, 1]`. Should
        be float32.
      scale: Factor on the logits; 1 / sqrt(H) by default.
      num_tokens: How many of the C tokens each member of the batch appends, the first ones; 0 to C,
        all by default.
      implementation: Of `sparsek_attention`, for C > 1; without effect for C = 1.
      return_dropped: Also return the keys that are dropped.

    Returns:
      The new cache and the attention output, shape and dtype of query. It is zero for tokens that
      were not appended, and NaN, for the head concerned, once a NaN or infinite score is in the
      pool. With `return_dropped` also the `Dropped`.

    Raises:
      TypeError: An array has the wrong dtype, or is no array.
      ValueError: A shape or a value does not fit, or no implementation has that name.
      NotImplementedError: The named implementation does not support the call.
    """
    check_attention_arguments(query, key, value, scores, scale)
    check_implementation(implementation)
    _check_fits(cache, key, scores)
    size = query.shape[1]
    num_tokens = checked_num_tokens(num_tokens, *query.shape[:2])
    scale = 1 / math.sqrt(query.shape[-1]) if scale is None else float(scale)
    arrays = (cache, query, key, value, scores, num_tokens)
    if size == 1:
        *extended, dropped = _extend_by_one(*arrays, scale=scale, return_dropped=return_dropped)
    else:
        *extended, dropped = _extend_by_many(
            *arrays, scale=scale, implementation=implementation, return_dropped=return_dropped
        )
    return (*extended, dropped) if return_dropped else tuple(extended)


def checked_num_tokens(num_tokens: Any, batch: int, size: int) -> Int32[Array, " B"]:
    """Returns `batch` counts, for None `size` each; raises if any is known not to fit."""
    if num_tokens is None:
        return jnp.full((batch,), size, jnp.int32)
    check_array("num_tokens", num_tokens, jnp.integer)
    if num_tokens.shape != (batch,):
        raise ValueError(f"num_tokens has shape {num_tokens.shape}, expected [B] = {(batch,)}")
    if not isinstance(num_tokens, jax.core.Tracer):
        for count in (np.min(num_tokens, initial=0), np.max(num_tokens, initial=0)):
            if not 0 <= count <= size:
                raise ValueError(f"num_tokens holds {count}, expected 0 to C = {size}")
    return jnp.asarray(num_tokens, jnp.int32)


def _check_fits(cache, key, scores) -> None:
    batch, num_kv_heads, _, head_dim = cache.key.shape
    size = key.shape[1]
    if size == 0:
        raise ValueError(f"key of shape {key.shape} holds no token, expected C of at least 1")
    expected = (batch, size, num_kv_heads, head_dim)
    if key.shape != expected:
        raise ValueError(f"key has shape {key.shape}, expected {expected} to fit the cache")
    if key.dtype != cache.key.dtype:
        raise TypeError(f"key has dtype {key.dtype}, expected the cache's {cache.key.dtype}")
    expected = (batch, size, cache.score.shape[1])
    if scores.shape != expected:
        raise ValueError(f"scores has shape {scores.shape}, expected {expected} to fit the cache")


# Compiled as one, a call outside of any jit takes a fraction of what its operations would.
@functools.partial(jax.jit, static_argnames=("scale", "return_dropped"))
def _extend_by_one(cache, query, key, value, scores, num_tokens, *, scale, return_dropped):
    k, w = cache.num_selected, cache.sliding_window
    num_rows = k + w
    active = num_tokens > 0
    tables = (cache.key, cache.value, cache.score, cache.position)
    position = _for_heads(cache.score, cache.length[:, None])
    new = (key[:, 0], value[:, 0], _finite_or_nan(scores[:, 0]), position)
    if w:
        ring_row = (k + cache.length % w)[:, None]
        entering = [_rows(x, _for_heads(x, ring_row)) for x in tables]
    else:
        entering = new
    entering_score = entering[2]

    selected_score, selected_position = cache.score[..., :k], cache.position[..., :k]
    rank = _rank(selected_score)
    lowest = jnp.min(rank, axis=-1)
    # Of equals the newest is the worst. An empty row, at -1, is a candidate all the same.
    worst = jnp.argmax(jnp.where(rank == lowest[..., None], selected_position, -2), axis=-1)
    enters = (active & (cache.length >= w))[:, None]
    accepted = enters & (_rank(entering_score) > lowest)

    dropped = None
    if return_dropped:
        losers = (
            _where(_for_heads(x, accepted), _rows(x, _for_heads(x, worst)), y)[:, :, None]
            for x, y in zip(tables, entering, strict=True)
        )
        lost_key, lost_value, _, lost_position = losers
        # A row that is taken may have been empty.
        dropped = _dropped(lost_key, lost_value, enters[..., None] & (lost_position >= 0))
        # Read before the rows are overwritten, for which else the whole cache would be copied.
        dropped, tables = jax.lax.optimization_barrier((dropped, tables))

    # What is sent past the last row is dropped.
    target = jnp.where(accepted, worst, num_rows)[..., None]
    rows = [x[:, :, None] for x in entering]
    if w:
        ring_target = jnp.where(active[:, None], ring_row, num_rows)
        ring_target = _for_heads(cache.score, ring_target)[..., None]
        target = jnp.concatenate([target, ring_target], axis=-1)
        rows = [jnp.stack(pair, axis=2) for pair in zip(entering, new, strict=True)]
    tables = [_set_rows(x, _for_heads(x, target), y) for x, y in zip(tables, rows, strict=True)]
    key, value, score, position = tables

    support, gate = cache.support, jnp.ones_like(selected_score)
    if support is not None:
        loser = jnp.where(accepted, lowest, entering_score)
        loser = jnp.where(enters, loser, -jnp.inf)[..., None]
        smallest = jnp.argmin(jnp.concatenate([support.score, loser], axis=-1), axis=-1)[..., None]
        kept = jnp.where(np.arange(support.score.shape[-1]) == smallest, loser, support.score)
        lost = jnp.minimum(loser, jnp.min(support.score, axis=-1, keepdims=True))
        exceeds = (cache.length + active - w > k)[:, None]
        updated, gate = _update_support(support, score[..., :k], kept, lost, exceeds)
        # Solving anew might change the last bit of rows that append nothing.
        support = jax.tree.map(functools.partial(_where, active), updated, support)
    cache = dataclasses.replace(
        cache,
        key=key,
        value=value,
        score=score,
        position=position,
        length=cache.length + active,
        support=support,
    )
    gate = jnp.maximum(gate, least_gate(cache.gating))
    gate = jnp.where(jnp.isnan(score[..., :k]), jnp.nan, gate)
    gate = jnp.concatenate([gate, jnp.ones_like(score[..., k:])], axis=-1)
    out = _attend(query[:, 0], cache, gate, scale)[:, None]
    return cache, _where(active, out, jnp.zeros_like(out)), dropped


def _attend(query, cache, gate, scale):
    batch, num_kv_heads, _, head_dim = cache.key.shape
    grouped = query.reshape(batch, num_kv_heads, query.shape[1] // num_kv_heads, head_dim)
    logits = scale * einsum_f32("bkgh,bkrh->bkgr", grouped, cache.key)
    gate = gate[:, :, None]
    exists = (cache.position >= 0)[:, :, None]
    logits = gated_logits(cache.gating, logits, gate)
    probabilities = jax.nn.softmax(jnp.where(exists, logits, -jnp.inf), axis=-1)
    weights = jnp.where(exists, probabilities * gate, 0.0)
    if gates_sum(cache.gating):
        total = jnp.sum(weights, axis=-1, keepdims=True)
        # Zero where nothing was ever appended.
        weights = weights / jnp.where(total == 0, 1.0, total)
    out = einsum_f32("bkgr,bkrh->bkgh", weights.astype(cache.value.dtype), cache.value)
    return out.reshape(query.shape).astype(query.dtype)


@functools.partial(jax.jit, static_argnames=("scale", "implementation", "return_dropped"))
def _extend_by_many(
    cache, query, key, value, scores, num_tokens, *, scale, implementation, return_dropped
):
    k, w = cache.num_selected, cache.sliding_window
    sequence = _with_past(cache, key, value, scores, num_tokens)
    past_size = sequence.score.shape[2] - query.shape[1]
    out, until = sparsek_attention(
        jnp.pad(query, ((0, 0), (past_size, 0), (0, 0), (0, 0))),
        *(jnp.swapaxes(x, 1, 2) for x in (sequence.key, sequence.value, sequence.score)),
        num_selected=k,
        sliding_window=w,
        gating=cache.gating,
        scale=scale,
        segment_ids=sequence.exists.astype(jnp.int32),
        implementation=implementation,
        return_until=True,
    )
    out = out[:, past_size:]
    appended = np.arange(query.shape[1]) < num_tokens[:, None]
    out = _where(appended, out, jnp.zeros_like(out))
    extended = _remembered(cache, sequence, past_size, num_tokens)
    # Rows that append nothing keep every bit.
    extended = jax.tree.map(lambda x, y: _where(num_tokens > 0, x, y), extended, cache)
    dropped = None
    if return_dropped:
        dropped = _dropped_by_many(sequence, until, past_size, num_tokens)
    return extended, out, dropped


def _dropped_by_many(sequence, until, past_size, num_tokens):
    segment_ids = sequence.exists.astype(jnp.int32)
    _, end = document_bounds(segment_ids, *segment_ids.shape)
    row = dropped_keys(until, end)[:, past_size:]
    appended = np.arange(row.shape[1]) < num_tokens[:, None]
    exists = appended[..., None] & (row < until.shape[1])
    row = jnp.swapaxes(row, 1, 2)
    rows = (_rows_or_zero(x, _for_heads(x, row)) for x in (sequence.key, sequence.value))
    return _dropped(*rows, jnp.swapaxes(exists, 1, 2))


def _dropped(key, value, exists):
    """Makes a `Dropped` of arrays with the heads before the tokens."""
    exists = _for_heads(key, exists)
    key, value = (jnp.where(exists[..., None], x, jnp.zeros_like(x)) for x in (key, value))
    return Dropped(*(jnp.swapaxes(x, 1, 2) for x in (key, value, exists)))


@dataclasses.dataclass(frozen=True)
class _Sequence:
    """Tokens in an order in which the operator selects from them as from all tokens so far.

    What does not exist comes first and is a document of its own.
    """

    key: Float[Array, "B K L H"]
    value: Float[Array, "B K L H"]
    score: Float32[Array, "B S L"]
    position: Int32[Array, "B S L"]
    exists: Bool[Array, "B L"]


def _with_past(cache, key, value, scores, num_tokens) -> _Sequence:
    """What is remembered, and then the next tokens, of which `num_tokens` are appended."""
    appended = np.arange(key.shape[1]) < num_tokens[:, None]
    # What is not appended must not spread its NaNs through a product with zero.
    key, value, scores = (_where(appended, x, jnp.zeros_like(x)) for x in (key, value, scores))
    past = _past(cache)

    def joined(remembered, new):
        return jnp.concatenate([remembered, jnp.swapaxes(new, 1, 2)], axis=2)

    positions = cache.length[:, None] + np.arange(key.shape[1], dtype=np.int32)
    return _Sequence(
        joined(past.key, key),
        joined(past.value, value),
        joined(past.score, _finite_or_nan(scores)),
        joined(past.position, jnp.repeat(positions[..., None], scores.shape[2], axis=2)),
        jnp.concatenate([past.exists, jnp.ones_like(appended)], axis=1),
    )


def _past(cache: SparseKCache) -> _Sequence:
    """The selected keys by position, the support, and the window.

    Of equal scores the earlier key is selected, so the support, dropped for coming later in the
    order than all selected keys, must lie behind them. While it is empty it must not exist at all,
    since the gates of up to k keys are 1, and lies in front.
    """
    k, w = cache.num_selected, cache.sliding_window
    batch, num_scores, num_rows = cache.score.shape
    entered = cache.length - w
    selected = jnp.argsort(cache.position[..., :k], axis=-1)
    ring = _for_heads(cache.score, k + rows_in_order(cache.length, w)[:, None])
    score, dropped = cache.score, jnp.zeros((batch, num_scores, 0), jnp.int32)
    if cache.support is not None:
        dropped = num_rows + jnp.arange(cache.support.score.shape[-1], dtype=jnp.int32)
        dropped = jnp.broadcast_to(dropped, cache.support.score.shape)
        # Heads differ in how many scores they remember. Far below tau, one more changes nothing.
        far_below = jnp.min(score[..., :k], axis=-1, keepdims=True) - 4.0
        filled = jnp.where(jnp.isneginf(cache.support.score), far_below, cache.support.score)
        score = jnp.concatenate([score, filled], axis=-1)
    has_dropped = (entered >= k)[:, None, None]
    row = jnp.where(
        has_dropped,
        jnp.concatenate([selected, dropped], axis=-1),
        jnp.concatenate([dropped, selected], axis=-1),
    )
    row = jnp.concatenate([row, ring], axis=-1)
    size = row.shape[-1]
    num_existing = jnp.where(entered >= k, size, jnp.minimum(cache.length, k + w))
    exists = np.arange(size) >= size - num_existing[:, None]
    return _Sequence(
        key=_rows_or_zero(cache.key, _for_heads(cache.key, row)),
        value=_rows_or_zero(cache.value, _for_heads(cache.value, row)),
        score=jnp.where(exists[:, None], _rows(score, row), 0.0),
        position=_rows_or_zero(cache.position, row),
        exists=exists,
    )


def _remembered(
    cache: SparseKCache, sequence: _Sequence, past_size: int, num_tokens: Int32[Array, " B"]
) -> SparseKCache:
    """The cache when the first `num_tokens` behind the past have been appended."""
    k, w = cache.num_selected, cache.sliding_window
    length = cache.length + num_tokens
    newest = past_size - 1 + num_tokens[:, None]
    in_pool = sequence.exists & (np.arange(sequence.exists.shape[1]) <= newest - w)
    score = jnp.where(in_pool[:, None], sequence.score, -jnp.inf)
    order = jnp.argsort(-_rank(score), axis=-1, stable=True)
    ranked = _rows(score, order)

    age = ages(length, w)
    row = jnp.concatenate([order[..., :k], _for_heads(order, (newest - age)[:, None])], axis=-1)
    exists = jnp.concatenate([np.arange(k) < length[:, None] - w, age < length[:, None]], axis=-1)[
        :, None
    ]
    support = cache.support
    if support is not None:
        kept, lost = jnp.split(ranked[..., k:], [support.score.shape[-1]], axis=-1)
        exceeds = (length - w > k)[:, None]
        support, _ = _update_support(support, ranked[..., :k], kept, lost, exceeds)
    return dataclasses.replace(
        cache,
        key=_rows(sequence.key, _for_heads(sequence.key, row)),
        value=_rows(sequence.value, _for_heads(sequence.value, row)),
        score=jnp.where(exists, _rows(sequence.score, row), -jnp.inf),
        position=jnp.where(exists, _rows(sequence.position, row), -1),
        length=length,
        support=support,
    )


def _update_support(
    support: Support,
    selected: Float32[Array, "B S k"],
    kept: Float32[Array, "B S P"],
    lost: Float32[Array, "B S n"],
    exceeds: Bool[Array, "B 1"],
) -> tuple[Support, Float32[Array, "B S k"]]:
    """Finds tau, and forgets what lies below it or has no room.

    Args:
      support: The last one.
      selected: Scores of the selected keys, -inf where there is none.
      kept: Scores of dropped keys for which there is room.
      lost: Scores of others, which are smaller.
      exceeds: Whether the pool holds more than k keys.

    Returns:
      The new support, and the gates of the selected keys.
    """
    # Measured from the worst selected score, all that matters lies within one of zero, and scores
    # with an offset lose no digit.
    pivot = jnp.min(selected, axis=-1, keepdims=True)
    pivot = jnp.where(jnp.isneginf(pivot), 0.0, pivot)
    selected, near, far = (x - pivot for x in (selected, kept, lost))
    offset = _threshold(selected, jnp.concatenate([near, far], axis=-1))
    # The exact tau only rises; it might seem to fall when scores have been lost.
    offset = jnp.maximum(offset[..., None], support.tau[..., None] - pivot)
    excess = jnp.maximum(far - offset, 0.0)
    updated = Support(
        score=jnp.where(near > offset, kept, -jnp.inf),
        tau=jnp.where(exceeds, (pivot + offset)[..., 0], -jnp.inf),
        num_lost=support.num_lost + jnp.sum(excess > 0, axis=-1, dtype=jnp.int32),
        lost_mass=support.lost_mass + jnp.sum(excess, axis=-1),
    )
    gate = jnp.where(exceeds[..., None], jnp.clip(selected - offset, 0.0, 1.0), 1.0)
    return updated, gate


def _threshold(
    selected: Float32[Array, "B S k"], others: Float32[Array, "B S n"]
) -> Float32[Array, "B S"]:
    """The tau of sparsek(selected and others, k), to float32's rounding of numbers near one.

    Args:
      selected: The k largest scores, the smallest of which is zero.
      others: All other scores, at most zero.
    """
    y = jnp.concatenate([selected, others], axis=-1)
    is_selected = np.arange(y.shape[-1]) < selected.shape[-1]

    def excess(tau):
        # The sum of all gates less k: with one taken from each selected gate, every term is small,
        # and zero if it has no part in where tau lies.
        gates = jnp.clip(y[..., None, :] - tau[..., None], 0.0, 1.0)
        return jnp.sum(gates - is_selected, axis=-1)

    # At -1 all selected gates are 1, at zero all others are 0: tau lies between.
    low = jnp.full_like(y[..., 0], -1.0)
    for i in range(1, _ROUNDS + 1):
        width = float(_SECTIONS) ** -i
        grid = low[..., None] + width * np.arange(_SECTIONS, dtype=np.float32)
        reached = jnp.sum(excess(grid) >= 0, axis=-1)
        low = low + width * jnp.maximum(reached - 1, 0)
    distance = y - low[..., None]
    slope = jnp.sum((distance > 0) & (distance <= 1), axis=-1)
    return low + excess(low[..., None])[..., 0] / jnp.maximum(slope, 1)


def _finite_or_nan(scores):
    # One that is not finite has no finite threshold: as loud as a NaN. Code that orders scores and
    # code that stores them must see the same bits.
    scores = scores.astype(jnp.float32)
    return computed_once(jnp.where(jnp.isfinite(scores), scores, jnp.nan))


def _rank(score):
    """Scores to order by: a NaN comes first and is never dropped, so that it stays loud."""
    return jnp.where(jnp.isnan(score), jnp.inf, score)


def _where(rows, x, y):
    """`jnp.where` with a condition on the leading axes."""
    return jnp.where(rows.reshape(rows.shape + (1,) * (y.ndim - rows.ndim)), x, y)


def _for_heads(table, index):
    """Repeats `[B, 1 or heads, ...]` for every head of a table `[B, heads, ...]`."""
    return jnp.broadcast_to(index, (*table.shape[:2], *index.shape[2:]))


def _per_head(function):
    # Batching dimensions of a gather or scatter may be sharded; those of a flat index may not.
    return jax.vmap(jax.vmap(function))


_rows = _per_head(lambda x, index: x.at[index].get(mode="promise_in_bounds"))
_rows_or_zero = _per_head(lambda x, index: x.at[index].get(mode="fill", fill_value=0))
_set_rows = _per_head(lambda x, index, rows: x.at[index].set(rows, mode="drop"))
