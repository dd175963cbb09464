"""Attention over blocks of keys that differ between queries.

A block that one query does not see, a later one may: generation has to remember all keys.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jaxtyping import Array, Bool, Float, Float32, Int, Int32, Shaped

from sparsek_jax.nn.alternatives.selection import uniform_numbers
from sparsek_jax.nn.alternatives.tiles import (
    attend_in_tiles,
    band_tiles,
    block_tiles,
    for_every_head,
)
from sparsek_jax.nn.attention import Attention
from sparsek_jax.nn.cache import DenseCache, extend_dense_cache, init_dense_cache
from sparsek_jax.nn.causal import over_query_chunks
from sparsek_jax.ops.products import einsum_f32
from sparsek_jax.ops.selection import document_bounds

_SCORES = 1 << 20  # of a chunk of queries and all blocks, for one head


@dataclasses.dataclass(frozen=True)
class Blocks:
    """The whole blocks of rows of keys, in which every document is cut into blocks by itself.

    What is left at the end of a document is in no block, so there are at most S / size of them.

    Attributes:
      size: Keys of a block.
      begin: Row of every block's first key, ascending; S for a block that does not exist.
      of_row: The block that every row is in, -1 for none.
    """

    size: int
    begin: Int32[Array, "B M"]
    of_row: Int32[Array, "B S"]

    def gather(self, x: Shaped[Array, "B S K H"]) -> Shaped[Array, "B M size K H"]:
        """The rows of every block; any rows for a block that does not exist."""
        rows = self.begin[..., None] + jnp.arange(self.size)
        return jax.vmap(lambda x, rows: x.at[rows].get(mode="clip"))(x, rows)


def whole_blocks(start: Int[Array, "B S"], size: int) -> Blocks:
    """Cuts documents into blocks.

    Args:
      start: Row of the first key of every row's document.
      size: Keys of a block.
    """
    num_keys = start.shape[1]
    rows = jnp.arange(num_keys, dtype=jnp.int32)
    last = (rows - start) % size == size - 1
    # Of the block that ends at this row or next after it, maybe in a later document.
    number = jnp.cumsum(last, axis=1, dtype=jnp.int32) - last
    count = max(num_keys // size, 1)
    nothing = jnp.full(count, num_keys, jnp.int32)
    begin = jax.vmap(lambda index: nothing.at[index].set(rows - size + 1, mode="drop"))(
        jnp.where(last, number, count)
    )
    exists = number < count
    first = jnp.take_along_axis(begin, jnp.minimum(number, count - 1), axis=1)
    return Blocks(size, begin, jnp.where(exists & (first <= rows), number, -1))


@dataclasses.dataclass(frozen=True)
class Queries:
    """Where in rows of keys queries are.

    Attributes:
      row: Row of each query's own key.
      start: Row of the first key of its document.
      own: Row of the first key of its own block.
    """

    row: Int32[Array, "B C"]
    start: Int32[Array, "B C"]
    own: Int32[Array, "B C"]

    def past(self, blocks: Blocks) -> Bool[Array, "B C M"]:
        """Which blocks of its document come before the query's own."""
        begin = blocks.begin[:, None]
        return (begin >= self.start[..., None]) & (begin < self.own[..., None])

    def complete(self, blocks: Blocks) -> Bool[Array, "B C M"]:
        """Which blocks of its document have no key after the query; its own may be one."""
        begin = blocks.begin[:, None]
        end = begin + blocks.size
        return (begin >= self.start[..., None]) & (end <= self.row[..., None] + 1)


def find_queries(row: Int32[Array, "B C"], start: Int32[Array, "B S"], size: int) -> Queries:
    """Where queries of these rows are, given the first row of every row's document."""
    start = jnp.take_along_axis(start, row, axis=1, mode="clip")
    return Queries(row, start, row - (row - start) % size)


def best_blocks(
    scores: Float32[Array, "... M"], candidates: Bool[Array, "... M"], count: int
) -> Int32[Array, "... n"]:
    """The `count` candidates of the highest scores, of equals the earlier; M where there is none.

    There are no more of them than blocks, and one in form if `count` is 0.
    """
    num_blocks = scores.shape[-1]
    scores = jnp.where(candidates & (count > 0), scores, -jnp.inf)
    best, index = jax.lax.top_k(scores, max(min(count, num_blocks), 1))
    return jnp.where(best > -jnp.inf, index, num_blocks)


