"""Causal selection: which keys every query keeps, and how strongly, in O(T log T) time.

For query t the pool is the contiguous range of keys `document_start(t) <= j <= t - w`. Two numbers
per query describe its whole selection: the k-th key of the pool (the cutoff) and the threshold tau
of its SparseK projection. Both are questions about the sorted scores of a contiguous range, so all
queries find theirs at once by walking one tree of sorted scores (ops/descent.py).
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Int32

from sparsek_jax.ops.checks import check_array, check_int
from sparsek_jax.ops.descent import thresholds_of_prefixes
from sparsek_jax.ops.indexing import gather, rows_of, scatter
from sparsek_jax.ops.lifetimes import Lifetimes, chain_starts, chunk_lists, key_lifetimes
from sparsek_jax.ops.pruning import capacities, may_matter
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
        scores should not share a large offset. At the ends of float32 this does not hold: subnormal
        scores (about 1e-40) can be ordered as ties, and of scores so large that `u - 1` is not
        exact (from 2^24 on) a selected key can get any gate.
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
    return _select(scores, segment_ids, k, min(sliding_window, length), chunk_size)


# Tells a profile what is the selection's, of a program that does more.
SCOPE = "causal_selection"


class Search(NamedTuple):
    """How a room is searched.

    Attributes:
      thresholds: As `thresholds_of_prefixes`.
      chain_starts: As `lifetimes.chain_starts`.
    """

    thresholds: Callable[..., tuple[Array, Array]]
    chain_starts: Callable[[Array], Array] = chain_starts


_IN_FEW_LAUNCHES = Search(functools.partial(thresholds_of_prefixes, at_once=True, unroll=True))


class SelectionSettings(NamedTuple):
    """What of a selection is known when it is compiled.

    Attributes:
      num_selected: k, at most T.
      window: w, at most T.
      chunk_size: Queries per chunk.
      packed: Whether rows hold several documents.
      first_room: How to search where few keys remain.
      longest_first_room: The longest second room to begin with, for searches that take as long as
        there are keys, whatever the room; 0 for the first in any case.
    """

    num_selected: int
    window: int
    chunk_size: int
    packed: bool
    first_room: Search = _IN_FEW_LAUNCHES
    longest_first_room: int = 0


# Compiled as one, a call outside of any jit takes a fraction of what its operations would.
@functools.partial(jax.jit, static_argnums=(2, 3, 4))
def _select(scores, segment_ids, num_selected, sliding_window, chunk_size):
    documents = document_bounds(segment_ids, *scores.shape[:2])
    # Under `shard_map` documents may be split where scores are replicated.
    scores = varying_like(computed_once(scores.astype(jnp.float32)), *documents)
    packed = segment_ids is not None
    settings = SelectionSettings(num_selected, sliding_window, chunk_size, packed)
    return _differentiable_selection(settings, scores, documents)


def check_selection_arguments(
    scores: Any, num_selected: Any, sliding_window: Any, segment_ids: Any
) -> None:
    """Raises the errors of `causal_selection`."""
    check_array("scores", scores, jnp.floating)
    if scores.ndim != 3:
        raise ValueError(f"scores must have shape [B, T, K], got {scores.shape}")
    check_int("num_selected", num_selected, 1)
    check_int("sliding_window", sliding_window, 0)
    if segment_ids is not None:
        check_array("segment_ids", segment_ids, jnp.integer)
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


def find_selection(
    settings: SelectionSettings,
    scores: Float[Array, "B T K"],
    documents: tuple[Int32[Array, "B T"], Int32[Array, "B T"]],
    then: Callable[[Selection], Any],
) -> Any:
    """Finds a selection and goes on with it, without derivatives: those are `tau_gradient`'s.

    A GPU idles while its host waits to learn whether a first attempt sufficed, as it nearly always
    does, and launches what comes next. So it gets what it can before that.

    Args:
      settings: Of the selection.
      scores: Float32, computed once.
      documents: `document_bounds`.
      then: What else can be done before that; done again if the first attempt did not suffice. No
        kernel that takes long: during those the host gets ahead again.

    Returns:
      Of `then`.
    """
    batch, length, num_heads = scores.shape
    if scores.size == 0:
        none = jnp.zeros_like(scores, jnp.int32)
        lists = (batch, -(-length // settings.chunk_size), num_heads, settings.num_selected)
        lists = jnp.zeros(lists, jnp.int32)
        lifetimes = Lifetimes(none, none)
        return then(Selection(scores, none, scores, lifetimes, lists, settings.chunk_size))

    def unfold(x):
        return jnp.swapaxes(x.reshape(batch, -1, *x.shape[1:]), 1, 2)

    def finish(found):
        return then(Selection(*jax.tree.map(unfold, found), settings.chunk_size))

    return _search_in_rooms(settings, *_by_row(scores, documents), finish)


def _by_row(scores, documents):
    """A row a sequence and KV head."""
    batch, length, num_heads = scores.shape
    by_row = jnp.swapaxes(scores, 1, 2).reshape(batch * num_heads, length)
    return by_row, *(jnp.repeat(x, num_heads, axis=0) for x in documents)


def _search_in_rooms(settings, scores, start, end, then):
    """`then` of what `_search` finds, in the smallest room that every row's kept keys fit in.

    If they fit in none, among all keys.
    """
    with jax.named_scope(SCOPE):
        length = scores.shape[1]
        is_finite = jnp.isfinite(scores)
        finite = jnp.where(is_finite, scores, 0.0)
        rooms = capacities(settings.num_selected, length)
        if len(rooms) > 1 and rooms[1] <= settings.longest_first_room:
            rooms = rooms[1:]
        first_bad = _first_bad(settings, ~is_finite, start)
        if rooms:
            keep = jax.vmap(functools.partial(may_matter, num_selected=settings.num_selected))(
                finite, start
            )
            # Many read it; each would add up its last few keys anew.
            up_to = computed_once(jnp.cumsum(keep, axis=1, dtype=jnp.int32))

    def complete(search):
        with jax.named_scope(SCOPE):
            found = _complete(settings, scores, start, first_bad, *search())
        return then(found)

    if not rooms:
        return complete(lambda: _search(settings, finite, start, end))
    smallest, *larger = rooms

    def search_in(room, search, keep, up_to):
        return lambda: _search_kept(settings, room, search, finite, keep, up_to, start, end)

    with jax.named_scope(SCOPE):
        most = jnp.max(up_to[:, -1])
        # Keys that do not fit are cut off, to stay in bounds. What is found without them is not
        # used.
        fitting = keep & (up_to <= smallest), jnp.minimum(up_to, smallest)
    found = complete(search_in(smallest, settings.first_room, *fitting))

    def search_further(_):
        searches = [lambda: _search(settings, finite, start, end)]
        for room in reversed(larger):
            thresholds = functools.partial(thresholds_of_prefixes, at_once=room == larger[0])
            searches.append(search_in(room, Search(thresholds), keep, up_to))
        chosen = jnp.sum(most <= np.array(larger, np.int32), dtype=jnp.int32)
        return varying_like(jnp.bool_(False), most), complete(
            lambda: jax.lax.switch(chosen, searches)
        )

    # A loop that is not entered hands its state on as it is; a branch would copy it.
    state = most > smallest, found
    return jax.lax.while_loop(lambda state: state[0], search_further, state)[1]


def _first_bad(settings, is_bad, start):
    """Of every query's document, or of the row, the first key with a score that is not finite."""
    length = start.shape[1]
    bad = jnp.where(is_bad, jnp.arange(length, dtype=jnp.int32), length)
    if not settings.packed:
        return jnp.min(bad, axis=1, keepdims=True)
    return gather(jax.lax.cummin(bad, axis=1, reverse=True), rows_of(bad), start)


