"""Causal selection: which keys every query keeps, and how strongly, in O(T log T) time.

For query t the pool is the contiguous range of keys `document_start(t) <= j <= t - w`. Two numbers
per query describe its whole selection: the k-th key of the pool (the cutoff) and the threshold tau
of its SparseK projection. Both are questions about the sorted scores of a contiguous range, so all
queries find theirs at once by walking one sorted tree, a wavelet matrix:

  * clip(u - x, 0, 1) = relu(u - x) - relu(u - 1 - x). Let every key contribute the breakpoint u
    with weight +1 and the breakpoint u - 1 with weight -1. Then the sum over the
    pool of clip(u - x, 0, 1) is f(x) = sum of weight * (b - x) over the breakpoints b > x:
    piecewise linear, falling, with f(tau) = k.
  * Sort all breakpoints. The wavelet matrix stores the sorted ranks in order of position and splits
    them bit by bit, so that count and sum over "range of positions" x "larger half of a node" are
    differences of prefix sums.
  * Every query descends one bit a level, towards the piece of f on which it crosses k, and solves
    that piece.

Sums are integers in fixed point, so differences of prefix sums are exact and no query depends on
another one's rounding.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Int32

from sparsek_jax.ops.lifetimes import Lifetimes, chunk_lists, key_lifetimes
from sparsek_jax.ops.pruning import capacity, may_matter
from sparsek_jax.ops.tracing import computed_once, varying_like


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["cutoff_score", "cutoff_index", "tau", "lifetimes", "candidates"],
    meta_fields=["chunk_size"],
)
@dataclasses.dataclass(frozen=True)
class Selection:
    """Every query's selection.

    Key j of the pool of query t is selected if it comes no later than the cutoff in the order
    (score descending, index ascending); its gate is `clip(scores[j] - tau[t], 0, 1)`.

    Attributes:
      cutoff_score: Score of the k-th key of the pool; -inf while the pool holds no more than k
        keys.
      cutoff_index: Position of that key; T while the pool holds no more than k keys.
      tau: Threshold of the SparseK projection of the pool's scores; -inf while the pool holds no
        more than k keys.
      lifetimes: For every key the first query that does not attend to it any more (`until`), and
        its place in the lists (`slot`).
      candidates: For the first query of every chunk, the positions of its selected keys, each at
        its slot, -1 where there is none. The list has min(k, T) entries. Within a chunk, any query
        of the same document selects from these and from the keys that entered the pool after the
        chunk's first query.
      chunk_size: Queries per chunk.
    """

    cutoff_score: Float[Array, "B T K"]
    cutoff_index: Int32[Array, "B T K"]
    tau: Float[Array, "B T K"]
    lifetimes: Lifetimes
    candidates: Int32[Array, "B chunks K k"]
    chunk_size: int


def causal_selection(
    scores: Float[Array, "B T K"],
    *,
    num_selected: int,
    sliding_window: int = 0,
    segment_ids: Int[Array, "B T"] | None = None,
) -> Selection:
    """Finds the selection of every query exactly: arXiv 2406.16747, causal, with a window.

    Whoever compares scores with the cutoffs, in a jit that also computes the scores, should pass
    both this function and the comparison `jax.lax.optimization_barrier(scores)`: XLA may otherwise
    compute the scores twice, with two roundings.

    Differentiable: `tau` carries the gradient of the projection to `scores`, as sums over each
    key's interval of interior queries. The cutoffs and candidates are discrete and carry none.
    Time O(T log T), memory O(T), no scan over tokens.

    Args:
      scores: Importance of every key, one per KV head, computed in float32. Sums are held in fixed
        point with a resolution of 2^-30 for T <= 65,536, coarser by four for every doubling beyond
        that. `tau` is rounded to float32, so gates are off by up to 6e-8 times its magnitude:
        scores should not share a large offset.
      num_selected: k, how many keys a query keeps.
      sliding_window: w, the newest w keys (the query's own included) are not in the pool. 0: the
        pool ends at the query.
      segment_ids: Optional ids of packed documents. A document is a maximal run of equal ids; pools
        restart with it.

    Returns:
      The `Selection`. A query whose pool contains a NaN or infinite score has NaN thresholds.

    Raises:
      TypeError: An array has the wrong dtype, or `num_selected` or `sliding_window` is not an int.
      ValueError: A shape or a value does not fit.
    """
    check_selection_arguments(scores, num_selected, sliding_window, segment_ids)
    length = scores.shape[1]
    k = min(num_selected, length)
    chunk_size = default_chunk_size(k, length)
    return select(scores, segment_ids, k, min(sliding_window, length), chunk_size)


# Compiled as one, a call outside of any jit takes a fraction of what its operations would.
@functools.partial(jax.jit, static_argnums=(2, 3, 4))
def select(
    scores: Float[Array, "B T K"],
    segment_ids: Int[Array, "B T"] | None,
    num_selected: int,
    sliding_window: int,
    chunk_size: int,
) -> Selection:
    """`causal_selection` of checked arguments, k and w at most T, with lists every `chunk_size`."""
    batch, length, _ = scores.shape
    start, end = document_bounds(segment_ids, batch, length)
    if length == 0:
        none = jnp.zeros_like(scores, jnp.int32)
        lists = jnp.zeros((batch, 0, scores.shape[2], 0), jnp.int32)
        return Selection(scores, none, scores, Lifetimes(none, none), lists, chunk_size)
    # Under `shard_map` documents may be split where scores are replicated.
    scores = varying_like(computed_once(scores.astype(jnp.float32)), start)
    documents = (start, end)
    *thresholds, kth = _thresholds(
        num_selected, sliding_window, jnp.swapaxes(scores, 1, 2), documents
    )

    def lives(kth, start, end):
        lifetimes = key_lifetimes(kth, start, end, num_selected=num_selected, window=sliding_window)
        candidates = chunk_lists(
            lifetimes, num_selected=num_selected, window=sliding_window, chunk_size=chunk_size
        )
        return lifetimes, candidates

    selection = (*thresholds, *_by_row(lives, (kth,), documents))
    return Selection(*jax.tree.map(lambda x: jnp.swapaxes(x, 1, 2), selection), chunk_size)


def check_selection_arguments(
    scores: Any, num_selected: Any, sliding_window: Any, segment_ids: Any
) -> None:
    """Raises the errors of `causal_selection`."""
    if jnp.ndim(scores) != 3:
        raise ValueError(f"scores must have shape [B, T, K], got {jnp.shape(scores)}")
    if not jnp.issubdtype(scores.dtype, jnp.floating):
        raise TypeError(f"scores must be a floating-point array, got dtype {scores.dtype}")
    for name, value, least in (
        ("num_selected", num_selected, 1),
        ("sliding_window", sliding_window, 0),
    ):
        if not isinstance(value, int) or isinstance(value, bool):
            raise TypeError(f"{name} must be an int, got {value!r}")
        if value < least:
            raise ValueError(f"{name}={value} must be at least {least}")
    if segment_ids is not None:
        if not jnp.issubdtype(segment_ids.dtype, jnp.integer):
            raise TypeError(f"segment_ids must be an integer array, got dtype {segment_ids.dtype}")
        if segment_ids.shape != scores.shape[:2]:
            raise ValueError(
                f"segment_ids must have shape [B, T] = {scores.shape[:2]}, got {segment_ids.shape}"
            )
        # JAX would wrap larger ids, so that documents might coincide.
        limits = np.iinfo(np.int32)
        if isinstance(segment_ids, np.ndarray) and not jax.config.jax_enable_x64:
            for id_ in (segment_ids.min(initial=0), segment_ids.max(initial=0)):
                if not limits.min <= id_ <= limits.max:
                    raise ValueError(f"segment_ids holds {id_}, expected ids that fit in int32")


def default_chunk_size(num_selected: int, length: int) -> int:
    """Queries per chunk: about half of k, so that a chunk's slab and list are of like size."""
    size = min(max(1 << (num_selected - 1).bit_length() >> 1, 64), 512)
    return min(size, 1 << max(length - 1, 0).bit_length())


def document_bounds(
    segment_ids: Int[Array, "B T"] | None, batch: int, length: int
) -> tuple[Int32[Array, "B T"], Int32[Array, "B T"]]:
    """First position of every position's document, and the position after its last."""
    position = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), (batch, length))
    if segment_ids is None:
        return jnp.zeros_like(position), jnp.full_like(position, length)
    edge = segment_ids[:, 1:] != segment_ids[:, :-1]
    first = jnp.pad(edge, ((0, 0), (1, 0)), constant_values=True)
    last = jnp.pad(edge, ((0, 0), (0, 1)), constant_values=True)
    start = jax.lax.cummax(jnp.where(first, position, 0), axis=1)
    end = jax.lax.cummin(jnp.where(last, position + 1, length), axis=1, reverse=True)
    return start, end


