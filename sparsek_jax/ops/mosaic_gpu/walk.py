"""The kernel that follows both thresholds of every row from key to key.

Going up from below through the breakpoints of all of a row's keys (ops/breakpoints.py), tau is
where f, over the pool alone, exceeds k no more, and the k-th key where fewer than k keys of the
pool are left above. Both only rise from one prefix to the next, so the next ones are found by going
on from where they were.

Rows are cut into chunks of keys. Either threshold of each is followed on its own, from the nearest
of the edges (ops/mosaic_gpu/edges.py) that are below it where the chunk begins. A step takes the
time of some ten instructions that wait for each other, and thousands of walks wait at once.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Array, Bool, Float, Int32

from sparsek_jax.ops.breakpoints import Sums, excess, is_positive
from sparsek_jax.ops.mosaic_gpu.edges import Edges, WalkSettings
from sparsek_jax.ops.mosaic_gpu.launch import launch, thread_index
from sparsek_jax.ops.mosaic_gpu.layouts import BLOCK
from sparsek_jax.ops.mosaic_gpu.sort import SortedRows
from sparsek_jax.ops.mosaic_gpu.table import Table

_THREADS = 4  # that follow the same walk: more walks in a warp would wait for each other
_FAR = 256  # breakpoints of a key's walk, after which it looks where the next chunk begins


class Place(NamedTuple):
    """On the way to tau: between the breakpoints above and those below.

    Attributes:
      opened: How many keys of the row open above.
      closed: How many close above, of the same document or earlier ones.
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
    settings: WalkSettings, rows: SortedRows, edges: Edges, table: Table
) -> tuple[Int32[Array, "R M"], Sums, Int32[Array, "R M"]]:
    """Follows the thresholds of the pools that keys complete: the keys of their document so far.

    Args:
      settings: Of the call.
      rows: The keys.
      edges: Of the rows.
      table: `make_table` of these.

    Returns:
      For every key, `below` and `sums` of the place of tau, and the rank of the k-th key. Anything
      for what is no key.
    """
    operands, treedef = jax.tree.flatten((rows, edges, table))
    num_chunks = settings.num_chunks
    of_block = BLOCK // _THREADS

    # The kernel's name comes from this one, and benchmarks/attention.py knows it.
    def walks(*refs):
        inputs, outs = treedef.unflatten(refs[: len(operands)]), refs[len(operands) :]
        threshold, block, row = (lax.axis_index(x) for x in ("threshold", "block", "row"))
        chunk = block * of_block + thread_index() // _THREADS
        num_keys = inputs[0].num_keys[row]
        has_keys = (chunk < num_chunks) & (chunk * settings.chunk(num_keys) < num_keys)

        @pl.when(has_keys & (threshold == 0))
        def _():
            walk_to_tau(settings, *inputs, row, chunk, outs[:-1])

        @pl.when(has_keys & (threshold == 1))
        def _():
            walk_to_kth(settings, *inputs, row, chunk, outs[-1])

    below, *sums, kth = launch(
        walks,
        out_type=[jax.ShapeDtypeStruct(rows.rank.shape, jnp.int32)] * 5,
        # Rows last: only of these there may be more than 65,535.
        grid=(2, -(-num_chunks // of_block), len(rows.rank)),
        grid_names=("threshold", "block", "row"),
        operands=tuple(operands),
        by_thread=True,
    )
    return below, Sums(*sums), kth


def _where(condition, x, y):
    return jax.tree.map(functools.partial(jnp.where, condition), x, y)


def _first_below(num_edges, is_below, *kinds):
    """Of each kind, openings or closings, the first edge that is below; the last one always is."""

    def halve(_, brackets):
        def halve_one(kind, low, high):
            middle = (low + high) // 2
            there = is_below(kind * num_edges + middle)
            return jnp.where(there, low, middle + 1), jnp.where(there, middle, high)

        return tuple(halve_one(kind, *x) for kind, x in zip(kinds, brackets, strict=True))

    brackets = ((jnp.int32(0), jnp.int32(num_edges - 1)),) * len(kinds)
    brackets = lax.fori_loop(0, (num_edges - 1).bit_length(), halve, brackets)
    return [kind * num_edges + low for kind, (low, _) in zip(kinds, brackets, strict=True)]


def _follow(settings, rows, row, chunk, *, begin, lowest, enter, is_below, look_up, rise, write):
    """Follows a threshold over a chunk.

    Args:
      settings: Of the call.
      rows: The keys.
      row: Which row.
      chunk: Which chunk.
      begin: Finds a place below the threshold of the keys before a chunk, of a document.
      lowest: The place below a document that ends here, with an empty pool.
      enter: Adds a key to the pool of a place, or takes it off.
      is_below: Whether a place is below the threshold of a document's pool.
      look_up: Reads what is above a place, for whoever rises from there.
      rise: Goes up from a place as long as it is below, but not over more than `_FAR` breakpoints.
        It takes what `look_up` read, and returns that of where it arrives too.
      write: Keeps the place of a key.
    """
    num_keys = rows.num_keys[row]
    chunk_size = settings.chunk(num_keys)
    before = chunk * chunk_size
    after = before + chunk_size

    def with_above(place):
        return place, look_up(place)

    def ahead(place, key, first, stop):
        """Where the next chunk begins, if that is below the threshold too, and further up."""
        goes_on = after < stop
        next_place = begin(jnp.where(goes_on, chunk + 1, chunk), first, stop)
        num_later = jnp.where(goes_on, after - key - 1, 0)
        next_place = lax.fori_loop(
            0, num_later, lambda i, place: enter(place, key + 1 + i, -1), next_place
        )
        is_further = goes_on & is_below(next_place, first, stop) & (next_place.depth < place.depth)
        return _where(is_further, next_place, place)

    def step(i, state):
        key = before + i
        first, stop = rows.start[row, key], rows.end[row, key]
        place, above = lax.cond(key == first, lambda: with_above(lowest(stop)), lambda: state)
        state = enter(place, key, 1), above

        def go_on(state):
            state, (has_far_to_go, _) = state
            state = lax.cond(
                has_far_to_go,
                lambda: with_above(ahead(state[0], key, first, stop)),
                lambda: state,
            )
            risen = rise(*state, key, first, stop)
            has_far_to_go = state[0].depth - risen[0].depth == _FAR
            return risen, (has_far_to_go, ~has_far_to_go)

        state, _ = lax.while_loop(
            lambda state: ~state[1][1], go_on, (state, (jnp.bool_(False), jnp.bool_(False)))
        )
        write(key, state[0])
        return state

    size = jnp.minimum(chunk_size, num_keys - before)
    place = begin(chunk, rows.start[row, before], rows.end[row, before])
    lax.fori_loop(0, size, step, with_above(place))


def walk_to_kth(settings, rows, edges, table, row, chunk, out):
    """Writes the rank of the k-th key of the pool that each key of a chunk completes."""

    def is_below(place, first, stop):
        return place.is_below_kth(first, stop, settings.k)

    def begin(chunk, first, stop):
        def place_at(edge):
            _, num_above = table.look_up(row, chunk, edge)
            # Keys of earlier documents are above.
            return KthPlace(edges.opened[row, edge], num_above - first)

        (edge,) = _first_below(
            settings.num_stretches, lambda edge: is_below(place_at(edge), first, stop), 0
        )
        place = place_at(edge)
        # What is behind the document has entered none of its pools.
        return place._replace(rank=jnp.minimum(place.rank, stop))

    def enter(place, key, weight):
        is_above = (rows.rank[row, key] < place.rank).astype(jnp.int32)
        return place._replace(num_above=place.num_above + weight * is_above)

    def look_up(place):
        return rows.key[row, jnp.maximum(place.rank - 1, 0)]

    def rise(place, above, key, first, stop):
        lowest = place.depth - _FAR

        def goes_on(state):
            place, _ = state
            return (place.depth > lowest) & is_below(place, first, stop)

        def one_up(state):
            place, above = state
            is_in_pool = (above <= key).astype(jnp.int32)
            place = KthPlace(place.rank - 1, place.num_above - is_in_pool)
            return place, look_up(place)

        return lax.while_loop(goes_on, one_up, (place, above))

    def write(key, place):
        out[row, key] = place.rank

    _follow(
        settings,
        rows,
        row,
        chunk,
        begin=begin,
        lowest=lambda stop: KthPlace(stop, jnp.int32(0)),
        enter=enter,
        is_below=is_below,
        look_up=look_up,
        rise=rise,
        write=write,
    )


class _SortedKey(NamedTuple):
    """Of the key of a rank: its score, itself, and its score in fixed point."""

    u: Float[Array, ""]
    key: Int32[Array, ""]
    high: Int32[Array, ""]
    low: Int32[Array, ""]


class _Above(NamedTuple):
    """What is above a place.

    Attributes:
      opening: The key that opens next.
      closing: The one that closes next.
      beyond: The one that does in place of the last that did: not used before the next step has
        begun, so that this one does not wait for it.
      closed_last: Whether that closed.
    """

    opening: _SortedKey
    closing: _SortedKey
    beyond: _SortedKey
    closed_last: Bool[Array, ""]


def walk_to_tau(settings, rows, edges, table, row, chunk, outs):
    """Writes, of every key of a chunk, `below` and `sums` of the place of its pool's tau."""
    one = 1 << settings.bits
    zero = jnp.int32(0)

    def is_below(place, first, stop):
        return place.is_below_tau(first, stop, settings.k, settings.bits)

    def begin(chunk, first, stop):
        def place_at(edge):
            sums, _ = table.look_up(row, chunk, edge)
            # Of each key of earlier documents both breakpoints are above, and add up to one.
            sums = sums._replace(high=sums.high - (first << settings.bits))
            opened, closed = edges.opened[row, edge], edges.closed[row, edge]
            closes = (edge >= settings.num_stretches).astype(jnp.int32)
            rank = jnp.minimum(jnp.where(closes == 0, opened, closed), rows.num_keys[row] - 1)
            high = rows.high[row, rank] - (closes << settings.bits)
            return Place(opened, closed, sums, 2 * rank + closes, high, rows.low[row, rank])

        nearest = _first_below(
            settings.num_stretches, lambda edge: is_below(place_at(edge), first, stop), 0, 1
        )
        opens, closes = map(place_at, nearest)
        place = _where(opens.depth < closes.depth, opens, closes)
        # What is behind the document has entered none of its pools.
        return place._replace(
            opened=jnp.minimum(place.opened, stop), closed=jnp.minimum(place.closed, stop)
        )

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

    def look_up(place):
        opening, closing = (sorted_key(x - 1) for x in (place.opened, place.closed))
        return _Above(opening, closing, closing, jnp.bool_(True))

    def rise(place, above, key, first, stop):
        lowest = place.depth - _FAR

        def goes_on(state):
            place, _ = state
            return (place.depth > lowest) & is_below(place, first, stop)

        def one_up(state):
            place, (opening, closing, beyond, closed_last) = state
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
            return place, _Above(opening, closing, sorted_key(rank - 1), closes)

        return lax.while_loop(goes_on, one_up, (place, above))

    def write(key, place):
        for ref, x in zip(outs, (place.below, *place.sums), strict=True):
            ref[row, key] = x

    _follow(
        settings,
        rows,
        row,
        chunk,
        begin=begin,
        lowest=lambda stop: Place(stop, stop, Sums(zero, zero, zero), zero, zero, zero),
        enter=enter,
        is_below=is_below,
        look_up=look_up,
        rise=rise,
        write=write,
    )