def queries_at_a_time(num_queries: int, num_blocks: int) -> int:
    """Of how many queries to compare scores of all blocks."""
    return min(max(_SCORES // num_blocks, 1), num_queries)


def attend_to_blocks(
    query: Float[Array, "B C N H"],
    key: Float[Array, "B S K H"],
    value: Float[Array, "B S K H"],
    blocks: Blocks,
    choice: Int32[Array, "B C #K #G n"],
    row: Int32[Array, "B C"],
    first: Int32[Array, "B C"],
    reach: int,
    sharding: NamedSharding | None,
) -> Float[Array, "B C N H"]:
    """Attention over some newest keys, and older ones in chosen blocks.

    Args:
      query: Queries.
      key: Keys.
      value: Values.
      blocks: Of the keys.
      choice: Blocks that every query has chosen, M for none.
      row: Row of each query's own key.
      first: The first row that a query sees wholly, up to its own.
      reach: How many rows that may be before its own, at most.
      sharding: Of the residual stream; None: of one device, or XLA finds one.
    """
    num_keys, num_kv_heads = key.shape[1:3]
    groups = query.shape[2] // num_kv_heads
    choice = jnp.broadcast_to(choice, (*row.shape, num_kv_heads, groups, choice.shape[-1]))

    def make_tiles(tables):
        choice, begin, row, first = tables
        choice = choice.reshape(-1, choice.shape[-1])
        end = jnp.repeat(first, groups)
        return [
            band_tiles(row, first, groups, reach, num_keys),
            block_tiles(choice, begin, blocks.size, end, num_keys),
        ]

    by_row = (for_every_head(x, num_kv_heads) for x in (blocks.begin, row, first))
    tables = (jnp.moveaxis(choice, 2, 1), *by_row)
    return attend_in_tiles(make_tiles, tables, query, key, value, sharding)


def by_kv_head(query: Float[Array, "B C N H"], num_kv_heads: int) -> Float32[Array, "B C K G H"]:
    """Queries, in float32, by the KV head that they share."""
    return query.astype(jnp.float32).reshape(*query.shape[:2], num_kv_heads, -1, query.shape[-1])


class RememberingAttention(Attention):
    """Attention that any key may matter to again: generation remembers all of them."""

    needs_room = True

    def attend(
        self,
        x: Float[Array, "B C D"],
        query: Float[Array, "B C N H"],
        key: Float[Array, "B S K H"],
        value: Float[Array, "B S K H"],
        row: Int32[Array, "B C"],
        start: Int32[Array, "B S"],
        sharding: NamedSharding | None,
        layer: int | Int[Array, ""],
    ) -> Float[Array, "B C N H"]:
        """Returns attention output `[B, C, N, H]`.

        Args:
          x: Normalised hidden state of the queries, `[B, C, d_model]`.
          query: Queries.
          key: Keys.
          value: Values.
          row: Row of every query's own key.
          start: Row of the first key of every row's document.
          sharding: Of the residual stream; None: of one device.
          layer: Index in the decoder.
        """
        raise NotImplementedError

    def mix(self, x, query, key, value, segment_ids, sharding, layer):
        """Returns attention output `[B, T, N, H]` and None."""
        start, _ = document_bounds(segment_ids, *x.shape[:2])
        row = jnp.broadcast_to(jnp.arange(x.shape[1], dtype=jnp.int32), start.shape)
        return self.attend(x, query, key, value, row, start, sharding, layer), None

    def mix_next(self, x, query, key, value, cache, positions, num_tokens, layer):
        """Returns the extended cache and attention output `[B, C, N, H]`, NaN beyond its room."""
        del positions

        def attend(query, key, value, *, positions, key_positions):
            start = jnp.zeros((len(query), len(key_positions)), jnp.int32)
            return self.attend(x, query, key, value, positions, start, None, layer)

        return extend_dense_cache(cache, query, key, value, num_tokens, attend)

    def init_cache(self, batch_size, *, max_length=None, support_size=None) -> DenseCache:
        """Makes an empty cache with room for `max_length` tokens."""
        del support_size
        return init_dense_cache(batch_size, max_length, self.config, self.dtype)


def mean_keys(blocks: Blocks, key: Float[Array, "B S K H"]) -> Float32[Array, "B M K H"]:
    """The mean key of every block, in float32, without gradient."""
    return jax.lax.stop_gradient(blocks.gather(key.astype(jnp.float32)).mean(axis=2))


class BigBirdAttention(RememberingAttention):
    """Attention over a sliding window, the first blocks of the document, and random past blocks.

    BigBird (Zaheer et al. 2020, arXiv 2007.14062) made causal: global blocks are seen by all later
    queries, but see nothing more themselves. Of k keys in blocks, two fifths are global and three
    fifths random, the paper's shares, rounded. The queries of a block have the same random blocks,
    uniformly chosen among past blocks that are neither global nor wholly in the window of each of
    these queries, always the same for a layer, KV head and block of queries. Of these blocks, a
    query sees in part those that reach into its window, so k + w keys is the most it can see.
    """

    def attend(self, x, query, key, value, row, start, sharding, layer):
        """Returns attention output `[B, C, N, H]`."""
        del x
        size, window = self.config.block_size, self.config.sliding_window
        num_keys, num_kv_heads = key.shape[1:3]
        num_global = round(self.config.num_selected // size * 2 / 5)
        blocks = whole_blocks(start, size)
        queries = find_queries(row, start, size)
        own = (queries.own - queries.start) // size
        numbers = self._random_blocks(own, -(-num_keys // size), num_kv_heads, layer)
        everyone = jnp.arange(num_global, dtype=jnp.int32)
        everyone = jnp.broadcast_to(everyone, (*numbers.shape[:-1], num_global))
        numbers = jnp.concatenate([everyone, numbers], axis=-1)
        begin = queries.start[..., None, None] + numbers * size
        of_row = jax.vmap(lambda of_row, begin: of_row.at[begin].get(mode="clip"))
        is_past = numbers < own[..., None, None]
        choice = jnp.where(is_past, of_row(blocks.of_row, begin), blocks.begin.shape[1])
        # Queries of global blocks see all of these so far.
        first = jnp.where(own < num_global, queries.start, row - window + 1)
        first = jnp.maximum(first, queries.start)
        reach = max(window, num_global * size) - 1
        choice = choice[..., None, :]
        return attend_to_blocks(query, key, value, blocks, choice, row, first, reach, sharding)

    def _random_blocks(self, own, num_blocks, num_kv_heads, layer) -> Int32[Array, "B C K n"]:
        """The numbers of the random blocks of queries in these ones; of none one too large.

        Args:
          own: Numbers of the queries' own blocks, `[B, C]`.
          num_blocks: That a document has at most.
          num_kv_heads: K.
          layer: Index in the decoder.
        """
        size, window = self.config.block_size, self.config.sliding_window
        count = self.config.num_selected // size
        num_global = round(count * 2 / 5)
        number = jnp.arange(num_blocks, dtype=jnp.int32)

        def choose(own):
            scores = uniform_numbers(layer, own[..., None], number, num_heads=num_kv_heads)
            begin, own = number * size, own[..., None]
            candidates = (number >= num_global) & (number < own)
            candidates &= begin <= own * size + size - 1 - window
            scores = jnp.moveaxis(scores, -1, -2)
            return best_blocks(scores, candidates[..., None, :], count - num_global)

        # Of every block once, unless there are fewer queries.
        once = own.size >= num_blocks
        choosing = number[None] if once else own
        chunk_size = queries_at_a_time(choosing.shape[1], num_blocks)
        chosen = over_query_chunks(choose, choosing, chunk_size=chunk_size)
        return chosen[0].at[own].get(mode="clip") if once else chosen


class MobaAttention(RememberingAttention):
    """Attention over the query's own block and the past blocks with the best mean keys.

    Mixture of Block Attention (Lu et al. 2025, arXiv 2502.13189). Every query head by itself takes
    the blocks whose mean key has the largest product with the query; no gradient flows through the
    choice. There is no window: own and past blocks together hold k + w keys.
    """

    def attend(self, x, query, key, value, row, start, sharding, layer):
        """Returns attention output `[B, C, N, H]`."""
        del x, layer
        size = self.config.block_size
        count = (self.config.num_selected + self.config.sliding_window) // size - 1
        blocks = whole_blocks(start, size)
        means = mean_keys(blocks, key)

        def choose(query, row):
            queries = find_queries(row, start, size)
            scores = einsum_f32("bckgh,bmkh->bckgm", by_kv_head(query, key.shape[2]), means)
            return best_blocks(scores, queries.past(blocks)[:, :, None, None], count)

        chunk_size = queries_at_a_time(row.shape[1], means.shape[1])
        choice = over_query_chunks(choose, jax.lax.stop_gradient(query), row, chunk_size=chunk_size)
        own = find_queries(row, start, size).own
        return attend_to_blocks(query, key, value, blocks, choice, row, own, size - 1, sharding)