def first_query(
    begin: Int32[Array, "*shape"],
    end: Int32[Array, "*shape"],
    reached: Callable[[Int32[Array, "*shape"]], Bool[Array, "*shape"]],
    *,
    length: int,
) -> Int32[Array, "*shape"]:
    """First query in [begin, end) from which `reached` holds; `end` if there is none.

    Args:
      begin: First candidates.
      end: Bounds, at most `length`.
      reached: Whether the condition holds at these queries, which may be `length`; once true in
        [begin, end), it stays true.
      length: Number of queries.
    """

    def halve(_, bracket):
        low, high = bracket
        middle = (low + high) // 2
        there = reached(middle)
        undecided = low < high
        return (
            jnp.where(undecided & ~there, middle + 1, low),
            jnp.where(undecided & there, middle, high),
        )

    return jax.lax.fori_loop(0, length.bit_length(), halve, (begin, end))[0]


def _by_row(function: Callable, rows: tuple, documents: tuple) -> Any:
    """Maps a function over the rows of arrays `[B, K, ...]`, which share documents `[B, T]`."""

    def of_sequence(rows, documents):
        return jax.vmap(lambda row: function(*row, *documents))(rows)

    return jax.vmap(of_sequence)(rows, documents)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _thresholds(num_selected, window, scores, documents):
    """Cutoff score and index, tau, and the k-th key of every pool of at least k, `[B, K, T]`."""
    length = scores.shape[2]
    finite = jnp.where(jnp.isfinite(scores), scores, 0.0)
    room = capacity(num_selected, length)
    search = functools.partial(
        _by_row, functools.partial(_search, num_selected, window), documents=documents
    )
    if room is None:
        found = search((finite,))
    else:
        keep = _by_row(lambda u, start, _: may_matter(u, start, num_selected), (finite,), documents)
        search_kept = functools.partial(
            _by_row,
            functools.partial(_search_kept, num_selected, window, room),
            documents=documents,
        )
        found = jax.lax.cond(
            jnp.all(jnp.sum(keep, axis=2) <= room),
            lambda: search_kept((finite, keep)),
            lambda: search((finite,)),
        )
    finish = functools.partial(_finish, num_selected, window)
    return _by_row(finish, (scores, *found), documents)


