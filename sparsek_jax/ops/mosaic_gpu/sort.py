"""The kernels that sort rows, by counting: a key's rank is how many others come before it.

Of its own piece of the row a key looks at all others. Once pieces are sorted, a binary search tells
how many come before it in each of the other ones. Both take few steps that wait for each other, of
many threads at once, where XLA's sorting network takes some ninety, of a block in few rows.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Array, Float, Int32

from sparsek_jax.ops.breakpoints import fixed_point
from sparsek_jax.ops.mosaic_gpu.launch import launch_by_place

_PIECE = 256  # keys, at most
_READ = 16  # keys of a piece that are read together, at most
UNIT = 8  # places: rows and chunks of rows have a multiple of so many
_SEARCHES = 16  # of a thread at once, at most


class SortedRows(NamedTuple):
    """Keys of rows, in order and sorted, documents one after the other.

    Rows may be longer than they have keys. What is behind the last one is at its own place, below
    everything else.

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
      num_keys: Of a row.
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
    num_keys: Int32[Array, " R"]


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
      u: Finite scores, of at least one key a row.
      start: First key of every key's document.
      end: The one after its last. What is no key has an empty document, comes last in its row, and
        has the lowest score that there is.
      bits: Of fixed point.
      packed: Whether rows hold several documents.

    Returns:
      The rows, with places added that are no keys, for whoever reads several at once.
    """
    length = u.shape[1]
    size = max(min(_PIECE, 1 << (length - 1).bit_length()), UNIT)
    at_once = min(_SEARCHES, -(-length // size))
    padding = ((0, 0), (0, -length % (at_once * size)))
    u = jnp.pad(u, padding, constant_values=np.finfo(np.float32).min)
    place = np.arange(u.shape[1], dtype=np.int32)
    start, end = (jnp.where(place < length, jnp.pad(x, padding), place) for x in (start, end))
    columns = (start, u) if packed else (u,)

    def sort_pieces(*refs):
        rank_in_piece(size, *refs)

    def merge_pieces(*refs):
        rank_in_row(size, at_once, *refs)

    # The kernels' names come from these, and benchmarks/attention.py knows them.
    like = [jax.ShapeDtypeStruct(u.shape, x) for x in (jnp.int32, u.dtype)]
    num_keys = jax.ShapeDtypeStruct((len(u),), jnp.int32)
    outs = [*(like[:1] if packed else []), like[1], like[0], num_keys]
    *pieces, num_keys = launch_by_place(sort_pieces, (*columns, end), outs)
    key, by_rank, rank = launch_by_place(
        merge_pieces, (*pieces, num_keys), [like[0], like[1], like[0]]
    )
    return SortedRows(
        key, by_rank, *fixed_point(by_rank, bits), rank, *fixed_point(u, bits), start, end, num_keys
    )


def _comes_before(other, mine, is_earlier):
    """Whether another key is sorted before this one, of their documents, if several, and scores."""
    (*start, u), (*my_start, my_u) = other, mine
    is_before = (u > my_u) | ((u == my_u) & is_earlier)
    for x, y in zip(start, my_start, strict=True):
        is_before = (x < y) | ((x == y) & is_before)
    return is_before


def rank_in_piece(size, operands, row, key, outs):
    """Writes a key, and what it is sorted by, to its place in its piece; the last one's number."""
    *columns, ends = operands
    *outs, num_keys = outs
    length = ends.shape[1]
    step = min(size, _READ)
    begin = key // size * size
    mine = [x[row, key] for x in columns]
    is_key = ends[row, key] > key

    def count(i, rank):
        first = begin + step * i
        # In a row, which takes fewer instructions.
        others = [[x[row, first + j] for x in columns] for j in range(step)]
        for j, other in enumerate(others):
            rank += _comes_before(other, mine, first + j < key).astype(jnp.int32)
        return rank

    rank = lax.fori_loop(0, jnp.where(is_key, size // step, 0), count, begin)
    rank = jnp.where(is_key, rank, key)
    for out, x in zip(outs, (*mine, key), strict=True):
        out[row, rank] = x

    later = jnp.minimum(key + 1, length - 1)

    @pl.when(is_key & ((key == length - 1) | (ends[row, later] <= later)))
    def _():
        num_keys[row] = key + 1


def rank_in_row(size, at_once, operands, row, place, outs):
    """Writes a key of a sorted piece and its score by its rank in the row, and that by the key."""
    *columns, keys, num_keys = operands
    sorted_keys, sorted_u, ranks = outs
    mine = [x[row, place] for x in columns]
    num_mine = num_keys[row]
    is_key = place < num_mine

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

    num_steps = jnp.where(is_key, lax.div(num_mine + (at_once * size - 1), at_once * size), 0)
    rank = lax.fori_loop(0, num_steps, count, jnp.int32(0))
    rank = jnp.where(is_key, rank, place)
    key = keys[row, place]
    sorted_keys[row, rank] = key
    sorted_u[row, rank] = mine[-1]
    ranks[row, key] = rank
