"""The kernel that finds where thresholds of a row are looked for first.

Sorted keys are cut into stretches. There is an edge where the first key of each opens, and another
where it closes (ops/breakpoints.py). What is above an edge is known by two numbers.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int32

from sparsek_jax.ops.mosaic_gpu.launch import launch_by_place
from sparsek_jax.ops.mosaic_gpu.sort import UNIT, SortedRows
from sparsek_jax.ops.selection import first_query


class WalkSettings(NamedTuple):
    """Of a call.

    Attributes:
      k: How many keys are selected, less than a row has places.
      num_chunks: That the keys of a row are cut into, at most.
      num_stretches: That its sorted keys are cut into, at most.
      bits: Of fixed point.
    """

    k: int
    num_chunks: int
    num_stretches: int
    bits: int

    def chunk(self, num_keys: Int32[Array, "*n"]) -> Int32[Array, "*n"]:
        """Keys of a chunk of a row of so many keys, but for the last one."""
        return UNIT * _ceil_div(num_keys, UNIT * self.num_chunks)

    def stretch(self, num_keys: Int32[Array, "*n"]) -> Int32[Array, "*n"]:
        """Sorted keys of a stretch of a row of so many keys, but for the last one."""
        return _ceil_div(num_keys, self.num_stretches)


class Edges(NamedTuple):
    """Cuts between the breakpoints of a row, each right above the opening or closing of a key.

    Of every stretch but the first, it is the first key's; what is left is below everything. First
    come those where keys open, from the highest, then those where they close.

    Attributes:
      opened: How many keys of the row open above.
      closed: How many close above, of the same document or earlier ones.
    """

    opened: Int32[Array, "R E"]
    closed: Int32[Array, "R E"]


def find_edges(settings: WalkSettings, rows: SortedRows) -> Edges:
    """Finds two edges for each stretch."""
    num_rows, num_edges = len(rows.rank), 2 * settings.num_stretches
    operands, treedef = jax.tree.flatten(rows)

    # The kernel's name comes from this one, and benchmarks/attention.py knows it.
    def edges(operands, row, edge, outs):
        find_edge(settings, treedef.unflatten(operands), row, edge, outs)

    outs = [jax.ShapeDtypeStruct((num_rows, num_edges), jnp.int32)] * 2
    return Edges(*launch_by_place(edges, tuple(operands), outs))


def _ceil_div(x, y):
    return (x + (y - 1)) // y


def find_edge(settings, rows, row, edge, outs):
    """Writes how many keys open and close above an edge."""
    num_keys = rows.num_keys[row]
    closes = edge >= settings.num_stretches
    stretch = edge - jnp.where(closes, settings.num_stretches, 0)
    rank = jnp.minimum(settings.stretch(num_keys) * (stretch + 1), num_keys)
    is_last = rank == num_keys
    at = jnp.minimum(rank, num_keys - 1)
    key, u = rows.key[row, at], rows.u[row, at]

    def is_below(other):
        other = rows.u[row, jnp.minimum(other, num_keys - 1)]
        # Of equal ones, what closes is below what opens.
        return jnp.where(closes, other < u - 1.0, other - 1.0 <= u)

    # All of earlier documents are above.
    first, stop = rows.start[row, key], rows.end[row, key]
    found = first_query(first, stop, is_below, length=rows.u.shape[1])
    found = jnp.where(is_last, num_keys, found)
    opened, closed = outs
    opened[row, edge] = jnp.where(closes, found, rank)
    closed[row, edge] = jnp.where(closes, rank, found)
