"""The kernel that follows both thresholds of every row from key to key.

Going up from below through the breakpoints of all of a row's keys (ops/breakpoints.py), tau is
where f, over the pool alone, exceeds k no more, and the k-th key where fewer than k keys of the
pool are left above. Both only rise from one prefix to the next, so the next ones are found by going
on from where they were.

Rows are cut into chunks of keys, each followed by two warps of its own, one for either threshold,
from a place that is known beforehand (ops/mosaic_gpu/thresholds.py). A warp's lanes all do the
same: what takes time is waiting for memory, and thousands of warps wait at once.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Bool, Float, Int32

from sparsek_jax.ops.breakpoints import Sums, excess, is_positive
from sparsek_jax.ops.mosaic_gpu.launch import launch

_WARPS = 4  # of a block
_FAR = 256  # breakpoints of a key's walk, after which it looks where the next chunk begins


class WalkSettings(NamedTuple):
    """Of a call.

    Attributes:
      k: How many keys are selected, less than a row has.
      length: Keys of a row.
      chunk: Keys of a chunk.
      bits: Of fixed point.
    """

    k: int
    length: int
    chunk: int
    bits: int


class SortedRows(NamedTuple):
    """Keys of rows, in order and sorted, documents one after the other.

    Attributes:
      key: By rank, the key.
      u: By rank, its score.
      high: By rank, its score in fixed point.
      low: Likewise.
      rank: By key, how many of its row are sorted before it.
      key_high: By key, its score in fixed point.
      key_low: Likewise.
      start: By key, the first key of its document.
      end: By key, the one after the last of its document.
    """

    key: Int32[Array, "R M"]
    u: Float[Array, "R M"]
    high: Int32[Array, "R M"]
    low: Int32[Array, "R M"]
    rank: Int32[Array, "R M"]
    key_high: Int32[Array, "R M"]
    key_low: Int32[Array, "R M"]
    start: Int32[Array, "R M"]
    end: Int32[Array, "R M"]


class Place(NamedTuple):
    """On the way to tau: between the breakpoints above and those below.

    Attributes:
      opened: How many keys of the row open above.
      closed: How many close above, of the same or earlier ones.
      sums: Over those of the pool.
      below: The breakpoint next below: of the key of a rank, `2 * rank` where it opens, one more
        where it closes.
      high: Its value in fixed point.
      low: Likewise.
    """

    opened: Int32[Array, "*n"]
    closed: Int32[Array, "*n"]
    sums: Sums
    below: Int32[Array, "*n"]
    high: Int32[Array, "*n"]
    low: Int32[Array, "*n"]

    @property
    def depth(self) -> Int32[Array, "*n"]:
        """How many breakpoints of the row are above."""
        return self.opened + self.closed

    def is_below_tau(
        self, first: Int32[Array, "*n"], stop: Int32[Array, "*n"], k: int, bits: int
    ) -> Bool[Array, "*n"]:
        """Whether it is below tau of a document's pool; also if it is below the document."""
        exceeds = is_positive(*excess(self.sums, self.high, self.low, k, bits), bits)
        return (self.depth > 2 * first) & ((self.closed >= stop) | exceeds)


class KthPlace(NamedTuple):
    """On the way to the k-th key.

    Attributes:
      rank: How many keys of the row are above.
      num_above: How many of the pool.
    """

    rank: Int32[Array, "*n"]
    num_above: Int32[Array, "*n"]

    @property
    def depth(self) -> Int32[Array, "*n"]:
        """How many keys of the row are above."""
        return self.rank

    def is_below_kth(
        self, first: Int32[Array, "*n"], stop: Int32[Array, "*n"], k: int
    ) -> Bool[Array, "*n"]:
        """Whether it is below the k-th key of a document's pool; also if below the document."""
        return (self.rank > first) & ((self.rank >= stop) | (self.num_above >= k))


