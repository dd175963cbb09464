"""Attention over blocks of keys that differ between queries.

A block that one query does not see, a later one may: generation has to remember all keys. Logits
of all keys so far are computed, and those of keys that are not seen masked, for one chunk of
queries at a time: memory is linear in T, while time is that of dense attention.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Float32, Int, Int32, Shaped

from sparsek_jax.nn.alternatives.selection import uniform_numbers
from sparsek_jax.nn.attention import Attention
from sparsek_jax.nn.cache import DenseCache, extend_dense_cache, init_dense_cache
from sparsek_jax.nn.causal import by_platform, over_query_chunks
from sparsek_jax.nn.sharding import rows_and_heads
from sparsek_jax.ops.products import einsum_f32
from sparsek_jax.ops.selection import document_bounds

# Queries that are given the same keys: with more, fewer of the logits that causality masks are
# skipped, with fewer, compiling takes longer.
_STRIPE = 1024
_MOST_STRIPES = 4


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
    """Where in rows of keys a chunk of queries is.

    Attributes:
      row: Row of each query's own key.
      start: Row of the first key of its document.
      own: Row of the first key of its own block.
    """

    row: Int32[Array, "B C"]
    start: Int32[Array, "B C"]
    own: Int32[Array, "B C"]

    def since(self, first: Int[Array, "B C"], num_keys: int) -> Bool[Array, "B 1 1 C S"]:
        """Which keys are in row `first` of the query or later, but no later than the query."""
        rows = jnp.arange(num_keys)
        seen = (rows >= first[..., None]) & (rows <= self.row[..., None])
        return seen[:, None, None]

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


def in_best_blocks(
    scores: Float32[Array, "B #K #G C M"],
    candidates: Bool[Array, "B C M"],
    blocks: Blocks,
    count: int,
) -> Bool[Array, "B #K #G C S"]:
    """Which keys are in the `count` candidates of the highest scores; of equals, the earlier."""
    scores = jnp.where(candidates[:, None, None], scores, -jnp.inf)
    best, index = jax.lax.top_k(scores, min(count, scores.shape[-1]))
    index = jnp.where(best > -jnp.inf, index, scores.shape[-1])
    return jnp.any(blocks.of_row[:, None, None, None, :, None] == index[..., None, :], axis=-1)


def attend_to_seen(
    query: Float[Array, "B C N H"],
    key: Float32[Array, "B S K H"],
    value: Float32[Array, "B S K H"],
    seen: Bool[Array, "B #K #G C S"],
    sharding: NamedSharding | None,
) -> Float[Array, "B C N H"]:
    """Softmax attention over the keys that are seen, at least one by every query.

    Keys and values are rounded to the dtype of the queries here, so that their gradient, which is a
    sum over chunks of queries, is summed in float32.

    Args:
      query: A chunk of queries.
      key: Keys.
      value: Values.
      seen: Which of them every query sees.
      sharding: Of the residual stream; None: of one device, or XLA finds one.
    """
    batch, size, num_heads, _ = query.shape
    num_keys, num_kv_heads = key.shape[1:3]
    groups = num_heads // num_kv_heads
    seen = jnp.broadcast_to(seen, (batch, num_kv_heads, groups, size, num_keys))

    def masked(backend, query, key, value, seen):
        return jax.nn.dot_product_attention(query, key, value, mask=seen, implementation=backend)

    # JAX has no gradient of cuDNN's attention for an odd length, and XLA may split heads and leave
    # the mask whole, which cuDNN refuses (0.11.2).
    by_xla = sharding is None and jax.device_count() > 1
    cuda = "xla" if by_xla or size % 2 or num_keys % 2 else "cudnn"
    attend = functools.partial(
        by_platform, functools.partial(masked, cuda), functools.partial(masked, "xla")
    )
    if sharding is not None and sharding.num_devices > 1:
        rows, heads = rows_and_heads(sharding, num_kv_heads)
        by_head = P(rows, None, heads)
        attend = jax.shard_map(
            attend,
            mesh=sharding.mesh,
            in_specs=(by_head, by_head, by_head, P(rows, heads)),
            out_specs=by_head,
        )
    key, value = key.astype(query.dtype), value.astype(query.dtype)
    return attend(query, key, value, seen.reshape(batch, num_heads, size, num_keys))


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
        length = x.shape[1]
        start, _ = document_bounds(segment_ids, *x.shape[:2])
        row = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), start.shape)
        # The stripes' gradients of keys and values are summed here: in float32.
        key, value = (array.astype(jnp.float32) for array in (key, value))
        stripe = -(-length // _MOST_STRIPES)
        stripe = max(stripe + -stripe % _STRIPE, 1)
        outs = []
        for first in range(0, length, stripe):
            end = first + stripe
            queries = [array[:, first:end] for array in (x, query)]
            keys = [array[:, :end] for array in (key, value)]
            outs.append(
                self.attend(*queries, *keys, row[:, first:end], start[:, :end], sharding, layer)
            )
        return jnp.concatenate(outs, axis=1), None

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


class BlockAttention(RememberingAttention):
    """Attention over the keys that `seen_keys` marks."""

    def seen_keys(
        self,
        query: Float[Array, "B C N H"],
        queries: Queries,
        blocks: Blocks,
        means: Float32[Array, "B M K H"],
        layer: int | Int[Array, ""],
    ) -> Bool[Array, "B #K #G C S"]:
        """Returns which keys a chunk of queries sees.

        Args:
          query: The queries.
          queries: Where they are.
          blocks: Of the keys.
          means: The mean key of every block, without gradient.
          layer: Index in the decoder.
        """
        raise NotImplementedError

    def attend(self, x, query, key, value, row, start, sharding, layer):
        """Returns attention output `[B, C, N, H]`."""
        del x
        blocks = whole_blocks(start, self.config.block_size)
        key, value = (array.astype(jnp.float32) for array in (key, value))
        means = jax.lax.stop_gradient(blocks.gather(key).mean(axis=2))

        def attend(query, row):
            queries = find_queries(row, start, blocks.size)
            seen = self.seen_keys(query, queries, blocks, means, layer)
            return attend_to_seen(query, key, value, seen, sharding)

        return over_query_chunks(attend, query, row)


class BigBirdAttention(BlockAttention):
    """Attention over a sliding window, the first blocks of the document, and random past blocks.

    BigBird (Zaheer et al. 2020, arXiv 2007.14062) made causal: global blocks are seen by all later
    queries, but see nothing more themselves. Of k keys in blocks, two fifths are global and three
    fifths random, the paper's shares, rounded. The queries of a block have the same random blocks,
    uniformly chosen among past blocks that are neither global nor wholly in the window of each of
    these queries, always the same for a layer, KV head and block of queries. Of these blocks, a
    query sees in part those that reach into its window, so k + w keys is the most it can see.
    """

    def seen_keys(self, query, queries, blocks, means, layer):
        """Returns which keys a chunk of queries sees, `[B, K, 1, C, S]`."""
        del query
        size, window = blocks.size, self.config.sliding_window
        num_kv_heads, num_keys = means.shape[2], blocks.of_row.shape[1]
        count = self.config.num_selected // size
        num_global = round(count * 2 / 5)
        first_local = queries.start + num_global * size
        candidates = queries.past(blocks)
        candidates &= blocks.begin[:, None] >= first_local[..., None]
        candidates &= blocks.begin[:, None] <= (queries.own + size - 1 - window)[..., None]
        # Blocks by their numbers in the document, which are the same in every row.
        number = (blocks.begin[:, None] - queries.start[..., None]) // size
        own_number = (queries.own - queries.start) // size
        scores = uniform_numbers(layer, own_number[..., None], number, num_heads=num_kv_heads)
        chosen = in_best_blocks(
            jnp.moveaxis(scores, -1, 1)[:, :, None], candidates, blocks, count - num_global
        )
        first = jnp.maximum(queries.start, queries.row - window + 1)
        local, everything = (queries.since(x, num_keys) for x in (first, queries.start))
        is_global = jnp.arange(num_keys) < first_local[..., None]
        return chosen | local | (everything & is_global[:, None, None])


class MobaAttention(BlockAttention):
    """Attention over the query's own block and the past blocks with the best mean keys.

    Mixture of Block Attention (Lu et al. 2025, arXiv 2502.13189). Every query head by itself takes
    the blocks whose mean key has the largest product with the query; no gradient flows through the
    choice. There is no window: own and past blocks together hold k + w keys.
    """

    def seen_keys(self, query, queries, blocks, means, layer):
        """Returns which keys a chunk of queries sees, `[B, K, G, C, S]`."""
        del layer
        by_head = by_kv_head(query, means.shape[2])
        scores = einsum_f32("bckgh,bmkh->bkgcm", by_head, means)
        count = (self.config.num_selected + self.config.sliding_window) // blocks.size - 1
        chosen = in_best_blocks(scores, queries.past(blocks), blocks, count)
        return chosen | queries.since(queries.own, blocks.of_row.shape[1])
