"""Thresholds of all prefixes of a row at once, by walking one tree of sorted scores.

All breakpoints (ops/breakpoints.py) are sorted, documents one after the other. A node of the tree
is a range of ranks, its children cut it into eighths, and it holds its breakpoints in order of
position. A query goes from the root to the piece of f on which it crosses k, by sums over "the
first so many breakpoints of a node" x "the first so many of its children". Sums are stored for
every fourth breakpoint; those in between are added on the spot.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int32

from sparsek_jax.ops.breakpoints import (
    Sums,
    excess,
    fixed_point,
    is_positive,
    resolution,
    tau_at,
)
from sparsek_jax.ops.indexing import gather, permute, rows_of
from sparsek_jax.ops.tracing import varying_like

_DIGIT_BITS = 3  # of a rank, that a level of the tree decides
_CHILDREN = np.arange(1, 1 << _DIGIT_BITS, dtype=np.int32)  # all but the first
_RUN_BITS = 2  # 4 breakpoints between stored sums, fewer than a node has
_FEW = 64  # nodes, or ranks of a node, that are all looked at to order a level by itself

# What is summed over breakpoints, on the first axis of `columns`: how many they are, how many keys
# they open (the others close one), and their weighted values in fixed point, as high and low parts.
_COUNT, _OPENED, _HIGH, _LOW = range(4)


class _Level(NamedTuple):
    """One level of the trees of all rows, breakpoints in order of (node, position).

    A child is 2^shift ranks wide, a node has 2^_DIGIT_BITS of them. A run is 2^_RUN_BITS
    breakpoints. Arrays may hold several levels.
    """

    index: Int32[Array, ""]  # of the level in the arrays
    shift: Int32[Array, ""]
    digit: Int32[Array, "levels R n"]  # the child that a breakpoint is in
    # Of every run, from the lowest bits: each breakpoint's digit, and whether it opens a key.
    words: Int32[Array, "levels R runs"]
    values: Int32[Array, "2 levels R n"]  # high and low
    # Over the runs of the row before this one: of those in the children before child 1, 2, ..., the
    # last, of any node.
    sums: Int32[Array, "columns children levels R runs"]

    def before(self, column, row, base, count, child):
        """Sum over the first `count` breakpoints of nodes, in children before `child`.

        Args:
          column: Which.
          row: Of the query.
          base: First rank of the node.
          count: How many of its breakpoints, in order of position.
          child: 1 to the last.
        """
        first_run, next_run = base >> _RUN_BITS, (base + count) >> _RUN_BITS
        sums = functools.partial(gather, self.sums, column, child - 1, self.index, row)
        total = sums(next_run) - sums(first_run)
        word = gather(self.words, self.index, row, next_run)
        for i in range((1 << _RUN_BITS) - 1):
            at = (next_run << _RUN_BITS) + i
            inside = at < base + count
            if column == _COUNT:
                value = 1
            elif column == _OPENED:
                value = word >> (_DIGIT_BITS + 1) * i + _DIGIT_BITS & 1
            else:
                at = jnp.where(inside, at, 0)
                value = gather(self.values, column - _HIGH, self.index, row, at)
            digit = word >> (_DIGIT_BITS + 1) * i & len(_CHILDREN)
            total += jnp.where(inside & (digit < child), value, 0)
        return total


def _make_levels(
    ranks: Int32[Array, "levels R n"], by_rank: Int32[Array, "columns R n"], shifts
) -> Callable[[int], _Level]:
    """Levels, by index, from the ranks in their order; `by_rank` are the columns."""
    digit = ranks >> shifts[:, None, None] & len(_CHILDREN)
    column = np.arange(4, dtype=np.int32)[:, None, None, None]
    values = gather(by_rank, column, rows_of(by_rank[0]), ranks)
    run = 1 << _RUN_BITS
    # A run more, as sums are of what comes before.
    num_runs = ranks.shape[2] // run + 1
    short = ((0, 0), (0, 0), (0, num_runs * run - ranks.shape[2]))
    digits, columns = jnp.pad(digit, short), jnp.pad(values, ((0, 0), *short))
    words = sum(
        (digits[..., i::run] | columns[_OPENED, ..., i::run] << _DIGIT_BITS)
        << (_DIGIT_BITS + 1) * i
        for i in range(run)
    )
    child = _CHILDREN[:, None, None, None]
    runs = sum(
        jnp.where(digits[..., i::run] < child, columns[:, None, ..., i::run], 0) for i in range(run)
    )
    runs = jnp.pad(runs[..., :-1], [(0, 0)] * 4 + [(1, 0)])
    sums = jnp.cumsum(runs, axis=4)
    return lambda i: _Level(i, jnp.asarray(shifts)[i], digit, words, values[_HIGH:], sums)


def _partition(level: _Level, ranks):
    """Ranks in order of (child, position), from those in order of (node, position)."""
    row = rows_of(ranks)
    width = level.shift + _DIGIT_BITS
    base = ranks >> width << width
    count = jnp.arange(ranks.shape[1], dtype=jnp.int32) - base
    digit = level.digit[level.index]
    last = len(_CHILDREN)

    def before(child):
        inside = level.before(_COUNT, row, base, count, jnp.clip(child, 1, last))
        return jnp.where(child == 0, 0, jnp.where(child > last, count, inside))

    child_base = ranks >> level.shift << level.shift
    return permute(ranks, child_base + before(digit + 1) - before(digit))


def _number_of(marks, axis: int):
    """How many of at most 127 are true, counted in bytes where XLA stores what is added up."""
    return jnp.sum(marks, axis=axis, dtype=jnp.int8).astype(jnp.int32)


def _in_order_of_nodes(ranks, order, shift: int):
    """Ranks in order of (node, position) from those in order of position, nodes 2^shift wide.

    Args:
      ranks: Of the breakpoints in order of position.
      order: The breakpoints in order of rank.
      shift: Either nodes or ranks of one are few.
    """
    num_rows, size = ranks.shape
    padding = ((0, 0), (0, -size % _FEW))
    if 1 << shift <= _FEW:
        # Every breakpoint's place is how many others of its node come before it.
        nodes = jnp.pad(order, padding, constant_values=size).reshape(num_rows, -1, 1 << shift)
        place = _number_of(nodes[..., None, :] < nodes[..., None], axis=-1)
        rank = jnp.arange(size, dtype=jnp.int32)
        target = (rank >> shift << shift) + place.reshape(num_rows, -1)[:, :size]
        return permute(jnp.broadcast_to(rank, order.shape), target)
    # Those of stretches before its own, and in that.
    node = ranks >> shift
    stretches = jnp.pad(node, padding, constant_values=-1).reshape(num_rows, -1, _FEW)
    num_nodes = (size - 1 >> shift) + 1
    counts = stretches[..., None] == np.arange(num_nodes, dtype=np.int32)
    counts = _number_of(counts, axis=2)
    before = jnp.cumsum(counts, axis=1) - counts
    earlier = np.tri(_FEW, k=-1, dtype=bool)
    place = (stretches[..., None, :] == stretches[..., None]) & earlier
    place = _number_of(place, axis=-1).reshape(num_rows, -1)[:, :size]
    stretch = np.arange(size, dtype=np.int32) // _FEW
    return permute(ranks, (node << shift) + gather(before, rows_of(node), stretch, node) + place)


class _Walk(NamedTuple):
    """Where queries are on their way to a rank."""

    base: Int32[Array, "R M"]  # first rank of the node
    count: Int32[Array, "R M"]  # how many of its breakpoints are in the pool


def _step(level: _Level, row, walk: _Walk, is_before, size: int):
    """One level further.

    Args:
      level: The level.
      row: Of the queries.
      walk: Where they are.
      is_before: Whether the rank that they go to lies before that of a child's first breakpoint;
        of the child's number, 1 to the last, on an axis in front.
      size: Number of ranks.

    Returns:
      Where they are then, and the number of the child, 0 to the last.
    """
    last = len(_CHILDREN)
    child = _CHILDREN[:, None, None]
    beyond = walk.base + (child << level.shift) >= size
    goes = jnp.sum(~(is_before(child) | beyond), axis=0, dtype=jnp.int32)

    def count_before(child):
        return level.before(_COUNT, row, *walk, child)

    start = jnp.where(goes > 0, count_before(jnp.maximum(goes, 1)), 0)
    end = jnp.where(goes < last, count_before(jnp.minimum(goes + 1, last)), walk.count)
    return _Walk(walk.base + (goes << level.shift), end - start), goes


def thresholds_of_prefixes(
    u: Float[Array, "R M"],
    start: Int32[Array, "R M"],
    end: Int32[Array, "R M"],
    num_selected: int,
    *,
    packed: bool,
    at_once: bool = False,
    unroll: bool = False,
) -> tuple[Float[Array, "R M"], Int32[Array, "R M"]]:
    """For every key, the threshold of the pool that it completes: the keys of its document so far.

    Args:
      u: Finite scores.
      start: Position of the first key of every key's document.
      end: Position after the document's last key.
      num_selected: k.
      packed: Whether to sort by document first. Without, scores must already fall from one document
        to the next.
      at_once: Whether to make all levels at once if they are few, which takes memory for each of
        them and spares a GPU launches.
      unroll: Whether to compile every level's step by itself, which takes a multiple of the time to
        compile and spares launches too.

    Returns:
      tau, meaningless where the pool holds no more than k keys, and the position of the k-th key in
      the order (score descending, index ascending), meaningless where it holds fewer.
    """
    num_rows, length = u.shape
    size = 2 * length
    depth = -(-max((size - 1).bit_length(), 1) // _DIGIT_BITS)
    k, bits = min(num_selected, length - 1), resolution(length)

    breakpoints = jnp.stack([u, u - 1.0], -1).reshape(num_rows, size)
    ids = jnp.broadcast_to(jnp.arange(size, dtype=jnp.int32), breakpoints.shape)
    row = rows_of(u)
    # Stable, so ties stay in order of position.
    keys = (-breakpoints,)
    if packed:
        keys = (jnp.repeat(start, 2, axis=1), *keys)
    *_, order = jax.lax.sort((*keys, ids), num_keys=len(keys), is_stable=True)
    ranks = permute(ids, order)
    closes = order & 1
    weight = 1 - 2 * closes
    high, low = fixed_point(gather(u, row, order >> 1), bits)
    high -= closes << bits
    by_rank = jnp.stack([jnp.ones_like(order), closes ^ 1, weight * high, weight * low])

    first, stop = 2 * start, 2 * end
    entered = jnp.broadcast_to(2 * jnp.arange(1, size // 2 + 1, dtype=jnp.int32), u.shape)
    to_tau = to_kth = _Walk(jnp.zeros_like(entered), entered)
    # The breakpoints of earlier documents come first in every sum; each key's add up to one.
    sums = [-2 * start, -start, -(start << bits), jnp.zeros_like(start)]
    sums = [jnp.broadcast_to(x, u.shape) for x in sums]
    opened = sums[_OPENED]

    def with_slope(sums):
        count, opened, *values = sums
        return Sums(2 * opened - count, *values)

    def descend(level, state):
        to_tau, sums, to_kth, opened = state

        def sums_before(child):
            return [x + level.before(c, row, *to_tau, child) for c, x in enumerate(sums)]

        def exceeds_k(child):
            rank = to_tau.base + (child << level.shift)
            at = jnp.minimum(rank, size - 1)
            value = gather(high, row, at), gather(low, row, at)
            excess_over_k = excess(with_slope(sums_before(child)), *value, k, bits)
            exceeds = is_positive(*excess_over_k, bits)
            return (rank > first) & ((rank >= stop) | exceeds)

        def holds_k(child):
            return opened + level.before(_OPENED, row, *to_kth, child) >= num_selected

        next_to_tau, goes = _step(level, row, to_tau, exceeds_k, size)
        before = sums_before(jnp.maximum(goes, 1))
        next_sums = [jnp.where(goes > 0, x, y) for x, y in zip(before, sums, strict=True)]
        next_to_kth, goes = _step(level, row, to_kth, holds_k, size)
        before = level.before(_OPENED, row, *to_kth, jnp.maximum(goes, 1))
        next_opened = opened + jnp.where(goes > 0, before, 0)
        return next_to_tau, next_sums, next_to_kth, next_opened

    shifts = np.arange(depth, dtype=np.int32)[::-1] * _DIGIT_BITS
    walks = (to_tau, sums, to_kth, opened)
    state = jax.tree.map(lambda x: varying_like(x, u, start, end), (ranks, walks))
    if at_once and 1 << int(shifts[0]) <= _FEW**2:
        ordered = [_in_order_of_nodes(ranks, order, int(x) + _DIGIT_BITS) for x in shifts[1:]]
        levels = _make_levels(jnp.stack([ranks, *ordered]), by_rank, shifts)

        def step(i, state):
            return state[0], descend(levels(i), state[1])
    else:

        def step(i, state):
            ranks, walks = state
            level = _make_levels(ranks[None], by_rank, jnp.asarray(shifts)[i][None])(0)
            return _partition(level, ranks), descend(level, walks)

    _, (to_tau, sums, to_kth, _) = jax.lax.fori_loop(0, depth, step, state, unroll=unroll)

    rank, inside = to_tau
    which = gather(order, row, rank)
    value = gather(high, row, rank), gather(low, row, rank)
    score = gather(u, row, which >> 1)
    tau = tau_at(score, which & 1, inside > 0, with_slope(sums), value, k, bits)
    kth = gather(order, row, jnp.minimum(to_kth.base, size - 1)) >> 1
    return tau, kth
