"""Which queries see which keys in tiles, against sets written from the definitions."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from sparsek_jax.nn.alternatives import tiles
from sparsek_jax.nn.alternatives.tiles import Hashed, Sought
from tests.ops.oracle import document_starts

TILE = 4
ROUNDS, BUCKETS = 2, 5


@pytest.fixture(autouse=True, scope="module")
def small_tiles():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiles, "_TILE", TILE)
        yield


compiled = functools.cache(lambda function, *static: jax.jit(function, static_argnums=static))
random_cases = functools.partial(given, seed=st.integers(0, 2**32 - 1))
shares = st.sampled_from([0, 0.1, 0.5, 1])


def pairs(parts, num_queries, num_keys):
    """What is seen in all tiles, each pair once."""
    found = []
    for part in parts:
        tile, query, key = np.nonzero(part.seen)
        found += zip(part.query[tile, query].tolist(), part.key[tile, key].tolist(), strict=True)
    assert len(found) == len(set(found))
    assert all(query < num_queries and 0 <= key < num_keys for query, key in found)
    return set(found)


def skewed(rng, count, shape, rare):
    """Numbers up to `count`: the first, but for a share of any."""
    return np.where(rng.random(shape) < rare, rng.integers(0, count, shape), 0)


def documents(rng, length):
    ids = np.cumsum(rng.random(length) < rng.choice([0, 0.1, 0.5]))
    return document_starts(ids, length)


@random_cases(sizes=st.sampled_from([(1, 6, 9), (7, 17, 2), (41, 1, 9), (41, 6, 9)]), rare=shares)
@settings(max_examples=60)
def test_groups_are_cut_into_tiles_in_order(seed, sizes, rare):
    size, num_groups, most = sizes
    group = skewed(np.random.default_rng(seed), num_groups + 1, size, rare)
    gather = compiled(tiles.gather_groups, 1, 2)
    member, of_tile = (
        np.asarray(x) for x in gather(jnp.asarray(group, jnp.int32), num_groups, most)
    )
    for number in range(num_groups):
        own = member[of_tile == number]
        exists = own.reshape(-1) < size
        members = np.flatnonzero(group == number)
        assert len(own) == -(-len(members) // min(TILE, most))
        # All that is lacking is lacking at the end.
        np.testing.assert_array_equal(own.reshape(-1)[exists], members)
        assert np.all(np.diff(exists.astype(int)) <= 0)
    assert np.all(member[of_tile == num_groups] == size)


@random_cases(sizes=st.sampled_from([(3, 2, 8), (21, 30, 1), (21, 30, 3)]))
@settings(max_examples=60)
def test_chosen_blocks_are_seen_once_up_to_the_end(seed, sizes):
    num_queries, num_keys, size = sizes
    rng = np.random.default_rng(seed)
    most = max(num_keys // size, 1)
    start = documents(rng, num_keys)
    begins = [t for t in range(num_keys) if (t - start[t]) % size == 0]
    begins = [t for t in begins if t + size <= num_keys and start[t + size - 1] == start[t]]
    begin = np.full(most, num_keys)
    begin[: len(begins)] = begins
    # Some of the same for all, and some of none.
    scores = rng.random((num_queries, most)) + rng.choice([0, 1]) * rng.random(most)
    choice = np.argsort(scores, axis=1)[:, : min(most, 3)]
    choice = np.where((rng.random(choice.shape) < 0.2) | (choice >= len(begins)), most, choice)
    end = rng.integers(0, num_keys + 1, num_queries)
    expected = {
        (query, row)
        for query, blocks in enumerate(choice)
        for block in blocks[blocks < most]
        for row in range(begin[block], begin[block] + size)
        if row < end[query]
    }
    choice, begin, end = (jnp.asarray(x, jnp.int32) for x in (choice, begin, end))
    part = compiled(tiles.block_tiles, 2, 4)(choice, begin, size, end, num_keys)
    assert pairs([part], num_queries, num_keys) == expected


def band_and_buckets(row, first, queries, keys, groups, window, most):
    num_keys = len(keys[0])
    band = tiles.band_tiles(row, first, groups, window - 1, num_keys)
    return [band, *tiles.bucket_tiles(queries, keys, BUCKETS, most, len(row) + window)]


# Keys, rows of queries, heads at each of them, the window, and the most keys of a bucket.
@random_cases(
    sizes=st.sampled_from([(50, 50, 1, 14, 3), (50, 50, 2, 1, 4), (19, 6, 7, 60, 9)]), rare=shares
)
# One document, all in one bucket.
@example(seed=1, sizes=(50, 50, 2, 1, 4), rare=0)
@settings(max_examples=40)
def test_bands_and_buckets_hold_every_key_once(seed, sizes, rare):
    num_keys, num_rows, groups, window, most = sizes
    rng = np.random.default_rng(seed)
    start = documents(rng, num_keys)
    row = rng.integers(num_keys - num_rows + 1) + np.arange(num_rows)
    first = np.maximum(row - window + 1, start[row])
    of_key = skewed(rng, BUCKETS, (num_keys, ROUNDS), rare)
    of_query = skewed(rng, BUCKETS, (num_rows * groups, ROUNDS), rare)
    is_in = of_key[..., None] == np.arange(BUCKETS)
    counts = np.concatenate([np.zeros((1, ROUNDS, BUCKETS), int), np.cumsum(is_in, axis=0)])

    def count(rows, bucket):
        return np.take_along_axis(counts[rows], bucket[..., None], axis=2)[..., 0]

    def repeated(x):
        return np.repeat(x, groups)

    number = count(np.arange(num_keys), of_key)
    end = count(repeated(first), of_query)
    oldest = np.maximum(end - most, count(repeated(start[row]), of_query))
    expected = set()
    for query, t in enumerate(repeated(row)):
        local = first[query // groups]
        seen = set(range(local, t + 1))
        for i in range(ROUNDS):
            older = [j for j in range(start[t], local) if of_key[j, i] == of_query[query, i]]
            seen |= set(older[-most:])
        expected |= {(query, key) for key in seen}

    tables = (row, first, Sought(of_query, oldest, end), Hashed(of_key, number))
    tables = jax.tree.map(lambda x: jnp.asarray(x, jnp.int32), tables)
    parts = compiled(band_and_buckets, 4, 5, 6)(*tables, groups, window, most)
    assert pairs(parts, num_rows * groups, num_keys) == expected


def test_gradients_of_products_are_of_cotangents_in_their_dtype():
    rng = np.random.default_rng(3)
    x, y = (jnp.asarray(rng.standard_normal((2, 16, 16)), jnp.bfloat16) for _ in range(2))
    cotangent = rng.standard_normal((2, 16, 16)).astype(np.float32)
    _, vjp = jax.vjp(functools.partial(tiles._product, "nqh,nsh->nqs"), x, y)
    rounded = jnp.asarray(cotangent).astype(x.dtype).astype(jnp.float32)
    for gradient, expected in zip(vjp(cotangent), vjp(rounded), strict=True):
        np.testing.assert_array_equal(gradient, expected)
