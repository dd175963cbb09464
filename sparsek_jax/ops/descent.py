"""Thresholds of all prefixes of a row at once, by walking one tree of sorted scores.

The gates of a pool sum up to f(x) = sum of clip(u - x, 0, 1), and f(tau) = k. As
clip(u - x, 0, 1) = relu(u - x) - relu(u - 1 - x), let every key contribute the breakpoint u with
weight +1 and the breakpoint u - 1 with weight -1. Then f(x) is the sum of weight * (b - x) over the
breakpoints b > x: piecewise linear and falling.

All breakpoints are sorted, documents one after the other. A node of the tree is a range of ranks,
its children cut it into eighths, and it holds its breakpoints in order of position. A query goes
from the root to the piece of f on which it crosses k, by sums over "the first so many breakpoints
of a node" x "the first so many of its children". Sums are stored for every fourth breakpoint; those
in between are added on the spot.

Sums are integers in fixed point, so differences of prefix sums are exact and no query depends on
another one's rounding.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int32

from sparsek_jax.ops.indexing import gather, rows_of, scatter

_DIGIT_BITS = 3  # of a rank, that a level of the tree decides
_CHILDREN = np.arange(1, 1 << _DIGIT_BITS, dtype=np.int32)  # all but the first
_STRIDE_BITS = 2  # 4 breakpoints between stored sums; fewer than a node has

# What is summed over breakpoints, on the first axis of `columns`: keys they open, keys they close,
# and their weighted values in fixed point, as high and low parts.
_OPENED, _CLOSED, _HIGH, _LOW = range(4)


def fixed_point(u: Float[Array, "*n"], bits: int) -> tuple[Int32[Array, "*n"], Int32[Array, "*n"]]:
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


class _Level(NamedTuple):
    """One level of the trees of all rows, breakpoints in order of (node, position).

    A child is 2^shift ranks wide, a node has 2^_DIGIT_BITS of them.
    """

    shift: int
    digit: Int32[Array, "R n"]  # the child that a breakpoint is in
    values: Int32[Array, "columns R n"]
    # Of blocks of 2^_STRIDE_BITS breakpoints and those before: of the children before child 1, 2,
    # ..., the last.
    sums: Int32[Array, "columns children R blocks"]

    def before(self, columns, row, base, count, child):
        """Sums over the first `count` breakpoints of nodes, in children before `child`.

        Args:
          columns: Which.
          row: Of the query.
          base: First rank of the node.
          count: How many of its breakpoints, in order of position.
          child: 1 to the last.

        Returns:
          A list, by column.
        """
        end = base + count
        block, first_block = end >> _STRIDE_BITS, base >> _STRIDE_BITS
        totals = []
        for column in columns:
            total = self._stored(column, child, row, block)
            totals.append(total - self._stored(column, child, row, first_block))
        for i in range((1 << _STRIDE_BITS) - 1):
            at = (block << _STRIDE_BITS) + i
            inside = at < end
            at = jnp.where(inside, at, 0)
            counts = inside & (gather(self.digit, row, at) < child)
            for n, column in enumerate(columns):
                totals[n] += jnp.where(counts, gather(self.values, column, row, at), 0)
        return totals

    def _stored(self, column, child, row, block):
        stored = gather(self.sums, column, child - 1, row, jnp.maximum(block - 1, 0))
        return jnp.where(block > 0, stored, 0)


def _make_level(ranks, by_rank, shift: int) -> _Level:
    digit = (ranks >> shift) & ((1 << _DIGIT_BITS) - 1)
    column = np.arange(4, dtype=np.int32)[:, None, None]
    values = gather(by_rank, column, rows_of(ranks), ranks)
    child = _CHILDREN[:, None, None]
    blocks = jnp.zeros((), jnp.int32)
    for i in range(1 << _STRIDE_BITS):
        every = slice(i, None, 1 << _STRIDE_BITS)
        blocks += jnp.where(digit[:, every] < child, values[:, None, :, every], 0)
    return _Level(shift, digit, values, jnp.cumsum(blocks, axis=3))


def _partition(level: _Level, ranks):
    """Ranks in order of (child, position)."""
    row = rows_of(ranks)
    width = level.shift + _DIGIT_BITS
    base = ranks >> width << width
    count = jnp.arange(ranks.shape[1], dtype=jnp.int32) - base
    last = len(_CHILDREN)

    def before(child):
        columns = level.before((_OPENED, _CLOSED), row, base, count, jnp.clip(child, 1, last))
        return jnp.where(child == 0, 0, jnp.where(child > last, count, sum(columns)))

    child_base = ranks >> level.shift << level.shift
    target = child_base + before(level.digit + 1) - before(level.digit)
    return scatter(jnp.zeros_like(ranks), (row, target), ranks)


def thresholds_of_prefixes(
    u: Float[Array, "R M"],
    start: Int32[Array, "R M"],
    end: Int32[Array, "R M"],
    num_selected: int,
    *,
    packed: bool,
) -> tuple[Float[Array, "R M"], Int32[Array, "R M"]]:
    """For every key, the threshold of the pool that it completes: the keys of its document so far.

    Args:
      u: Finite scores.
      start: Position of the first key of every key's document.
      end: Position after the document's last key.
      num_selected: k.
      packed: Whether there may be several documents in a row.

    Returns:
      tau, meaningless where the pool holds no more than k keys, and the position of the k-th key in
      the order (score descending, index ascending), meaningless where it holds fewer.
    """
    num_rows, length = u.shape
    if odd := length % 2:
        # An even number of keys fills whole blocks.
        u = jnp.pad(u, ((0, 0), (0, 1)))
        start, end = (
            jnp.pad(x, ((0, 0), (0, 1)), constant_values=length + i)
            for i, x in enumerate((start, end))
        )
    size = 2 * u.shape[1]
    depth = -(-max((size - 1).bit_length(), 1) // _DIGIT_BITS)
    # `length` numbers below 2^bits add up within an int32. All integer arithmetic here is modulo
    # 2^32; only f - k, which fits, is ever read as a number.
    bits = min(15, 31 - max(length - 1, 1).bit_length())
    k = min(num_selected, length - 1)

    breakpoints = jnp.stack([u, u - 1.0], -1).reshape(num_rows, size)
    ids = jnp.broadcast_to(jnp.arange(size, dtype=jnp.int32), breakpoints.shape)
    row = rows_of(u)
    # Stable, so ties stay in order of position.
    keys = (-breakpoints,)
    if packed or odd:
        keys = (jnp.repeat(start, 2, axis=1), *keys)
    *_, order = jax.lax.sort((*keys, ids), num_keys=len(keys), is_stable=True)
    ranks = scatter(jnp.zeros_like(order), (row, order), ids)
    weight = 1 - 2 * (order & 1)
    high, low = fixed_point(gather(u, row, order >> 1), bits)
    high -= (order & 1) << bits
    by_rank = jnp.stack([weight == 1, weight == -1, weight * high, weight * low])

    # Two walks: one to the piece of f, one to the k-th key.
    is_tau = np.array([True, False])[:, None, None]
    first, stop = 2 * start, 2 * end
    # The breakpoints of earlier documents come first in every sum; each key's add up to one.
    base = jnp.zeros((2, num_rows, size // 2), jnp.int32)
    count = base + 2 * jnp.arange(1, size // 2 + 1, dtype=jnp.int32)
    sums = [base - start, base - start, base - (start << bits), base]

    def excess(sums, rank):
        """Fixed-point f - k at the breakpoint of a rank, from the sums over those before."""
        rank = jnp.minimum(rank, size - 1)
        signed_high, signed_low = (gather(by_rank, i, row, rank) for i in (_HIGH, _LOW))
        sign = 1 - 2 * gather(by_rank, _CLOSED, row, rank)
        slope = sums[_OPENED] - sums[_CLOSED]
        return (
            sums[_HIGH] - slope * sign * signed_high - (k << bits),
            sums[_LOW] - slope * sign * signed_low,
        )

    def exceeds_k(sums, rank):
        excess_high, excess_low = excess(sums, rank)
        carried = excess_high + (excess_low >> bits)
        exceeds = (carried > 0) | ((carried == 0) & (excess_low & ((1 << bits) - 1) != 0))
        return (rank > first) & ((rank >= stop) | exceeds)

    last = len(_CHILDREN)
    child = _CHILDREN[:, None, None, None]
    for i in reversed(range(depth)):
        level = _make_level(ranks, by_rank, _DIGIT_BITS * i)
        inside = level.before(range(4), row, base, count, child)
        before = [x + y for x, y in zip(sums, inside, strict=True)]
        edge = base + (child << level.shift)
        stays = jnp.where(is_tau, exceeds_k(before, edge), before[_OPENED] >= num_selected)
        goes = jnp.sum(~(stays | (edge >= size)), axis=0, dtype=jnp.int32)

        before = level.before(range(4), row, base, count, jnp.maximum(goes, 1))
        before = [jnp.where(goes > 0, x, 0) for x in before]
        after = sum(level.before(range(2), row, base, count, jnp.minimum(goes + 1, last)))
        count = jnp.where(goes < last, after, count) - before[_OPENED] - before[_CLOSED]
        sums = [x + y for x, y in zip(sums, before, strict=True)]
        base += goes << level.shift
        if i:
            ranks = _partition(level, ranks)

    # f is at most k at the breakpoint of this rank, and linear from it to the next, where it
    # exceeds k. At a corner of f, and at the lower end of a flat piece, tau is the breakpoint.
    rank = base[0]
    sums = [x[0] for x in sums]
    excess_high, excess_low = (x.astype(jnp.float32) for x in excess(sums, rank))
    missing = -(excess_high * 2.0**-bits + excess_low * 4.0**-bits)
    slope = sums[_OPENED] - sums[_CLOSED] + jnp.where(count[0] > 0, gather(weight, row, rank), 0)
    tau = gather(breakpoints, row, gather(order, row, rank))
    tau -= missing / jnp.maximum(slope, 1).astype(jnp.float32)
    kth = gather(order, row, jnp.minimum(base[1], size - 1)) >> 1
    return tau[:, :length], kth[:, :length]