def walk(
    settings: WalkSettings, rows: SortedRows, to_tau: Place, to_kth: KthPlace
) -> tuple[Int32[Array, "R M"], Sums, Int32[Array, "R M"]]:
    """Follows the thresholds of the pools that keys complete: the keys of their document so far.

    Args:
      settings: Of the call.
      rows: The keys.
      to_tau: For every chunk, `[R, chunks]`, a place below tau of the pool of the keys before it;
        what of that pool is above.
      to_kth: Likewise, a place below the k-th key.

    Returns:
      For every key, `below` and `sums` of the place of tau, and the rank of the k-th key.
    """
    operands, treedef = jax.tree.flatten((rows, to_tau, to_kth))
    num_rows, num_chunks = to_kth.rank.shape

    # The kernel's name comes from this one, and benchmarks/attention.py knows it.
    def walks(*refs):
        inputs, outs = treedef.unflatten(refs[: len(operands)]), refs[len(operands) :]
        threshold, group, row = (lax.axis_index(x) for x in ("threshold", "group", "row"))

        def by_warp():
            chunk = group * _WARPS + lax.axis_index("warp")

            @pl.when((chunk < num_chunks) & (threshold == 0))
            def _():
                walk_to_tau(settings, inputs[0], inputs[1], row, chunk, outs[:-1])

            @pl.when((chunk < num_chunks) & (threshold == 1))
            def _():
                walk_to_kth(settings, inputs[0], inputs[2], row, chunk, outs[-1])

        pl.kernel(by_warp, mesh=plgpu.WarpMesh(axis_name="warp"))()

    below, *sums, kth = launch(
        walks,
        out_type=[jax.ShapeDtypeStruct(rows.rank.shape, jnp.int32)] * 5,
        # Rows last: only of these there may be more than 65,535.
        grid=(2, -(-num_chunks // _WARPS), num_rows),
        grid_names=("threshold", "group", "row"),
        operands=tuple(operands),
    )
    return below, Sums(*sums), kth


def _where(condition, x, y):
    return jax.tree.map(functools.partial(jnp.where, condition), x, y)


def _follow(settings, rows, begins, row, chunk, *, lowest, enter, is_below, rise, write):
    """Follows a threshold over a chunk.

    Args:
      settings: Of the call.
      rows: The keys.
      begins: Places where chunks begin.
      row: Which row.
      chunk: Which chunk.
      lowest: The place below a document that ends here, with an empty pool.
      enter: Adds a key to the pool of a place, or takes it off.
      is_below: Whether a place is below the threshold of a document's pool.
      rise: Goes up from a place as long as it is below, but not over more than `_FAR` breakpoints.
      write: Keeps the place of a key.
    """
    num_chunks = begins[0].shape[1]
    after = (chunk + 1) * settings.chunk

    def begin(chunk):
        return jax.tree.map(lambda x: x[row, chunk], begins)

    def ahead(place, key, first, stop):
        """Where the next chunk begins, if that is below the threshold too, and further up."""
        next_place = begin(jnp.minimum(chunk + 1, num_chunks - 1))
        goes_on = after < stop
        num_later = jnp.where(goes_on, after - key - 1, 0)
        next_place = lax.fori_loop(
            0, num_later, lambda i, place: enter(place, key + 1 + i, -1), next_place
        )
        is_further = goes_on & is_below(next_place, first, stop) & (next_place.depth < place.depth)
        return _where(is_further, next_place, place)

    def step(i, place):
        key = chunk * settings.chunk + i
        first, stop = rows.start[row, key], rows.end[row, key]
        place = enter(_where(key == first, lowest(stop), place), key, 1)

        def go_on(state):
            place, has_far_to_go = state
            place = lax.cond(has_far_to_go, lambda: ahead(place, key, first, stop), lambda: place)
            return rise(place, key, first, stop), jnp.bool_(True)

        place, _ = lax.while_loop(
            lambda state: is_below(state[0], first, stop), go_on, (place, jnp.bool_(False))
        )
        write(key, place)
        return place

    size = jnp.minimum(settings.chunk, settings.length - chunk * settings.chunk)
    lax.fori_loop(0, size, step, begin(chunk))


def walk_to_kth(settings, rows, begins, row, chunk, out):
    """Writes the rank of the k-th key of the pool that each key of a chunk completes."""

    def is_below(place, first, stop):
        return place.is_below_kth(first, stop, settings.k)

    def enter(place, key, weight):
        is_above = (rows.rank[row, key] < place.rank).astype(jnp.int32)
        return place._replace(num_above=place.num_above + weight * is_above)

    def rise(place, key, first, stop):
        lowest = place.depth - _FAR

        def goes_on(place):
            return (place.depth > lowest) & is_below(place, first, stop)

        def one_up(place):
            rank = place.rank - 1
            is_in_pool = (rows.key[row, rank] <= key).astype(jnp.int32)
            return KthPlace(rank, place.num_above - is_in_pool)

        return lax.while_loop(goes_on, one_up, place)

    def write(key, place):
        out[row, key] = place.rank

    _follow(
        settings,
        rows,
        begins,
        row,
        chunk,
        lowest=lambda stop: KthPlace(stop, jnp.int32(0)),
        enter=enter,
        is_below=is_below,
        rise=rise,
        write=write,
    )


class _SortedKey(NamedTuple):
    """Of the key of a rank: its score, itself, and its score in fixed point."""

    u: Float[Array, ""]
    key: Int32[Array, ""]
    high: Int32[Array, ""]
    low: Int32[Array, ""]


def walk_to_tau(settings, rows, begins, row, chunk, outs):
    """Writes, of every key of a chunk, `below` and `sums` of the place of its pool's tau."""
    one = 1 << settings.bits
    zero = jnp.int32(0)

    def is_below(place, first, stop):
        return place.is_below_tau(first, stop, settings.k, settings.bits)

    def enter(place, key, weight):
        rank, high, low = (x[row, key] for x in (rows.rank, rows.key_high, rows.key_low))
        opens = weight * (rank < place.opened).astype(jnp.int32)
        closes = weight * (rank < place.closed).astype(jnp.int32)
        sums = Sums(
            place.sums.slope + opens - closes,
            place.sums.high + opens * high - closes * (high - one),
            place.sums.low + (opens - closes) * low,
        )
        return place._replace(sums=sums)

    def sorted_key(rank):
        rank = jnp.maximum(rank, 0)
        return _SortedKey(*(x[row, rank] for x in (rows.u, rows.key, rows.high, rows.low)))

    def rise(place, key, first, stop):
        lowest = place.depth - _FAR

        def goes_on(state):
            place = state[0]
            return (place.depth > lowest) & is_below(place, first, stop)

        def one_up(state):
            place, opening, closing, beyond, closed_last = state
            opening = _where(closed_last, opening, beyond)
            closing = _where(closed_last, beyond, closing)
            # Of equal ones, what closes is below what opens.
            closes = (place.closed > first) & (closing.u - 1.0 <= opening.u)
            closes_int = closes.astype(jnp.int32)
            opened, closed = place.opened - (1 - closes_int), place.closed - closes_int
            rank = jnp.where(closes, closed, opened)
            _, other, high, low = _where(closes, closing, opening)
            high -= closes_int << settings.bits
            weight = jnp.where(other <= key, 1 - 2 * closes_int, 0)
            slope, sum_high, sum_low = place.sums
            sums = Sums(slope - weight, sum_high - weight * high, sum_low - weight * low)
            place = Place(opened, closed, sums, 2 * rank + closes_int, high, low)
            # Not used before the next step has begun, so that it does not wait for it.
            return place, opening, closing, sorted_key(rank - 1), closes

        opening, closing = (sorted_key(x - 1) for x in place[:2])
        state = place, opening, closing, closing, jnp.bool_(True)
        return lax.while_loop(goes_on, one_up, state)[0]

    def write(key, place):
        for ref, x in zip(outs, (place.below, *place.sums), strict=True):
            ref[row, key] = x

    _follow(
        settings,
        rows,
        begins,
        row,
        chunk,
        lowest=lambda stop: Place(stop, stop, Sums(zero, zero, zero), zero, zero, zero),
        enter=enter,
        is_below=is_below,
        rise=rise,
        write=write,
    )
