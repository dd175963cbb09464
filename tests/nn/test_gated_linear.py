"""Gated linear attention against its recurrence, one token at a time, in float64."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sparsek_jax.nn import AttentionConfig, GatedLinearAttention
from sparsek_jax.nn.alternatives import chunkwise, gated_linear
from sparsek_jax.nn.alternatives.gated_linear import gated_linear_attention
from tests.nn.masks import assert_close, masked
from tests.ops.oracle import document_starts

CONFIG = AttentionConfig(num_heads=6, num_kv_heads=2, head_dim=5, rotary_fraction=0.8)
LENGTH = 53
IDS = np.array([np.repeat([1, 2, 1], [9, 1, 43]), np.repeat([0, 1, 1], [30, 2, 21])])
OWN = ("forget_inner", "forget_outer", "gates", "linear_norm")


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(gated_linear, "_BLOCK", 4)
    # Three blocks at a time, of two rows.
    monkeypatch.setattr(chunkwise, "_FLOATS", 3 * 2 * 4 * 30)


def recurrence(params, x, query, key, value, first, window):
    """What the layer is: `first` marks the tokens that begin a document."""
    batch, _, num_heads, head_dim = query.shape
    logits = x @ params["forget_inner"]["kernel"] @ params["forget_outer"]["kernel"]
    # The sixteenth root of a sigmoid, whose gradient is not finite where the sigmoid is zero.
    forget = jnp.exp(jax.nn.log_sigmoid(logits) / 16)
    forget = jnp.where(first[..., None, None], 0.0, forget.reshape(key.shape))

    def step(state, inputs):
        query, key, value, forget = inputs
        state = state * forget[..., None] + key[..., None] * value[:, :, None]
        read = jnp.repeat(state, num_heads // key.shape[1], axis=1)
        return state, jnp.einsum("bnh,bnhv->bnv", query, read)

    by_time = [jnp.swapaxes(a, 0, 1) for a in (query / np.sqrt(head_dim), key, value, forget)]
    state = jnp.zeros((batch, *key.shape[2:], head_dim), x.dtype)
    out = jnp.swapaxes(jax.lax.scan(step, state, by_time)[1], 0, 1)
    out /= jnp.sqrt(jnp.mean(out**2, axis=-1, keepdims=True) + 1e-6)
    out *= params["linear_norm"]["scale"] * jax.nn.sigmoid(x @ params["gates"]["kernel"])[..., None]
    return out + masked(query, key, value, window[:, None])


@pytest.mark.parametrize(
    ("length", "packed", "steepness", "block"),
    [(LENGTH, True, 1, 4), (LENGTH, True, 300, 4), (LENGTH, True, 30, 64), (3, False, 1, 64)],
)
def test_outputs_and_gradients_are_those_of_the_recurrence(
    monkeypatch, length, packed, steepness, block
):
    monkeypatch.setattr(gated_linear, "_BLOCK", block)
    layer = GatedLinearAttention(dataclasses.replace(CONFIG, sliding_window=4), 8, rngs=nnx.Rngs(0))
    rng = np.random.default_rng(0)
    graphdef, state = nnx.split(layer)
    state = jax.tree.map(lambda x: rng.standard_normal(x.shape).astype(np.float32), state)
    # Forget gates from nearly 1 to what a product of few of them would underflow with.
    state["forget_outer"] = jax.tree.map(lambda x: steepness * x, state["forget_outer"])
    shapes = [(2, length, 8)] + [(2, length, heads, 5) for heads in (6, 2, 2, 6)]
    *arrays, weight = (rng.standard_normal(shape).astype(np.float32) for shape in shapes)
    ids = IDS[:, :length] if packed else np.zeros((2, length), int)

    @jax.jit
    def run(state, *arrays):
        def attend(state, *arrays):
            layer = nnx.merge(graphdef, state)
            return layer.mix(*arrays, jnp.asarray(ids) if packed else None, None, 0)[0]

        out, vjp = jax.vjp(attend, state, *arrays)
        return out, vjp(weight)

    start = np.array([document_starts(row, length) for row in ids])
    t, j = np.arange(length)[:, None], np.arange(length)
    window = (j <= t) & (j > t - 4) & (j >= start[:, :, None])

    @jax.jit
    def expected(params, *arrays):
        def attend(params, *arrays):
            return recurrence(params, *arrays, start == np.arange(length), window)

        out, vjp = jax.vjp(attend, params, *arrays)
        return [out, *jax.tree.leaves(vjp(weight.astype(np.float64)))]

    def own(params):
        return {name: params[name] for name in OWN}

    params = own(nnx.to_pure_dict(state))
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda x: np.asarray(x, np.float64), (params, *arrays))
        truth = jax.tree.map(np.asarray, expected(*wide))
    out, (gradient, *gradients) = run(state, *arrays)
    gradient = own(nnx.to_pure_dict(gradient))
    assert_close([out, *jax.tree.leaves((gradient, *gradients))], truth)


@pytest.mark.parametrize("steep", [-100.0, -1e6])
def test_a_steep_gate_costs_no_digits(monkeypatch, steep):
    monkeypatch.setattr(gated_linear, "_BLOCK", 64)
    rng = np.random.default_rng(1)
    query, key, value = rng.standard_normal((3, 1, 130, 1, 8)).astype(np.float32)
    log_decay = np.full(key.shape, -0.01, np.float32)
    log_decay[:, [20, 70, 71]] = steep
    out, state = gated_linear_attention(
        query, key, value, log_decay, start=np.zeros((1, 130), int), state=np.zeros((1, 1, 8, 8))
    )
    truth, expected = np.zeros((8, 8)), []
    wide = (x[0, :, 0].astype(np.float64) for x in (query, key, value, log_decay))
    for q, k, v, decay in zip(*wide, strict=True):
        truth = truth * np.exp(decay)[:, None] + np.outer(k, v)
        expected.append(q @ truth / np.sqrt(8))
    assert_close([out[0, :, 0], state[0, 0]], [np.stack(expected), truth])


def test_memory_is_linear_in_length(monkeypatch):
    monkeypatch.setattr(chunkwise, "_FLOATS", 16 * 4 * 30)
    layer = GatedLinearAttention(
        dataclasses.replace(CONFIG, sliding_window=64), 8, rngs=nnx.Rngs(0)
    )
    graphdef, params = nnx.split(layer)

    def temporary_bytes(length):
        def loss(params, x, ids):
            return nnx.merge(graphdef, params)(x, segment_ids=ids).sum()

        x = jax.ShapeDtypeStruct((1, length, 8), jnp.float32)
        ids = jax.ShapeDtypeStruct((1, length), jnp.int32)
        compiled = jax.jit(jax.grad(loss)).lower(params, x, ids).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert temporary_bytes(4096) < 4.5 * temporary_bytes(1024)