# One row: the scores of one sequence and one KV head.


def _pool_end(window, start):
    """Position after the last key of every query's pool, which begins at `start`."""
    return jnp.maximum(jnp.arange(len(start), dtype=jnp.int32) - window + 1, start)


def _search(num_selected, window, scores, start, end):
    """Finds tau of every query whose pool exceeds k, and the k-th key where the pool has one."""
    del end
    return _descend(scores, num_selected, start, _pool_end(window, start))


def _search_kept(num_selected, window, room, scores, keep, start, end):
    """`_search` among the keys marked `keep`, of which there are at most `room`."""
    del end
    (length,) = scores.shape
    before = jnp.pad(jnp.cumsum(keep, dtype=jnp.int32), (1, 0))
    position = jnp.zeros((room,), jnp.int32)
    target = jnp.where(keep, before[:length], room)
    position = position.at[target].set(jnp.arange(length, dtype=jnp.int32), mode="drop")
    # Thresholds change only where a kept key enters, so these are all there are.
    kept_end = jnp.arange(1, room + 1, dtype=jnp.int32)
    kept_start = jnp.minimum(before[start[position]], kept_end - 1)
    tau, kth = _descend(scores[position], num_selected, kept_start, kept_end)
    newest = jnp.maximum(before[_pool_end(window, start)] - 1, 0)
    return tau[newest], position[kth][newest]


def _finish(num_selected, window, scores, tau, kth, start, end):
    """Thresholds as `Selection` tells them, from those of `_search`."""
    del end
    length = scores.shape[0]
    stop = _pool_end(window, start)
    everything = stop - start <= num_selected
    cutoff_index = jnp.where(everything, length, kth)
    bad = jnp.pad(jnp.cumsum(~jnp.isfinite(scores), dtype=jnp.int32), (1, 0))
    poison = jnp.where(bad[stop] > bad[start], jnp.nan, 0.0)
    cutoff_score = jnp.where(everything, -jnp.inf, scores[kth]) + poison
    # Exact thresholds rise already. The maximum removes the last bit's noise, so that the queries
    # for which a key is interior are one interval to the bit.
    tau = _running(jnp.maximum, jnp.where(everything, -jnp.inf, tau) + poison, start)
    return cutoff_score, cutoff_index, tau, kth


