"""Attention over hash buckets, against a mask written from the definition one query at a time."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sparsek_jax.nn import AttentionConfig, LshAttention
from sparsek_jax.nn.alternatives import tiles
from sparsek_jax.nn.alternatives.hashing import hash_buckets, random_rotations
from tests.nn.masks import assert_close, masked, with_gradients
from tests.ops.oracle import document_starts

CONFIG = AttentionConfig(
    kind="lsh", num_heads=6, num_kv_heads=2, head_dim=5, rotary_fraction=0.8, num_selected=8,
    sliding_window=6,
)  # fmt: skip
LENGTH = 53
# The id 1 comes back: a later document of the same id is another document.
IDS = np.array([np.repeat([1, 2, 1], [9, 1, 43]), np.repeat([0, 1, 1], [31, 2, 20])])
LAYER = 1


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(tiles, "_TILE", 4)


def make(**changes):
    return LshAttention(dataclasses.replace(CONFIG, **changes), 8, rngs=nnx.Rngs(0))


def inputs(config, length, seed=0):
    """Near four directions, so that buckets of queries and keys fill up; and weights."""
    rng = np.random.default_rng(seed)
    n, k, h = config.num_heads, config.num_kv_heads, config.head_dim
    shapes = [(2, length, heads, h) for heads in (n, k, k, n)]
    query, key, value, weight = (rng.standard_normal(s).astype(np.float32) for s in shapes)
    directions = 3 * rng.standard_normal((4, h)).astype(np.float32)
    query, key = (x + directions[rng.integers(0, 4, x.shape[:-1])] for x in (query, key))
    return query, key, value, weight


def bucket(x, rotations):
    """Of one vector, one of 64."""
    products = x @ rotations
    return np.argmax([*products, *-products])


def sees(config, query, key, ids):
    """Whether a query sees a key, bool `[B, N, T, T]`, and in how many rounds it was found."""
    k, w = config.num_selected, config.sliding_window
    batch, length, num_heads, head_dim = query.shape
    groups = num_heads // config.num_kv_heads
    rotations = np.asarray(random_rotations(LAYER, config.num_kv_heads, head_dim), np.float64)
    mask = np.zeros((batch, num_heads, length, length), bool)
    times = np.zeros(mask.shape, int)
    for b, n in np.ndindex(batch, num_heads):
        start = document_starts(ids[b], length)
        for rotation in rotations[n // groups]:
            of_query = [bucket(x, rotation) for x in query[b, :, n]]
            of_key = [bucket(x, rotation) for x in key[b, :, n // groups]]
            for t in range(length):
                older = range(start[t], t - w + 1)
                found = [j for j in older if of_key[j] == of_query[t]][-(k // 4) :]
                times[b, n, t, found] += 1
        for t in range(length):
            mask[b, n, t, max(start[t], t - w + 1) : t + 1] = True
    return mask | (times > 0), times


@jax.jit
def expected(mask, *arrays):
    return with_gradients(lambda *qkv: masked(*qkv, mask), *arrays)


@pytest.mark.parametrize(
    ("length", "changes", "packed"),
    [
        (LENGTH, {}, True),
        (LENGTH, {"num_selected": 4, "sliding_window": 1, "num_heads": 2}, True),
        (29, {"num_selected": 64, "num_heads": 4, "num_kv_heads": 1}, False),
        (5, {}, False),
    ],
    ids=["three heads per key head", "one", "k > T", "T < w"],
)
def test_outputs_and_gradients_are_those_of_masks(length, changes, packed):
    layer = make(**changes)
    config, arrays = layer.config, inputs(layer.config, length)
    ids = IDS[:, :length] if packed else np.zeros((2, length), int)
    x = jnp.zeros((2, length, 8))

    @jax.jit
    def run(*arrays):
        def attend(*qkv):
            return layer.mix(x, *qkv, jnp.asarray(ids) if packed else None, None, LAYER)[0]

        return with_gradients(attend, *arrays)

    wide = [array.astype(np.float64) for array in arrays]
    mask, times = sees(config, *wide[:2], ids)
    # Keys of one round and of several, no more than the budget.
    assert length == 5 or {0, 1, 2} <= set(np.unique(times))
    assert mask.sum(axis=3).max() <= config.num_selected + config.sliding_window
    with jax.enable_x64(True):
        truth = expected(mask, *wide)
    assert_close(run(*arrays), truth)


def seen_keys(layer, query, key, ids):
    """Which keys the queries see, `[B, N, T, T]`: those whose values have a gradient."""
    x, value = jnp.zeros((*query.shape[:2], 8)), jnp.zeros_like(key)

    def head_sums(value):
        out, _ = layer.mix(x, query, key, value, jnp.asarray(ids), None, LAYER)
        return jnp.moveaxis(out[..., 0], 1, 2)

    gradient = jnp.abs(jax.jit(jax.jacrev(head_sums))(value)[..., 0])
    # Of values of the query's own member of the batch and, there, of any KV head.
    gradient = jnp.einsum("bntbjk->bntj", gradient)
    return np.asarray(gradient) > 0


def test_no_key_of_the_future_or_of_another_document_and_no_more_than_the_budget():
    layer = make()
    # All in one bucket: every round would have more keys than its share.
    query, key = np.ones((2, LENGTH, 6, 5), np.float32), np.ones((2, LENGTH, 2, 5), np.float32)
    seen = seen_keys(layer, query, key, IDS)
    start = np.array([document_starts(ids, LENGTH) for ids in IDS])
    for b, t in np.ndindex(2, LENGTH):
        # The newest of all rounds are the same two.
        first = max(start[b, t], t - 6 + 1 - 8 // 4)
        expected_row = (np.arange(LENGTH) >= first) & (np.arange(LENGTH) <= t)
        np.testing.assert_array_equal(seen[b, :, t], np.broadcast_to(expected_row, (6, LENGTH)))


def test_a_far_key_in_the_direction_of_the_query_is_found():
    rng = np.random.default_rng(3)
    layer = make(head_dim=64, rotary_fraction=1.0)
    query, key = (rng.standard_normal((1, 61, n, 64)).astype(np.float32) for n in (6, 2))
    query[:, -1] = np.repeat(key[:, 7], 3, axis=1) * 2.5
    ids = np.zeros((1, 61), int)
    seen = seen_keys(layer, query, key, ids)
    assert seen[0, :, -1, 7].all()
    ids[:, :8] = 1  # another document
    seen = seen_keys(layer, query, key, ids)
    assert not seen[0, :, -1, :8].any()
    assert seen[0].sum(axis=-1).max() <= 8 + 6


def test_rotations_depend_on_layer_head_and_round_only():
    drawn = np.stack([random_rotations(layer, 2, 5) for layer in range(2)])
    assert drawn.shape == (2, 2, 4, 5, 32)
    assert len(np.unique(drawn)) == drawn.size
    with jax.default_prng_impl("rbg"):
        np.testing.assert_array_equal(random_rotations(1, 2, 5), drawn[1])
    with jax.enable_x64(True):
        again = random_rotations(1, 2, 5)
    assert again.dtype == jnp.float32
    np.testing.assert_array_equal(again, drawn[1])
    # Which must not change: a model was trained with them.
    np.testing.assert_allclose(drawn[1, 0, 0, 0, :2], [-2.442456, -2.035681], atol=1e-5)
    # Of equal products the first: a zero is in bucket 0.
    zero = jnp.zeros((1, 1, 2, 3, 5))
    np.testing.assert_array_equal(hash_buckets(zero, drawn[0]), 0)


def test_any_cut_of_a_document_gives_what_a_packed_row_gives():
    layer, begin = make(), 17
    length = LENGTH - begin
    arrays = inputs(CONFIG, LENGTH)[:3]
    ids = jnp.broadcast_to(jnp.arange(LENGTH) >= begin, (2, LENGTH)).astype(jnp.int32)
    x = jnp.zeros((2, LENGTH, 8))
    whole = jax.jit(lambda *qkv: layer.mix(x, *qkv, ids, None, LAYER)[0])(*arrays)[:, begin:]

    @jax.jit
    def step(cache, num_tokens, *qkv):
        return layer.mix_next(x, *qkv, cache, None, jnp.full(2, num_tokens), LAYER)

    rng = np.random.default_rng(4)
    for _ in range(5):
        cuts = np.sort(rng.choice(np.arange(1, length), 4, replace=False))
        cache, outs = layer.init_cache(2, max_length=length + 3), []
        for first, last in zip([0, *cuts], [*cuts, length], strict=True):
            # Chunks of one shape, filled up with what must not matter.
            filler = ((0, 0), (0, length - last + first), (0, 0), (0, 0))
            chunk = (
                np.pad(array[:, begin + first : begin + last], filler, constant_values=np.nan)
                for array in arrays
            )
            cache, out = step(cache, last - first, *chunk)
            outs.append(out[:, : last - first])
        np.testing.assert_array_equal(cache.length, length)
        np.testing.assert_allclose(jnp.concatenate(outs, axis=1), whole, rtol=1e-5, atol=1e-6)