def _complete(settings, scores, start, first_bad, tau, kth, lifetimes, candidates):
    """The fields of `Selection`."""
    stop = _pool_end(settings.window, start)
    everything = stop - start <= settings.num_selected
    cutoff_index = jnp.where(everything, scores.shape[1], kth)
    poison = jnp.where(first_bad < stop, jnp.nan, 0.0)
    cutoff_score = jnp.where(everything, -jnp.inf, gather(scores, rows_of(scores), kth)) + poison
    tau = jnp.where(everything, -jnp.inf, tau) + poison
    return cutoff_score, cutoff_index, tau, lifetimes, candidates


def _pool_end(window, start):
    """Position after the last key of every query's pool, which begins at `start`."""
    return jnp.maximum(jnp.arange(start.shape[1], dtype=jnp.int32) - window + 1, start)


def _newest(settings, start):
    """Newest key of every query's pool; 0 if it has none."""
    return jnp.maximum(_pool_end(settings.window, start) - 1, 0)


def _search(settings, scores, start, end):
    """Finds tau and k-th key of every query whose pool exceeds k, and all keys' lifetimes."""
    tau, kth, until, slot = _at_entries(
        settings, Search(thresholds_of_prefixes), scores, start, end
    )
    row, newest = rows_of(scores), _newest(settings, start)
    until = jnp.where(until == end, end, jnp.minimum(until + settings.window, end))
    keys = jnp.broadcast_to(jnp.arange(scores.shape[1], dtype=jnp.int32), scores.shape)
    lifetimes = Lifetimes(until, slot)
    lists = _lists(settings, keys, lifetimes, scores.shape[1])
    return gather(tau, row, newest), gather(kth, row, newest), lifetimes, lists


