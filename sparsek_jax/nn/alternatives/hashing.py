"""Attention over the keys that locality-sensitive hashing puts into the query's buckets.

As with attention over blocks, a key that one query does not see, a later one may: generation has to
remember all keys.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float32, Int, Int32

from sparsek_jax.nn.alternatives.blocks import RememberingAttention, by_kv_head
from sparsek_jax.nn.alternatives.selection import layer_rng
from sparsek_jax.nn.alternatives.tiles import (
    Hashed,
    Sought,
    attend_in_tiles,
    band_tiles,
    bucket_tiles,
    for_every_head,
)
from sparsek_jax.nn.config import LSH_BUCKETS, LSH_ROUNDS
from sparsek_jax.ops.products import einsum_f32


def random_rotations(
    layer: int | Int[Array, ""], num_kv_heads: int, head_dim: int
) -> Float32[Array, "K R H M"]:
    """Directions, of a KV head and round, that with their opposites stand for the 2 M buckets."""
    shape = (num_kv_heads, LSH_ROUNDS, head_dim, LSH_BUCKETS // 2)
    return jax.random.normal(layer_rng(layer), shape, jnp.float32)


def hash_buckets(
    x: Float32[Array, "B S K G H"], rotations: Float32[Array, "K R H M"]
) -> Int32[Array, "B S K G R"]:
    """Bucket of every vector in every round: the direction that it has the largest part in.

    Of equals, those before their opposites, and then the first.
    """
    products = einsum_f32("bskgh,krhm->bskgrm", x, rotations)
    products = jnp.concatenate([products, -products], axis=-1)
    return jnp.argmax(products, axis=-1).astype(jnp.int32)


def count_earlier(bucket: Int32[Array, "B S K R"]) -> Int32[Array, "B S K R buckets"]:
    """How many keys of a bucket come before a row, of whatever document."""
    is_in = jax.nn.one_hot(bucket, LSH_BUCKETS, dtype=jnp.int32)
    return jnp.cumsum(is_in, axis=1) - is_in


def counts_at(
    counts: Int32[Array, "B S K R buckets"],
    row: Int32[Array, "B C"],
    bucket: Int32[Array, "B C K G R"],
) -> Int32[Array, "B C K G R"]:
    """The counts of these buckets at these rows, or at the nearest rows that exist."""
    heads, rounds = jnp.arange(counts.shape[2])[:, None, None], jnp.arange(counts.shape[3])

    def look_up(counts, row, bucket):
        return counts.at[row[:, None, None, None], heads, rounds, bucket].get(mode="clip")

    return jax.vmap(look_up)(counts, row, bucket)


class LshAttention(RememberingAttention):
    """Attention over a sliding window and older keys in the query's buckets.

    Angular hashing by random rotations, from Reformer (Kitaev et al. 2020, arXiv 2001.04451): in
    each of R rounds, a vector is in the bucket of the random direction that it is nearest to. Of
    every round, a query sees the k / R newest keys that are older than its window, of its document,
    in its bucket; a key of several rounds counts once. The directions are always the same for a
    layer, KV head and round. No gradient flows through the choice.

    Reformer differs in these: queries are its keys; it sorts by bucket and attends within chunks of
    what is sorted, so that what a query sees depends on the length of the text and on later keys;
    it has no window, and as many buckets as the text has chunks. Here each query head has buckets
    of its own, and their number is fixed.
    """

    def attend(self, x, query, key, value, row, start, sharding, layer):
        """Returns attention output `[B, C, N, H]`."""
        del x
        config = self.config
        num_keys, num_kv_heads = key.shape[1:3]
        groups = config.num_heads // num_kv_heads
        most = config.num_selected // LSH_ROUNDS
        rotations = random_rotations(layer, num_kv_heads, config.head_dim)
        key_bucket = hash_buckets(key.astype(jnp.float32)[:, :, :, None], rotations)
        counts = count_earlier(key_bucket[:, :, :, 0])
        rows = jnp.broadcast_to(jnp.arange(num_keys, dtype=jnp.int32), start.shape)
        number = counts_at(counts, rows, key_bucket)
        bucket = hash_buckets(by_kv_head(query, num_kv_heads), rotations)
        start = jnp.take_along_axis(start, row, axis=1, mode="clip")
        local = jnp.maximum(row - config.sliding_window + 1, start)
        end = counts_at(counts, local, bucket)
        # Documents do not overlap: the newest keys of one have the highest numbers of all so far.
        first = jnp.maximum(end - most, counts_at(counts, start, bucket))

        def make_tiles(tables):
            queries, keys, row, local = tables
            queries, keys = jax.tree.map(lambda x: x.reshape(-1, LSH_ROUNDS), (queries, keys))
            reach = config.sliding_window - 1
            band = band_tiles(row, local, groups, reach, num_keys)
            span = len(row) + config.sliding_window
            return [band, *bucket_tiles(queries, keys, LSH_BUCKETS, most, span)]

        by_head = [Sought(bucket, first, end), Hashed(key_bucket, number)]
        by_head = jax.tree.map(lambda x: jnp.moveaxis(x, 2, 1), by_head)
        by_row = (for_every_head(x, num_kv_heads) for x in (row, local))
        return attend_in_tiles(make_tiles, (*by_head, *by_row), query, key, value, sharding)
