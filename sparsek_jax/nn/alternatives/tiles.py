"""Attention of queries over keys that differ between them, in time linear in what they see.

Queries that see some of the same keys are put into one tile with these keys. A tile's logits are
one small matrix product; a query's softmax is over all keys that it sees in all of its tiles. Tiles
are lists of row numbers, made anew for every row of the batch and KV head: what a query sees may
depend on the query, as long as many queries see the same.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Float32, Int32, PyTree, Shaped

from sparsek_jax.nn.sharding import rows_and_heads
from sparsek_jax.ops.products import einsum_f32

_TILE = 64  # queries
_ALIGNED = 16  # keys, for products of matrices
# Of a query and a key, whose logits are in memory at a time; of one row and KV head always all.
_PAIRS = 1 << 27
_SUMS = ("largest", "total", "out")  # over tiles, of which the gradient does not make them again


class Tiles(NamedTuple):
    """Tiles of one row of the batch and KV head.

    A pair of a query and a key is seen in one tile at most.

    Attributes:
      query: Numbers of a tile's queries; Q, the number of all, where there is none.
      key: Rows of its keys; S, the number of all, or more where there is none.
      seen: Which of the keys each of the queries sees.
    """

    query: Int32[Array, "n q"]
    key: Int32[Array, "n s"]
    seen: Bool[Array, "n q s"]


def attend_in_tiles(
    make_tiles: Callable[[PyTree], list[Tiles]],
    tables: PyTree,
    query: Float[Array, "B C N H"],
    key: Float[Array, "B S K H"],
    value: Float[Array, "B S K H"],
    sharding: NamedSharding | None,
) -> Float[Array, "B C N H"]:
    """Softmax attention over the keys that are seen; NaN for a query that sees none.

    Sums over tiles are made by scattered additions: on a GPU, two runs differ by rounding.

    Args:
      make_tiles: Makes tiles of one member of the batch and KV head, whose queries are numbered
        from the first on, and at each by head.
      tables: Its argument for all of them: arrays `[B, K, ...]`.
      query: Queries.
      key: Keys.
      value: Values.
      sharding: Of the residual stream; None: of one device, or XLA finds one.
    """
    batch, num_queries, _, head_dim = query.shape
    num_kv_heads = key.shape[2]
    by_head = query.reshape(batch, num_queries, num_kv_heads, -1, head_dim)
    arrays = (jnp.swapaxes(by_head, 1, 2), jnp.swapaxes(key, 1, 2), jnp.swapaxes(value, 1, 2))

    @functools.partial(jax.checkpoint, policy=jax.checkpoint_policies.save_only_these_names(*_SUMS))
    def attend_one(tables, query, key, value):
        flat = query.reshape(-1, head_dim)
        return _attend(flat, key, value, make_tiles(tables)).reshape(query.shape)

    def attend(*arrays):
        rows, heads = arrays[1].shape[:2]
        flat = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), arrays)
        pairs = sum(x.seen.size for x in jax.eval_shape(make_tiles, jax.tree.map(_first, flat[0])))
        most = max(_PAIRS // max(pairs, 1), 1)
        at_a_time = max(
            x for x in range(1, rows * heads + 1) if rows * heads % x == 0 and x <= most
        )
        split = jax.tree.map(lambda x: x.reshape(-1, at_a_time, *x.shape[1:]), flat)
        out = jax.lax.map(lambda some: jax.vmap(attend_one)(*some), split)
        return out.reshape(rows, heads, *out.shape[2:])

    if sharding is not None and sharding.num_devices > 1:
        spec = P(*rows_and_heads(sharding, num_kv_heads))
        attend = jax.shard_map(attend, mesh=sharding.mesh, in_specs=spec, out_specs=spec)
    return jnp.swapaxes(attend(tables, *arrays), 1, 2).reshape(query.shape)


def for_every_head(x: Shaped[Array, "B ..."], num_kv_heads: int) -> Shaped[Array, "B K ..."]:
    """What is the same for all KV heads, as a table."""
    return jnp.broadcast_to(x[:, None], (x.shape[0], num_kv_heads, *x.shape[1:]))


def _first(x):
    return jax.ShapeDtypeStruct(x.shape[1:], x.dtype)


def _attend(
    query: Float[Array, "Q H"],
    key: Float[Array, "S H"],
    value: Float[Array, "S H"],
    parts: list[Tiles],
) -> Float[Array, "Q H"]:
    dtype = query.dtype
    # Gradients of what is gathered are summed in float32, products are of the given dtype.
    query, key, value = (x.astype(jnp.float32) for x in (query, key, value))

    # Where there is none: of rows in bounds, one would get all these gradients of zero, in turn.
    def rows(x, index, dtype=dtype):
        return x.at[index].get(mode="fill", fill_value=0).astype(dtype)

    def logits(tiles):
        products = _product("nqh,nsh->nqs", rows(query, tiles.query), rows(key, tiles.key))
        # In form not a constant, of which the loop's gradient would keep a copy for every pair.
        unseen = tiles.query[0, 0] * 0.0 - jnp.inf
        return jnp.where(tiles.seen, products * query.shape[-1] ** -0.5, unseen)

    parts = [(tiles, logits(tiles)) for tiles in parts]
    largest = jnp.full(query.shape[:1], -jnp.inf)
    for tiles, x in parts:
        largest = largest.at[tiles.query].max(jax.lax.stop_gradient(x).max(axis=-1), mode="drop")
    largest = checkpoint_name(largest, "largest")
    total, out = jnp.zeros(query.shape[:1]), jnp.zeros(query.shape)
    for tiles, x in parts:
        weights = jnp.exp(x - rows(largest, tiles.query, jnp.float32)[..., None])
        total = total.at[tiles.query].add(weights.sum(axis=-1), mode="drop")
        seen = _product("nqs,nsh->nqh", weights.astype(dtype), rows(value, tiles.key))
        out = out.at[tiles.query].add(seen, mode="drop")
    total, out = checkpoint_name(total, "total"), checkpoint_name(out, "out")
    return (out / total[:, None]).astype(dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _product(
    subscripts: str, x: Float[Array, "n _ _"], y: Float[Array, "n _ _"]
) -> Float32[Array, "n _ _"]:
    """`einsum_f32`, whose gradient's products too are of the given dtype."""
    return einsum_f32(subscripts, x, y)


