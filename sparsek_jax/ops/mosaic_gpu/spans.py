"""Which queries a block has, and which tiles of keys it visits."""

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Int32

from sparsek_jax.ops.mosaic_gpu.layouts import BLOCK
from sparsek_jax.ops.mosaic_gpu.operands import Settings


class Span(NamedTuple):
    """The tiles of keys of one block of queries, as tile indices.

    Attributes:
      num_listed: How many of the list.
      slab: First of the slab.
      window: First that lies in the windows of all queries.
      diagonal: First that does not lie before all queries.
      end: After the last.
    """

    num_listed: Int32[Array, ""]
    slab: Int32[Array, ""]
    window: Int32[Array, ""]
    diagonal: Int32[Array, ""]
    end: Int32[Array, ""]


def tile_span(settings: Settings, first_query: Int32[Array, ""], length: int, columns: int) -> Span:
    """The tiles, of `columns` keys, of the block that begins with `first_query`; `length`: T."""
    chunk = first_query - lax.rem(first_query, jnp.int32(settings.chunk_size))
    listed = jnp.clip(chunk - settings.window + 1, 0, settings.list_size)
    slab = lax.div(jnp.maximum(chunk - settings.window, 0), jnp.int32(columns))
    end = lax.div(jnp.minimum(first_query + BLOCK, length) + columns - 1, jnp.int32(columns))
    diagonal = lax.div(first_query, jnp.int32(columns))
    in_window = first_query + BLOCK - settings.window
    window = lax.div(jnp.maximum(in_window, 0) + columns - 1, jnp.int32(columns))
    window = jnp.clip(window, slab, diagonal)
    if settings.packed:
        window = diagonal
    return Span(lax.div(listed + columns - 1, jnp.int32(columns)), slab, window, diagonal, end)


class QueryBlock(NamedTuple):
    """A block of the queries of one head, as one of its warpgroups sees it.

    Attributes:
      batch: Member of the batch.
      head: Query head.
      kv_head: Its KV head.
      warpgroup: Number of the warpgroup.
      first_query: Position of the first query.
      chunk: Chunk that all of its queries are in.
      chunk_start: Position of the chunk's first query.
      span: The tiles of keys that it visits.
    """

    batch: Int32[Array, ""]
    head: Int32[Array, ""]
    kv_head: Int32[Array, ""]
    warpgroup: Int32[Array, ""]
    first_query: Int32[Array, ""]
    chunk: Int32[Array, ""]
    chunk_start: Int32[Array, ""]
    span: Span


def query_block(settings: Settings, group: int, length: int, columns: int) -> QueryBlock:
    """This warpgroup's block, in a grid with the axes head, block and batch.

    Args:
      settings: Of the call.
      group: Query heads of a KV head.
      length: T.
      columns: Keys of a tile.
    """
    head, batch = lax.axis_index("head"), lax.axis_index("batch")
    warpgroup = lax.axis_index("warpgroup")
    first_query = lax.axis_index("block") * BLOCK
    kv_head = lax.div(head, jnp.int32(group))
    chunk = lax.div(first_query, jnp.int32(settings.chunk_size))
    chunk_start = chunk * settings.chunk_size
    span = tile_span(settings, first_query, length, columns)
    return QueryBlock(batch, head, kv_head, warpgroup, first_query, chunk, chunk_start, span)


def for_tiles(
    span: Span, tile: Callable[..., tuple[Array, ...]], carry: tuple[Array, ...]
) -> tuple[Array, ...]:
    """Runs `tile(step, tile index or None, kind, carry)` over all tiles of a block of queries."""
    first_step = span.num_listed - span.slab

    def slab(kind):
        return lambda index, carry: tile(index + first_step, index, kind, carry)

    carry = lax.fori_loop(0, span.num_listed, lambda s, c: tile(s, None, "list", c), carry)
    carry = lax.fori_loop(span.slab, span.window, slab("slab"), carry)
    carry = lax.fori_loop(span.window, span.diagonal, slab("window"), carry)
    return lax.fori_loop(span.diagonal, span.end, slab("slab"), carry)
