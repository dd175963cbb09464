"""The kernel that sums up what of every prefix of a row is above the edges of stretches.

Where a chunk of keys begins, a threshold is above one edge and below the next. Which one follows
from a table of sums over "the keys before a chunk" x "the breakpoints above an edge"
(ops/breakpoints.py).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Array, Int32

from sparsek_jax.ops.breakpoints import Sums
from sparsek_jax.ops.mosaic_gpu.launch import launch, thread_index
from sparsek_jax.ops.mosaic_gpu.layouts import BLOCK
from sparsek_jax.ops.mosaic_gpu.sort import SortedRows

_HALF = 16  # bits: two counts share an int32
_GROUPS = 32  # of chunks, at most
_AT_ONCE = 16  # keys whose numbers are read together, at most


class WalkSettings(NamedTuple):
    """Of a call.

    Attributes:
      k: How many keys are selected, less than a row has.
      length: Keys of a row.
      chunk: Keys of a chunk.
      stretch: Sorted keys of a stretch.
      bits: Of fixed point.
    """

    k: int
    length: int
    chunk: int
    stretch: int
    bits: int

    @property
    def num_chunks(self) -> int:
        """Of a row."""
        return -(-self.length // self.chunk)

    @property
    def num_stretches(self) -> int:
        """Of a row."""
        return -(-self.length // self.stretch)


class Edges(NamedTuple):
    """Cuts between the breakpoints of a row, each right above the opening or closing of a key.

    Of every stretch but the first, it is the first key's; a last edge is below everything. First
    come those where keys open, from the highest, then those where they close.

    Attributes:
      closed: Where keys open, how many close above, of the same or earlier ones.
      opened: Where keys close, how many of the row open above.
    """

    closed: Int32[Array, "R stretches"]
    opened: Int32[Array, "R stretches"]

    def look_up(
        self, settings: WalkSettings, row: Int32[Array, ""], edge: Int32[Array, ""]
    ) -> tuple[Int32[Array, ""], ...]:
        """How many keys open above and how many close, the rank of the key, if it closes."""
        closes = edge // settings.num_stretches
        stretch = edge - closes * settings.num_stretches
        itself = jnp.minimum(settings.stretch * (stretch + 1), settings.length)
        opened = jnp.where(closes == 0, itself, self.opened[row, stretch])
        closed = jnp.where(closes == 0, self.closed[row, stretch], itself)
        return opened, closed, jnp.minimum(itself, settings.length - 1), closes


class Table(NamedTuple):
    """Sums over what is above edges: over the keys of a chunk's group before it, and before that.

    First come slopes and counts of opened keys, which share a number, then the values' high and low
    parts.
    """

    in_group: Int32[Array, "3 R chunks E"]
    before: Int32[Array, "3 R E groups"]

    def look_up(
        self, row: Int32[Array, ""], chunk: Int32[Array, ""], edge: Int32[Array, ""]
    ) -> tuple[Sums, Int32[Array, ""]]:
        """Sums over all keys before a chunk, and how many of these open above the edge."""
        group = chunk // _chunks_of_group(self.in_group.shape[2])
        counts, high, low = (
            self.in_group[i, row, chunk, edge] + self.before[i, row, edge, group] for i in range(3)
        )
        return Sums(counts & ((1 << _HALF) - 1), high, low), counts >> _HALF


def make_table(settings: WalkSettings, rows: SortedRows, edges: Edges) -> Table:
    """Sums up, for every chunk and edge of rows of at most 2^15 keys."""
    num_rows, num_edges = len(rows.rank), 2 * settings.num_stretches
    num_chunks = settings.num_chunks
    num_groups = -(-num_chunks // _chunks_of_group(num_chunks))
    operands, treedef = jax.tree.flatten((rows, edges))

    # The kernel's name comes from this one, and benchmarks/attention.py knows it.
    def table(*refs):
        inputs, outs = treedef.unflatten(refs[: len(operands)]), refs[len(operands) :]
        block, group, row = (lax.axis_index(x) for x in ("block", "group", "row"))
        edge = block * BLOCK + thread_index()

        @pl.when(edge < num_edges)
        def _():
            add_up(settings, *inputs, (row, group, edge), *outs)

    in_group, totals = launch(
        table,
        out_type=[
            jax.ShapeDtypeStruct((3, num_rows, num_chunks, num_edges), jnp.int32),
            jax.ShapeDtypeStruct((3, num_rows, num_edges, num_groups), jnp.int32),
        ],
        # Rows last: only of these there may be more than 65,535.
        grid=(-(-num_edges // BLOCK), num_groups, num_rows),
        grid_names=("block", "group", "row"),
        operands=tuple(operands),
        by_thread=True,
    )
    return Table(in_group, _exclusive_sum(totals))


def _chunks_of_group(num_chunks):
    return -(-num_chunks // _GROUPS)


def _exclusive_sum(totals):
    group = np.arange(totals.shape[3])
    is_before = group < group[:, None]
    return jnp.sum(jnp.where(is_before, totals[:, :, :, None], 0), axis=-1)


def add_up(settings, rows, edges, place, in_group, totals):
    """Fills in one edge of a group of chunks."""
    row, group, edge = place
    opened, closed, _, _ = edges.look_up(settings, row, edge)
    keys = rows.rank, rows.key_high, rows.key_low
    per_group = _chunks_of_group(settings.num_chunks)
    chunk = group * per_group
    num_mine = jnp.minimum(per_group, settings.num_chunks - chunk)
    size = min(settings.chunk, _AT_ONCE, settings.length)  # of a piece of a chunk
    num_pieces = -(-settings.chunk // size)
    are_whole = settings.length % settings.chunk == settings.chunk % size == 0
    one, one_opened = 1 << settings.bits, 1 << _HALF

    def write(ref, *index, sums):
        for i, x in enumerate(sums):
            ref[i, row, *index] = x

    def begin_of(i):
        return (chunk + i // num_pieces) * settings.chunk + i % num_pieces * size

    def read(i):
        # In a row, which takes fewer instructions.
        begin = jnp.minimum(begin_of(i), settings.length - size)
        return begin, [[x[row, begin + j] for x in keys] for j in range(size)]

    def add_piece(i, state):
        # The next ones are read before these are used: they take time to come.
        (counts, high, low), (begin, of_keys) = state
        later = read(i + 1)

        @pl.when(i % num_pieces == 0)
        def _():
            write(in_group, chunk + i // num_pieces, edge, sums=(counts, high, low))

        stop = jnp.minimum((chunk + i // num_pieces + 1) * settings.chunk, settings.length)
        for j, (rank, key_high, key_low) in enumerate(of_keys):
            opens, closes = rank < opened, rank < closed
            if not are_whole:
                is_mine = (begin + j >= begin_of(i)) & (begin + j < stop)
                opens, closes = opens & is_mine, closes & is_mine
            # What closes above an edge opens there too.
            counts += jnp.where(closes, one_opened, jnp.where(opens, one_opened + 1, 0))
            high += jnp.where(closes, one, jnp.where(opens, key_high, 0))
            low += jnp.where(opens & ~closes, key_low, 0)
        return (counts, high, low), later

    nothing = (jnp.int32(0),) * 3
    sums, _ = lax.fori_loop(0, num_mine * num_pieces, add_piece, (nothing, read(0)))
    write(totals, edge, group, sums=sums)
