"""SparseK beside linear attention to dropped keys, against masks of all pairs, in float64."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sparsek_jax.nn import AttentionConfig, SparseKAttention, SparseKLinearAttention
from sparsek_jax.nn.alternatives import chunkwise, sparsek_linear
from sparsek_jax.nn.alternatives.sparsek_linear import linear_attention
from sparsek_jax.ops.lifetimes import dropped_keys
from tests.nn.masks import assert_close
from tests.ops import oracle

CONFIG = AttentionConfig(
    num_heads=6,
    num_kv_heads=2,
    head_dim=5,
    rotary_fraction=0.8,
    num_selected=4,
    sliding_window=3,
    implementation="xla",
)
LENGTH = 53
IDS = np.array([np.repeat([1, 2, 1], [9, 1, 43]), np.repeat([0, 1, 1], [30, 2, 21])])
OWN = ("gates", "linear_norm")


class GivenScores(SparseKLinearAttention):
    """Whose scores are the first channels of the hidden state."""

    def score(self, x, key, segment_ids, layer):
        del key, segment_ids, layer
        return x[..., : 1 if self.shared_scores else self.config.num_kv_heads]


def linear_to_dropped(query, key, value, dropped):
    """Of all pairs: `dropped` is a mask `[B, K, T, T]`."""
    groups = query.shape[2] // key.shape[2]
    key, value = (jnp.repeat(x, groups, axis=2) for x in (key, value))
    weights = jnp.einsum("btnh,bsnh->bnts", jax.nn.elu(query) + 1, jax.nn.elu(key) + 1)
    weights = jnp.where(jnp.repeat(dropped, groups, axis=1), weights, 0.0)
    total = weights.sum(axis=-1)
    weights = weights / jnp.where(total > 0, total, 1.0)[..., None]
    return jnp.einsum("bnts,bsnh->btnh", weights, value)


def twin(config, ids, params, x, query, key, value):
    """What the layer is."""
    scores = x[..., : 1 if config.shared_scores else key.shape[2]]
    settings = {"k": config.num_selected, "window": config.sliding_window}
    out = oracle.attention(
        query, key, value, scores, gating=config.gating, segment_ids=ids, **settings
    )
    plain = np.asarray(jax.lax.stop_gradient(scores))
    dropped = np.zeros((len(x), key.shape[2], x.shape[1], x.shape[1]), bool)
    for b, h in np.ndindex(dropped.shape[:2]):
        starts = oracle.document_starts(ids[b], x.shape[1])
        for t, start in enumerate(starts):
            pool = oracle.pool(t, start, config.sliding_window)
            kept = oracle.selected(plain[b, :, h % plain.shape[2]], pool, config.num_selected)
            dropped[b, h, t, np.setdiff1d(pool, kept)] = True
    linear = linear_to_dropped(query, key, value, dropped)
    linear /= jnp.sqrt(jnp.mean(linear**2, axis=-1, keepdims=True) + 1e-6)
    gates = jax.nn.sigmoid(x @ params["gates"]["kernel"])[..., None]
    return out + params["linear_norm"]["scale"] * gates * linear


@pytest.mark.parametrize(
    ("length", "packed", "changes"),
    [
        (LENGTH, True, {}),
        (LENGTH, False, {"sliding_window": 0, "gating": "straight_through", "num_heads": 2}),
        (LENGTH, True, {"shared_scores": True, "implementation": "reference"}),
    ],
)
def test_outputs_and_gradients_are_those_of_masks(monkeypatch, length, packed, changes):
    config = dataclasses.replace(CONFIG, **changes)
    # Three blocks at a time, of two rows.
    monkeypatch.setattr(sparsek_linear, "_BLOCK", 4)
    monkeypatch.setattr(chunkwise, "_FLOATS", 3 * 2 * 4**2 * config.num_heads)
    layer = GivenScores(config, 8, rngs=nnx.Rngs(0))
    rng = np.random.default_rng(0)
    graphdef, state = nnx.split(layer)
    state = jax.tree.map(lambda x: rng.standard_normal(x.shape).astype(np.float32), state)
    heads = config.num_heads
    shapes = [(2, length, 8)] + [(2, length, n, 5) for n in (heads, 2, 2, heads)]
    *arrays, weight = (rng.standard_normal(shape).astype(np.float32) for shape in shapes)
    ids = IDS[:, :length] if packed else np.zeros((2, length), int)

    @jax.jit
    def run(state, *arrays):
        def attend(state, *arrays):
            layer = nnx.merge(graphdef, state)
            return layer.mix(*arrays, jnp.asarray(ids) if packed else None, None, 0)[0]

        out, vjp = jax.vjp(attend, state, *arrays)
        return out, vjp(weight)

    def own(params):
        return {name: params[name] for name in OWN}

    params = own(nnx.to_pure_dict(state))
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), (params, *arrays))
        out, vjp = jax.vjp(lambda *inputs: twin(config, ids, *inputs), *wide)
        truth = [out, *jax.tree.leaves(vjp(jnp.asarray(weight, jnp.float64)))]
        truth = jax.tree.map(np.asarray, truth)
    out, (gradient, *gradients) = run(state, *arrays)
    gradient = own(nnx.to_pure_dict(gradient))
    assert_close([out, *jax.tree.leaves((gradient, *gradients))], truth)


def test_without_dropped_keys_it_is_sparsek_to_the_bit():
    x = jax.random.normal(jax.random.key(0), (2, 13, 8))
    config = dataclasses.replace(
        CONFIG, num_selected=9, sliding_window=4, implementation="reference"
    )
    layer, sparsek = (
        kind(config, 8, rngs=nnx.Rngs(0)) for kind in (SparseKLinearAttention, SparseKAttention)
    )
    nnx.update(sparsek, {k: v for k, v in nnx.state(layer).items() if k not in OWN})
    gradients = []
    for module in (layer, sparsek):
        graphdef, params = nnx.split(module)

        def loss(params, x, graphdef=graphdef):
            out = nnx.merge(graphdef, params)(x)
            return jnp.sum(jnp.sin(out)), out

        gradient, out = jax.jit(jax.grad(loss, has_aux=True))(params, x)
        gradients.append({**nnx.to_pure_dict(gradient), "out": out})
    ours, theirs = gradients
    for name in OWN:
        for gradient in jax.tree.leaves(ours.pop(name)):
            np.testing.assert_array_equal(gradient, 0)
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)


def num_sorts(jaxpr):
    """Of a program and all that it consists of."""
    count = 0
    for equation in jaxpr.eqns:
        count += equation.primitive.name == "sort"
        for x in jax.tree.leaves(equation.params):
            inner = getattr(x, "jaxpr", x)
            count += num_sorts(inner) if hasattr(inner, "eqns") else 0
    return count


@pytest.mark.parametrize("implementation", ["reference", "xla", "mosaic_gpu"])
def test_selects_once(implementation):
    """It sorts no more often than SparseK."""
    config = dataclasses.replace(CONFIG, implementation=implementation)

    def sorts(kind):
        graphdef, params = nnx.split(kind(config, 8, dtype=jnp.bfloat16, rngs=nnx.Rngs(0)))

        def loss(params, x):
            return nnx.merge(graphdef, params)(x, segment_ids=jnp.asarray(IDS)).sum()

        x = jnp.zeros((2, LENGTH, 8), jnp.bfloat16)
        return num_sorts(jax.make_jaxpr(jax.value_and_grad(loss))(params, x).jaxpr)

    assert sorts(SparseKLinearAttention) == sorts(SparseKAttention) > 0


@pytest.mark.parametrize("implementation", ["reference", "xla"])
def test_nan_score_reaches_its_document_s_later_queries_only(implementation):
    layer = SparseKLinearAttention(
        dataclasses.replace(CONFIG, implementation=implementation), 8, rngs=nnx.Rngs(0)
    )
    attend = jax.jit(lambda *arrays: layer.attend(*arrays, jnp.asarray(IDS)))
    rng = np.random.default_rng(0)
    shapes = [(2, LENGTH, heads, 5) for heads in (6, 2, 2)] + [(2, LENGTH, 2)]
    *arrays, scores = (rng.standard_normal(shape).astype(np.float32) for shape in shapes)
    clean = attend(*arrays, scores)
    scores[1, 5, 0] = np.nan
    out, linear = attend(*arrays, scores)
    # The key enters the pool at 8, and the document ends at 30; three query heads share its head.
    reached = np.zeros((2, LENGTH, 6), bool)
    reached[1, 8:30, :3] = True
    assert np.isnan(out[reached]).all()
    for found, expected in zip((out, linear), clean, strict=True):
        np.testing.assert_array_equal(found[~reached], expected[~reached])


def test_memory_is_linear_in_length():
    """Of what comes to SparseK's, which has a test of its own."""

    def temporary_bytes(length):
        def loss(query, key, value, until):
            end = jnp.full((1, length), length)
            row = dropped_keys(until, end)
            key, value = (sparsek_linear.rows_or_zero(x, row) for x in (key, value))
            start, state = jnp.zeros_like(end), jnp.zeros((1, 2, 16, 17))
            return linear_attention(query, key, value, row < length, start=start, state=state)[
                0
            ].sum()

        shapes = [(1, length, heads, 16) for heads in (4, 2, 2)]
        arrays = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
        until = jax.ShapeDtypeStruct((1, length, 2), jnp.int32)
        compiled = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(*arrays, until).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert temporary_bytes(8192) < 4.5 * temporary_bytes(2048)
