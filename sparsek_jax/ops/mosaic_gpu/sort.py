"""The kernels that sort rows, by counting: a key's rank is how many others come before it.

Of its own piece of the row a key looks at all others. Once pieces are sorted, a binary search tells
how many come before it in each of the other ones. Both take few steps that wait for each other, of
many threads at once, where XLA's sorting network takes some ninety, of a block in few rows.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Array, Float, Int32

from sparsek_jax.ops.breakpoints import fixed_point
from sparsek_jax.ops.mosaic_gpu.launch import launch, thread_index
from sparsek_jax.ops.mosaic_gpu.layouts import BLOCK

_PIECE = 256  # keys, at most
_READ = 16  # keys of a piece that are read together, at most
_SEARCHES = 16  # of a thread at once, at most


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


def sort_rows(
    u: Float[Array, "R M"],
    start: Int32[Array, "R M"],
    end: Int32[Array, "R M"],
    bits: int,
    *,
    packed: bool,
) -> SortedRows:
    """Sorts keys by document, score from the highest, and position.

    Args:
      u: Finite scores.
      start: First key of every key's document.
      end: The one after its last.
      bits: Of fixed point.
      packed: Whether rows hold several documents.
    """
    length = u.shape[1]
    size = min(_PIECE, 1 << (length - 1).bit_length())
    at_once = min(_SEARCHES, -(-length // size))
    # What is added comes last.
    padding = ((0, 0), (0, -length % (at_once * size)))
    columns = (jnp.pad(u, padding, constant_values=-jnp.inf),)
    if packed:
        columns = (jnp.pad(start, padding, constant_values=length), *columns)

    def sort_pieces(*refs):
        rank_in_piece(size, *refs)

    def merge_pieces(*refs):
        rank_in_row(size, at_once, *refs)

    # The kernels' names come from these, and benchmarks/attention.py knows them.
    pieces = _each_key(sort_pieces, columns, [jnp.int32, *(x.dtype for x in columns)])
    merged = _each_key(merge_pieces, pieces, [jnp.int32, u.dtype, jnp.int32])
    key, by_rank, rank = (x[:, :length] for x in merged)
    return SortedRows(
        key, by_rank, *fixed_point(by_rank, bits), rank, *fixed_point(u, bits), start, end
    )


def _each_key(function, operands, dtypes):
    """Lets a thread run `function` of operands, a row, a place in it, and results."""
    num_rows, length = operands[0].shape

    @functools.wraps(function)
    def kernel(*refs):
        block, row = (lax.axis_index(x) for x in ("block", "row"))
        place = block * BLOCK + thread_index()

        @pl.when(place < length)
        def _():
            function(refs[: len(operands)], row, place, refs[len(operands) :])

    return launch(
        kernel,
        out_type=[jax.ShapeDtypeStruct((num_rows, length), x) for x in dtypes],
        # Rows last: only of these there may be more than 65,535.
        grid=(-(-length // BLOCK), num_rows),
        grid_names=("block", "row"),
        operands=tuple(operands),
        by_thread=True,
    )


def _comes_before(other, mine, is_earlier):
    """Whether another key is sorted before this one, of their documents, if several, and scores."""
    (*start, u), (*my_start, my_u) = other, mine
    is_before = (u > my_u) | ((u == my_u) & is_earlier)
    for x, y in zip(start, my_start, strict=True):
        is_before = (x < y) | ((x == y) & is_before)
    return is_before


def rank_in_piece(size, columns, row, key, outs):
    """Writes a key, and what it is sorted by, to its place in its piece."""
    step = min(size, _READ)
    begin = key // size * size
    mine = [x[row, key] for x in columns]

    def count(i, rank):
        first = begin + step * i
        # In a row, which takes fewer instructions.
        others = [[x[row, first + j] for x in columns] for j in range(step)]
        for j, other in enumerate(others):
            rank += _comes_before(other, mine, first + j < key).astype(jnp.int32)
        return rank

    rank = lax.fori_loop(0, size // step, count, begin)
    for out, x in zip(outs, (key, *mine), strict=True):
        out[row, rank] = x


def rank_in_row(size, at_once, pieces, row, place, outs):
    """Writes a key of a sorted piece and its score by its rank in the row, and that by the key."""
    keys, *columns = pieces
    sorted_keys, sorted_u, ranks = outs
    mine = [x[row, place] for x in columns]

    def is_before(at):
        # Equal ones are in order of position, within pieces too.
        return _comes_before([x[row, at] for x in columns], mine, at < place)

    halves = [1 << i for i in reversed(range(size.bit_length() - 1))]

    def count(i, rank):
        begins = [(at_once * i + j) * size for j in range(at_once)]
        ends = begins
        for step in (*halves, 1):
            ends = [jnp.where(is_before(x + step - 1), x + step, x) for x in ends]
        return rank + sum(end - begin for begin, end in zip(begins, ends, strict=True))

    num_pieces = keys.shape[1] // size
    rank = lax.fori_loop(0, num_pieces // at_once, count, jnp.int32(0))
    key = keys[row, place]
    sorted_keys[row, rank] = key
    sorted_u[row, rank] = mine[-1]
    ranks[row, key] = rank
