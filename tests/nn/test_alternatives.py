"""Selection without a scorer, against masks written from the definitions, in float64."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sparsek_jax.nn import (
    AttentionConfig,
    DenseAttention,
    KeyNormAttention,
    RandomAttention,
    SinkAttention,
    SparseKAttention,
    StridedAttention,
)
from sparsek_jax.nn.alternatives import LAYERS
from sparsek_jax.nn.alternatives.selection import uniform_numbers
from sparsek_jax.nn.config import KINDS, KINDS_WITH_PARAMETERS, has_scorer
from tests.nn.masks import assert_close, masked, with_gradients
from tests.ops.oracle import document_starts

CONFIG = AttentionConfig(
    num_heads=6,
    num_kv_heads=2,
    head_dim=5,
    rotary_fraction=0.8,
    num_selected=4,
    sliding_window=3,
    qk_norm=True,
)
LENGTH = 23
# The id 1 comes back: a later document of the same id is another document.
IDS = np.array([np.repeat([1, 2, 1], [7, 1, 15]), np.repeat([0, 1, 1], [13, 2, 8])])


KINDS_WITHOUT_SCORES = [SinkAttention, RandomAttention, KeyNormAttention, StridedAttention]


def make(kind, **changes):
    return kind(dataclasses.replace(CONFIG, **changes), 8, rngs=nnx.Rngs(0))


def sees(layer, key, ids, index):
    """Whether a query sees a key, bool `[B, K, T, T]`, one query at a time."""
    k, w = layer.config.num_selected, layer.config.sliding_window
    batch, length, num_heads, _ = key.shape
    mask = np.zeros((batch, num_heads, length, length), bool)
    for b, h, t in np.ndindex(batch, num_heads, length):
        start = document_starts(None if ids is None else ids[b], length)[t]
        pool = list(range(start, t - w + 1))
        sinks = pool[: layer.config.num_sinks]
        if isinstance(layer, SinkAttention):
            chosen = [j for j in pool if j - start < k]
        elif isinstance(layer, KeyNormAttention):
            chosen = sorted(pool, key=lambda j, x=key[b, :, h]: np.sum(x[j] ** 2))
        elif isinstance(layer, StridedAttention):
            chosen = sorted(pool, key=lambda j, s=start: (block(j - s), j), reverse=True)
        else:
            drawn = random_numbers(index)
            chosen = sorted(pool, key=lambda j, s=start, h=h, x=drawn: -x[j - s, h])
        chosen = [*sinks, *(j for j in chosen if j not in sinks)][:k]
        mask[b, h, t, [*chosen, *range(max(start, t - w + 1), t + 1)]] = True
    return mask


def block(position):
    """The largest power of two such that a position is the last of a block of so many."""
    size = 1
    while (position + 1) % (2 * size) == 0:
        size *= 2
    return size


@functools.cache
def random_numbers(index):
    """By position and KV head."""
    positions = jnp.arange(LENGTH)[None]
    layer, key = make(RandomAttention), jnp.zeros((1, LENGTH, 2, 5))
    return np.asarray(jax.jit(layer.importance)(key, positions, index))[0]


@jax.jit
def expected(mask, *arrays):
    return with_gradients(lambda *qkv: masked(*qkv, mask), *arrays)


@pytest.mark.parametrize(
    ("kind", "implementation", "length", "changes", "packed"),
    [
        (SinkAttention, "xla", LENGTH, {}, True),
        (RandomAttention, "xla", LENGTH, {"sliding_window": 0, "num_sinks": 2}, True),
        (KeyNormAttention, "xla", LENGTH, {}, True),
        (KeyNormAttention, "reference", LENGTH, {"gating": "straight_through"}, False),
        (SinkAttention, "reference", 5, {"num_selected": 9}, False),
        (StridedAttention, "xla", LENGTH, {"num_selected": 3}, True),
    ],
)
def test_outputs_and_gradients_are_those_of_masks(kind, implementation, length, changes, packed):
    layer = make(kind, implementation=implementation, **changes)
    rng = np.random.default_rng(0)
    shapes = [(2, length, heads, 5) for heads in (6, 2, 2, 6)]
    arrays = [rng.standard_normal(shape).astype(np.float32) for shape in shapes]
    ids = IDS[:, :length] if packed else None
    x = jnp.zeros((2, length, 8))

    @jax.jit
    def run(*arrays):
        def attend(*qkv):
            return layer.mix(x, *qkv, None if ids is None else jnp.asarray(ids), None, 1)[0]

        return with_gradients(attend, *arrays)

    mask = sees(layer, arrays[1].astype(np.float64), ids, index=1)
    with jax.enable_x64(True):
        truth = expected(mask, *(x.astype(np.float64) for x in arrays))
    assert_close(run(*arrays), truth)


def test_random_numbers_depend_on_layer_head_and_position_only():
    drawn = np.stack([random_numbers(index) for index in range(2)])
    assert len(np.unique(drawn)) == drawn.size
    assert 0 <= drawn.min() < 0.1
    assert 0.9 < drawn.max() < 1
    # Which must not change: a text that was begun goes on with what it has kept.
    np.testing.assert_allclose(drawn[1, :2, 0], [0.578832, 0.090836], atol=1e-6)
    with jax.default_prng_impl("rbg"):
        again = make(RandomAttention).importance(jnp.zeros((1, 1, 2, 5)), jnp.array([[6]]), 1)
    np.testing.assert_array_equal(again[0, 0], drawn[1, 6])
    with jax.enable_x64(True):
        again = uniform_numbers(1, jnp.array([6]), num_heads=2)
    assert again.dtype == jnp.float32
    np.testing.assert_array_equal(again[0], drawn[1, 6])


def parameters(layer, *arguments):
    state = nnx.state(nnx.eval_shape(lambda: layer(*arguments, rngs=nnx.Rngs(0))))
    return {path: math.prod(x.shape) for path, x in nnx.to_flat_state(state)}


def test_all_kinds_have_the_parameters_of_dense_attention_and_hardly_more():
    assert tuple(LAYERS) == KINDS
    config = AttentionConfig(num_heads=4, num_kv_heads=4, head_dim=64)
    dense = parameters(DenseAttention, config, 256)
    mlp = 3 * 256 * 768
    for kind, layer in LAYERS.items():
        own = parameters(layer, config, 256)
        assert dense.items() <= own.items()
        more = own.keys() - dense.keys()
        assert any(path[0] == "scorer" for path in more) == has_scorer(kind)
        others = any(path[0] != "scorer" for path in more)
        assert others == (kind in KINDS_WITH_PARAMETERS)
        assert sum(own.values()) + mlp < 1.01 * (sum(dense.values()) + mlp)


@pytest.mark.parametrize("kind", KINDS_WITHOUT_SCORES)
def test_there_is_neither_a_gate_nor_a_score_to_see(kind):
    layer = make(kind, implementation="reference")
    out, scores = jax.eval_shape(lambda x: layer(x, return_scores=True), jnp.zeros((2, LENGTH, 8)))
    assert (out.shape, scores) == ((2, LENGTH, 8), None)
    # What soft gates need is of no use, though the default gating is soft.
    assert layer.init_cache(2, support_size=8).sparsek.support is None


@pytest.mark.parametrize("implementation", ["xla", "reference"])
def test_where_all_selected_keys_are_sinks_nothing_is_left_to_learn(implementation):
    x = jax.random.normal(jax.random.key(1), (2, LENGTH, 8))
    changes = {"implementation": implementation, "num_selected": 2, "num_sinks": 2}
    sparsek, sinks = (
        jax.jit(make(kind, **changes))(x, segment_ids=jnp.asarray(IDS))
        for kind in (SparseKAttention, SinkAttention)
    )
    np.testing.assert_array_equal(sparsek, sinks)