def _product_fwd(subscripts, x, y):
    return einsum_f32(subscripts, x, y), (x, y)


def _product_bwd(subscripts, operands, cotangent):
    x, y = operands
    of_x, of_y, of_product = subscripts.replace("->", ",").split(",")
    cotangent = cotangent.astype(x.dtype)
    d_x = einsum_f32(f"{of_product},{of_y}->{of_x}", cotangent, y)
    d_y = einsum_f32(f"{of_product},{of_x}->{of_y}", cotangent, x)
    return d_x.astype(x.dtype), d_y.astype(y.dtype)


_product.defvjp(_product_fwd, _product_bwd)


def band_tiles(
    row: Int32[Array, " C"], first: Int32[Array, " C"], groups: int, reach: int, num_keys: int
) -> Tiles:
    """Tiles of what every query sees from one row up to its own.

    Args:
      row: Rows of the queries' own keys, one after the other.
      first: First row that each sees.
      groups: Queries at every row.
      reach: The most rows that one sees before its own.
      num_keys: S.
    """
    (count,) = row.shape
    size = min(max(_TILE // groups, 1), count)
    number = jnp.arange(count + -count % size, dtype=jnp.int32).reshape(-1, size)
    newest = row.at[number].get(mode="clip")
    width = min(reach, num_keys - 1) + size
    width += -width % _ALIGNED
    key = newest[:, :1] + size + jnp.arange(-width, 0, dtype=jnp.int32)
    oldest = jnp.where(number < count, first.at[number].get(mode="clip"), num_keys)
    rows = key[:, None]
    seen = (rows >= oldest[..., None]) & (rows <= newest[..., None]) & (rows < num_keys)
    query = number[..., None] * groups + jnp.arange(groups, dtype=jnp.int32)
    return Tiles(
        jnp.minimum(query.reshape(len(number), -1), count * groups),
        jnp.where(key < 0, num_keys, key),
        jnp.repeat(seen, groups, axis=1),
    )


def gather_groups(
    group: Int32[Array, " P"], num_groups: int, most: int
) -> tuple[Int32[Array, "n tile"], Int32[Array, " n"]]:
    """Cuts every group's members into tiles.

    Args:
      group: Of every member; `num_groups` for one of none.
      num_groups: How many groups there are.
      most: The most members of a group.

    Returns:
      The numbers of every tile's members, P where there is none, and the tile's group, `num_groups`
      for a tile of none.
    """
    (size,) = group.shape
    tile = min(_tile_size(size // num_groups), most)
    # Counting spares a GPU a sort. With as many members as groups in a chunk, its memory is linear.
    chunk_size = max(num_groups, _TILE)
    chunks = jnp.pad(group, (0, -size % chunk_size), constant_values=num_groups)
    chunks = chunks.reshape(-1, chunk_size)

    def count_chunk(chunk):
        first = chunk * chunk_size
        place = first + jnp.arange(chunk_size, dtype=jnp.int32)
        is_earlier = (first[:, None] <= place) & (place < place[:, None])
        number = jnp.sum(is_earlier, axis=1, dtype=jnp.int32)
        is_in = chunk[:, None] == jnp.arange(num_groups, dtype=jnp.int32)
        return number, jnp.sum(is_in, axis=0, dtype=jnp.int32)

    at_a_time = max(_PAIRS // chunk_size**2, 1)
    number, count = jax.lax.map(count_chunk, chunks, batch_size=at_a_time)
    up_to = jnp.cumsum(count, axis=0)
    number += jnp.take_along_axis(up_to - count, chunks, axis=1, mode="clip")

    count = -(-up_to[-1] // tile)
    # Every group's last tile may be short of members.
    num_tiles = min(size, size // tile + num_groups)
    place = (jnp.cumsum(count) - count).at[chunks].get(mode="clip") * tile + number
    place = jnp.where(chunks < num_groups, place, num_tiles * tile).reshape(-1)
    members = jnp.arange(len(place), dtype=jnp.int32)
    member = jnp.full(num_tiles * tile, size, jnp.int32).at[place].set(members, mode="drop")
    return member.reshape(num_tiles, tile), number_parts(count, num_tiles)[0]


def _tile_size(count: int) -> int:
    """How many to put into a tile of groups that have so many each, about."""
    return min(_TILE, max(1 << count.bit_length(), 8))


def number_parts(
    count: Int32[Array, " G"], most: int
) -> tuple[Int32[Array, " n"], Int32[Array, " n"]]:
    """Lists the parts of things that have several.

    Args:
      count: How many parts every thing has.
      most: How many to list; what is too many is of no thing.

    Returns:
      The thing that every part is of, G for none, and the part's number among those of the thing.
    """
    end = jnp.cumsum(count)
    part = jnp.arange(most, dtype=jnp.int32)
    things = jnp.arange(len(count), dtype=jnp.int32)
    thing = jnp.repeat(things, count, total_repeat_length=most)
    number = part - (end - count)[thing]
    return jnp.where(part < end[-1], thing, len(count)), number


def block_tiles(
    choice: Int32[Array, "Q n"],
    begin: Int32[Array, " M"],
    size: int,
    end: Int32[Array, " Q"],
    num_keys: int,
) -> Tiles:
    """Tiles of the blocks that queries have chosen.

    Args:
      choice: Different blocks; M for none.
      begin: First row of every block.
      size: Keys of a block.
      end: Row from which on a query does not see chosen blocks.
      num_keys: S.
    """
    num_queries, count = choice.shape
    member, block = gather_groups(choice.reshape(-1), len(begin), num_queries)
    query = member // count
    key = begin.at[block].get(mode="fill", fill_value=num_keys)[:, None]
    key += jnp.arange(size, dtype=jnp.int32)
    end = end.at[query].get(mode="fill", fill_value=0)
    return Tiles(query, key, key[:, None] < end[..., None])


class Sought(NamedTuple):
    """Which keys queries see in their buckets, counted in each from the first in the row.

    Attributes:
      bucket: In every round of hashing.
      first: The first key of it that a query sees.
      end: The key after the last one.
    """

    bucket: Int32[Array, "Q R"]
    first: Int32[Array, "Q R"]
    end: Int32[Array, "Q R"]


class Hashed(NamedTuple):
    """Where keys are.

    Attributes:
      bucket: In every round of hashing.
      number: Of the key in its bucket, counted from the first in the row.
    """

    bucket: Int32[Array, "S R"]
    number: Int32[Array, "S R"]


def bucket_tiles(
    queries: Sought, keys: Hashed, num_buckets: int, most: int, span: int
) -> list[Tiles]:
    """Tiles of the keys in queries' buckets, for every round; what several rounds find, the first.

    Args:
      queries: What they see. Of those of one bucket, neither `first` nor `end` ever falls.
      keys: Where they are.
      num_buckets: Of a round.
      most: The most keys of a bucket that a query sees.
      span: The most keys of all buckets from the first query's `end` up to the last one's.
    """
    num_keys, rounds = keys.bucket.shape
    num_queries = len(queries.bucket)
    size = _tile_size(most - 1)
    parts = []
    for i in range(rounds):
        query, bucket = gather_groups(queries.bucket[:, i], num_buckets, num_queries)
        valid = query < num_queries
        # Rows of the keys, bucket by bucket.
        is_in = keys.bucket[:, i, None] == jnp.arange(num_buckets)
        count = jnp.sum(is_in, axis=0, dtype=jnp.int32)
        before = jnp.cumsum(count) - count
        place = before[keys.bucket[:, i]] + keys.number[:, i]
        rows = jnp.arange(num_keys, dtype=jnp.int32)
        order = jnp.zeros(num_keys, jnp.int32).at[place].set(rows, unique_indices=True)
        before = before.at[bucket].get(mode="clip")
        first, end = (x[:, i].at[query].get(mode="clip") for x in (queries.first, queries.end))
        lowest = jnp.where(valid, first, num_keys).min(axis=1)
        highest = jnp.where(valid, end, 0).max(axis=1)
        width = jnp.maximum(highest - lowest, 0)
        # A tile's keys are the most that its first query sees, and those up to the end of its last
        # one. The latter differ between tiles, as queries of one bucket lie one after the other.
        num_tiles = len(query) * (-(-most // size) + 1) + min(span, num_keys) // size
        tile, number = number_parts(-(-width // size), num_tiles)
        lowest, highest, before = (
            x.at[tile].get(mode="clip")[:, None] for x in (lowest, highest, before)
        )
        place = lowest + number[:, None] * size + jnp.arange(size, dtype=jnp.int32)
        exists = (place < highest) & (tile < len(bucket))[:, None]
        key = jnp.where(exists, order.at[before + place].get(mode="clip"), num_keys)
        query = query.at[tile].get(mode="fill", fill_value=num_queries)

        def finds(j, query=query, key=key):
            sought = Sought(*(x[:, j].at[query].get(mode="clip")[:, :, None] for x in queries))
            hashed = Hashed(*(x[:, j].at[key].get(mode="clip")[:, None] for x in keys))
            is_in = (sought.first <= hashed.number) & (hashed.number < sought.end)
            return is_in & (sought.bucket == hashed.bucket)

        seen = finds(i) & (query < num_queries)[:, :, None] & exists[:, None]
        for earlier in range(i):
            seen &= ~finds(earlier)
        parts.append(Tiles(query, key, seen))
    return parts