def _search_kept(settings, room, search, scores, keep, up_to, start, end):
    """`_search` among the keys marked `keep`; `up_to` counts them, at most `room` in all."""
    num_rows, length = scores.shape
    row = rows_of(scores)
    ids = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), scores.shape)
    num_kept = up_to[:, -1:]
    position = jax.lax.empty((num_rows, room), jnp.int32)
    position = scatter(position, (row, up_to - 1), ids, where=keep)
    # What is left of the room are empty documents that nobody asks for, as it takes time to find a
    # threshold where there is one.
    slots = jnp.arange(room, dtype=jnp.int32)
    is_free = slots >= num_kept
    position = jnp.where(is_free, length - 1, position)
    if settings.packed:
        ends = gather(up_to, row, gather(end, row, position) - 1)
        starts = gather(start, row, position)
        starts = gather(up_to, row, starts) - gather(keep, row, starts)
    else:
        starts, ends = jnp.int32(0), num_kept
    starts = jnp.where(is_free, slots, starts)
    ends = jnp.where(is_free, slots, ends)

    # Behind all others when sorted, as their documents come last.
    kept_scores = jnp.where(is_free, jnp.finfo(scores.dtype).min, gather(scores, row, position))

    # Thresholds change only where a kept key enters, so these are all there are.
    tau, kth, until, slot = _at_entries(settings, search, kept_scores, starts, ends)
    entry = gather(position, row, jnp.minimum(until, room - 1)) + settings.window
    entry = jnp.where(until == ends, length, entry)
    of_kept = jnp.where(is_free, 0, jnp.minimum(entry, gather(end, row, position)))
    of_kept = Lifetimes(of_kept, slot)
    # All others are dropped when they would enter the pool.
    place = jnp.maximum(up_to - 1, 0)
    until = jnp.where(keep, gather(entry, row, place), ids + settings.window)
    slot = jnp.where(keep, gather(slot, row, place), 0)
    lifetimes = Lifetimes(jnp.minimum(until, end), slot)
    lists = _lists(settings, position, of_kept, length)
    newest = gather(place, row, _newest(settings, start))
    kth = gather(position, row, gather(kth, row, newest))
    return gather(tau, row, newest), kth, lifetimes, lists