def _running(
    operation: Callable[[Array, Array], Array], x: Float[Array, " T"], start: Int32[Array, " T"]
) -> Float[Array, " T"]:
    """Accumulates x by `operation` over the document so far; documents do not touch each other."""

    def combine(left, right):
        (left_start, left_x), (right_start, right_x) = left, right
        joined = jnp.where(left_start == right_start, operation(left_x, right_x), right_x)
        return right_start, joined

    return jax.lax.associative_scan(combine, (start, x))[1]


def _fixed_point(u: Float[Array, " T"], bits: int) -> tuple[Int32[Array, " T"], Int32[Array, " T"]]:
    """Writes u as `high * 2^-bits + low * 4^-bits`: 0 <= low < 2^bits, high modulo 2^32."""
    magnitude = jnp.fmod(jnp.abs(u), 2.0 ** (32 - bits)) * 2.0**bits
    whole = jnp.floor(magnitude)
    high = whole.astype(jnp.uint32).astype(jnp.int32)
    low = jnp.floor((magnitude - whole) * 2.0**bits).astype(jnp.int32)
    borrow = (low > 0).astype(jnp.int32)
    negative = u < 0
    return (
        jnp.where(negative, -high - borrow, high),
        jnp.where(negative, (borrow << bits) - low, low),
    )


def _descend(u, num_selected, start, stop):
    """Walks the wavelet matrix of the breakpoints for all queries at once.

    Args:
      u: Finite scores, `[T]`.
      num_selected: k.
      start: `[T]`: first key of every query's pool.
      stop: `[T]`: position after the last key of every query's pool.

    Returns:
      tau `[T]`, meaningless where the pool holds no more than k keys, and the position of the k-th
      key in the selection order `[T]`, meaningless where the pool holds fewer.
    """
    (length,) = u.shape
    size = 2 * length
    levels = (size - 1).bit_length()
    # `length` numbers below 2^bits add up within an int32. All integer arithmetic here is modulo
    # 2^32; only f - k, which fits, is ever read as a number.
    bits = min(15, 31 - max(length - 1, 1).bit_length())
    k = min(num_selected, length - 1)

    breakpoints = jnp.stack([u, u - 1.0], -1).reshape(size)
    order = jnp.argsort(breakpoints, descending=True, stable=True).astype(jnp.int32)
    high, low = _fixed_point(u, bits)
    high = jnp.stack([high, high - (1 << bits)], -1).reshape(size)[order]
    low = jnp.repeat(low, 2)[order]
    weight = 1 - 2 * (order % 2)
    ranks = jnp.arange(size, dtype=jnp.int32)
    ranks_by_position = jnp.zeros_like(order).at[order].set(ranks, unique_indices=True)

    def step(level, state):
        sequence, (t_begin, t_end, t_node, t_sums), (q_begin, q_end, q_node, q_left) = state
        bit = levels - 1 - level
        in_first_half = (sequence >> bit) & 1 == 0
        signed = jnp.where(in_first_half, weight[sequence], 0)
        columns = [
            in_first_half.astype(jnp.int32),
            signed,
            signed * high[sequence],
            signed * low[sequence],
        ]
        prefix = jnp.pad(jnp.cumsum(jnp.stack(columns, -1), axis=0), ((1, 0), (0, 0)))
        num_first = prefix[size, 0]

        def split(begin, end):
            at_begin, at_end = prefix[begin], prefix[end]
            first = (at_begin[:, 0], at_end[:, 0])
            second = (num_first + begin - first[0], num_first + end - first[1])
            return first, second, at_end - at_begin

        first, second, inside = split(t_begin, t_end)
        middle = t_node + (1 << bit)
        sums = t_sums + inside[:, 1:]
        go_first = (middle >= size) | exceeds_k(sums, middle)
        t_state = (
            jnp.where(go_first, first[0], second[0]),
            jnp.where(go_first, first[1], second[1]),
            jnp.where(go_first, t_node, middle),
            jnp.where(go_first[:, None], t_sums, sums),
        )

        first, second, inside = split(q_begin, q_end)
        keys_in_first = (inside[:, 0] + inside[:, 1]) // 2
        go_first = q_left < keys_in_first
        q_state = (
            jnp.where(go_first, first[0], second[0]),
            jnp.where(go_first, first[1], second[1]),
            jnp.where(go_first, q_node, q_node + (1 << bit)),
            jnp.where(go_first, q_left, q_left - keys_in_first),
        )

        before = prefix[:size, 0]
        target = jnp.where(in_first_half, before, num_first + ranks - before)
        sequence = jnp.zeros_like(sequence).at[target].set(sequence, unique_indices=True)
        return sequence, t_state, q_state

    def excess(sums, rank):
        """Fixed-point f - k at the breakpoint of a rank, from the sums over the ranks before."""
        count = sums[:, 0]
        return sums[:, 1] - count * high[rank] - (k << bits), sums[:, 2] - count * low[rank]

    def exceeds_k(sums, rank):
        excess_high, excess_low = excess(sums, jnp.minimum(rank, size - 1))
        carried = excess_high + (excess_low >> bits)
        return (carried > 0) | ((carried == 0) & (excess_low & ((1 << bits) - 1) != 0))

    begin, end, none = 2 * start, 2 * stop, jnp.zeros_like(start)
    state = (
        ranks_by_position,
        (begin, end, none, jnp.zeros((length, 3), jnp.int32)),
        (begin, end, none, jnp.full_like(start, num_selected - 1)),
    )
    state = jax.tree.map(lambda x: varying_like(x, u, start, stop), state)
    _, (t_begin, t_end, t_node, t_sums), (_, _, q_node, _) = jax.lax.fori_loop(
        0, levels, step, state
    )

    # f is at most k at the breakpoint of rank t_node, and linear from it to the next, where it
    # exceeds k. At a corner of f, and at the lower end of a flat piece, tau is the breakpoint.
    excess_high, excess_low = (x.astype(jnp.float32) for x in excess(t_sums, t_node))
    missing = -(excess_high * 2.0**-bits + excess_low * 4.0**-bits)
    count = t_sums[:, 0] + jnp.where(t_end > t_begin, weight[t_node], 0)
    tau = breakpoints[order[t_node]] - missing / jnp.maximum(count, 1).astype(jnp.float32)
    return tau, order[jnp.minimum(q_node, size - 1)] // 2


