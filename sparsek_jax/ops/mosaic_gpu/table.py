"""The kernel that sums up what of every prefix of a row is above the edges of stretches.

Where a chunk of keys begins, a threshold is above one edge (ops/mosaic_gpu/edges.py) and below the
next. Which one follows from a table of sums over "the keys before a chunk" x "the breakpoints above
an edge" (ops/breakpoints.py).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Array, Int32

from sparsek_jax.ops.breakpoints import Sums
from sparsek_jax.ops.mosaic_gpu.edges import Edges, WalkSettings
from sparsek_jax.ops.mosaic_gpu.launch import launch, thread_index
from sparsek_jax.ops.mosaic_gpu.layouts import BLOCK
from sparsek_jax.ops.mosaic_gpu.sort import UNIT, SortedRows

_HALF = 16  # bits: two counts share an int32
_GROUPS = 32  # of chunks, at most


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
    """Sums up, for every chunk with keys and edge of rows of at most 2^15 keys."""
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
    opened, closed = edges.opened[row, edge], edges.closed[row, edge]
    keys = rows.rank, rows.key_high, rows.key_low
    num_keys, num_places = rows.num_keys[row], rows.rank.shape[1]
    pieces = settings.chunk(num_keys) // UNIT  # of a chunk
    per_group = _chunks_of_group(settings.num_chunks)
    first_chunk = group * per_group
    first_piece = first_chunk * pieces
    num_mine = jnp.minimum(per_group, settings.num_chunks - first_chunk) * pieces
    num_left = (num_keys + (UNIT - 1)) // UNIT - first_piece
    one, one_opened = 1 << settings.bits, 1 << _HALF

    def write(ref, *index, sums):
        for i, x in enumerate(sums):
            ref[i, row, *index] = x

    def read(i):
        # In a row, which takes fewer instructions.
        begin = UNIT * jnp.minimum(first_piece + i, num_places // UNIT - 1)
        return [[x[row, begin + j] for x in keys] for j in range(UNIT)]

    def add_piece(i, state):
        # The next ones are read before these are used: they take time to come.
        (counts, high, low), of_keys, (chunk, piece) = state
        later = read(i + 1)

        @pl.when(piece == 0)
        def _():
            write(in_group, chunk, edge, sums=(counts, high, low))

        # What is no key is below all edges.
        for rank, key_high, key_low in of_keys:
            opens, closes = rank < opened, rank < closed
            # What closes above an edge opens there too.
            counts += jnp.where(closes, one_opened, jnp.where(opens, one_opened + 1, 0))
            high += jnp.where(closes, one, jnp.where(opens, key_high, 0))
            low += jnp.where(opens & ~closes, key_low, 0)
        ends_chunk = piece == pieces - 1
        chunk, piece = jnp.where(ends_chunk, chunk + 1, chunk), jnp.where(ends_chunk, 0, piece + 1)
        return (counts, high, low), later, (chunk, piece)

    nothing = (jnp.int32(0),) * 3
    state = nothing, read(0), (first_chunk, jnp.int32(0))
    sums, _, _ = lax.fori_loop(0, jnp.minimum(num_mine, num_left), add_piece, state)
    write(totals, edge, group, sums=sums)