def _lists(settings, keys, lifetimes, length):
    return chunk_lists(
        keys,
        lifetimes,
        length=length,
        num_selected=settings.num_selected,
        window=settings.window,
        chunk_size=settings.chunk_size,
        packed=settings.packed,
    )


def _at_entries(settings, search, scores, start, end):
    """For every key that enters a pool: tau and k-th key then; the key's lifetime."""
    num_selected = settings.num_selected
    tau, kth = search.thresholds(scores, start, end, num_selected, packed=settings.packed)
    entered = jnp.arange(scores.shape[1], dtype=jnp.int32) - start
    tau = jnp.where(entered >= num_selected, tau, -jnp.inf)
    # Exact thresholds rise already. The maximum removes the last bit's noise, so that the queries
    # for which a key is interior are one interval to the bit.
    if settings.packed:
        tau = jax.vmap(functools.partial(_running, jnp.maximum))(tau, start)
    else:
        tau = jax.lax.cummax(tau, axis=1)
    lifetimes = key_lifetimes(
        kth, start, end, num_selected=num_selected, chain_starts=search.chain_starts
    )
    return tau, kth, *lifetimes


def _running(
    operation: Callable[[Array, Array], Array], x: Float[Array, " T"], start: Int32[Array, " T"]
) -> Float[Array, " T"]:
    """Accumulates x by `operation` over the document so far; documents do not touch each other."""

    def combine(left, right):
        (left_start, left_x), (right_start, right_x) = left, right
        joined = jnp.where(left_start == right_start, operation(left_x, right_x), right_x)
        return right_start, joined

    return jax.lax.associative_scan(combine, (start, x))[1]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _differentiable_selection(settings, scores, documents):
    return find_selection(settings, scores, documents, lambda selection: selection)


def _fwd(settings, scores, documents):
    selection = _differentiable_selection(settings, scores, documents)
    return selection, (scores, selection.tau, documents)


def _bwd(settings, residuals, cotangents):
    return tau_gradient(settings.window, *residuals, cotangents.tau), None


_differentiable_selection.defvjp(_fwd, _bwd)


def tau_gradient(
    window: int,
    scores: Float[Array, "B T K"],
    tau: Float[Array, "B T K"],
    documents: tuple[Int32[Array, "B T"], Int32[Array, "B T"]],
    d_tau: Float[Array, "B T K"],
) -> Float[Array, "B T K"]:
    """The gradient of scores from that of `Selection.tau`.

    tau_t = (sum of interior scores + const) / n_t, so each interior key gets d_tau_t / n_t. A key
    is interior during one interval of queries: its sum is a difference of prefix sums, which begin
    anew with every document so that none feels another one's rounding or NaN.

    Args:
      window: w.
      scores: Float32.
      tau: Of these scores.
      documents: `document_bounds`.
      d_tau: Cotangent of tau.
    """
    if scores.size == 0:
        return jnp.zeros_like(scores)
    batch, _, num_heads = scores.shape
    by_row, *documents = _by_row(scores, documents)
    others = (jnp.swapaxes(x, 1, 2).reshape(by_row.shape) for x in (tau, d_tau))
    gradient = jax.vmap(functools.partial(_row_s_tau_gradient, window))
    d_scores = gradient(by_row, *others, *documents)
    return jnp.swapaxes(d_scores.reshape(batch, num_heads, -1), 1, 2)


def _row_s_tau_gradient(window, scores, tau, d_tau, start, end):
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
    share = jnp.where(num_interior > 0, d_tau / jnp.maximum(num_interior, 1), 0.0)
    running = _running(jnp.add, share, start)

    def before(query):
        """Sum over the queries of the key's document before this one."""
        return jnp.where(query > start, running[query - 1], 0.0)

    gradient = before(dropped) - before(unsaturated)
    return jnp.where(dropped > unsaturated, gradient, 0.0)