def _thresholds_fwd(num_selected, window, scores, documents):
    outputs = _thresholds(num_selected, window, scores, documents)
    return outputs, (scores, outputs[2], documents)


def _thresholds_bwd(num_selected, window, residuals, cotangents):
    del num_selected
    scores, tau, documents = residuals
    gradient = functools.partial(_tau_gradient, window)
    return _by_row(gradient, (scores, tau, cotangents[2]), documents), None


def _tau_gradient(window, scores, tau, g, start, end):
    """The gradient of one row's tau as prefix sums; `g` is its cotangent.

    tau_t = (sum of interior scores + const) / n_t, so each interior key gets g_t / n_t. A key is
    interior during one interval of queries: its sum is a difference of prefix sums, which begin
    anew with every document so that none feels another one's rounding or NaN.
    """
    (length,) = scores.shape
    enters = jnp.minimum(jnp.arange(length, dtype=jnp.int32) + window, end)
    enters, end = (varying_like(x, scores, enters) for x in (enters, end))

    def distance(query):
        return scores - tau[jnp.minimum(query, length - 1)]

    unsaturated = first_query(enters, end, lambda t: ~(distance(t) >= 1), length=length)
    dropped = first_query(unsaturated, end, lambda t: ~(distance(t) > 0), length=length)

    ones = jnp.ones_like(unsaturated)
    change = jnp.zeros((length + 1,), jnp.int32).at[unsaturated].add(ones).at[dropped].add(-ones)
    num_interior = jnp.cumsum(change)[:length]
    share = jnp.where(num_interior > 0, g / jnp.maximum(num_interior, 1), 0.0)
    running = _running(jnp.add, share, start)

    def before(query):
        """Sum over the queries of the key's document before this one."""
        return jnp.where(query > start, running[query - 1], 0.0)

    gradient = before(dropped) - before(unsaturated)
    return jnp.where(dropped > unsaturated, gradient, 0.0)


_thresholds.defvjp(_thresholds_fwd, _thresholds_bwd)
