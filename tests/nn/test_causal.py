import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparsek_jax.nn import causal
from sparsek_jax.nn.causal import dense_attention, window_attention


def attention(window):
    if window is None:
        return dense_attention
    return functools.partial(window_attention, sliding_window=window)


def oracle(query, key, value, window, segment_ids):
    """Dense masks, in the dtype of the inputs."""
    length, num_heads, head_dim = query.shape[1:]
    key, value = (jnp.repeat(x, num_heads // x.shape[2], axis=2) for x in (key, value))
    t, j = jnp.arange(length)[:, None], jnp.arange(length)
    seen = (j <= t) & (j > t - (window or length))
    seen = jnp.broadcast_to(seen, (query.shape[0], length, length))
    if segment_ids is not None:
        edges = jnp.pad(segment_ids[:, 1:] != segment_ids[:, :-1], ((0, 0), (1, 0)))
        document = jnp.cumsum(edges, axis=1)
        seen &= document[:, :, None] == document[:, None]
    logits = jnp.einsum("btnh,bsnh->bnts", query, key) / np.sqrt(head_dim)
    weights = jax.nn.softmax(jnp.where(seen[:, None], logits, -jnp.inf))
    return jnp.einsum("bnts,bsnh->btnh", weights, value)


def inputs(length, num_heads=4, num_kv_heads=2, head_dim=8, dtype=jnp.float32):
    shapes = [(2, length, n, head_dim) for n in (num_heads, num_kv_heads, num_kv_heads, num_heads)]
    keys = jax.random.split(jax.random.key(length), 4)
    return [jax.random.normal(k, s).astype(dtype) for k, s in zip(keys, shapes, strict=True)]


def packed_ids(length):
    # The id 1 comes back: a later document of the same id is another document.
    rng = np.random.default_rng(length)
    cuts = np.sort(rng.integers(0, length, (2, 5)), axis=1)
    ids = [[(t >= row).sum() % 3 for t in range(length)] for row in cuts]
    return jnp.asarray(ids, jnp.int32)


@pytest.fixture
def small_chunks(monkeypatch):
    monkeypatch.setattr(causal, "_DENSE_CHUNK", {"xla": 8, "cudnn": 8})
    monkeypatch.setattr(causal, "_WINDOW_CHUNK", 8)


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize(
    ("length", "window", "packed"),
    [
        (1, None, True),
        (1, 3, False),
        (37, None, False),
        (37, None, True),
        (37, 1, True),
        (37, 5, False),
        (37, 5, True),
        (37, 13, True),
        (37, 100, True),
    ],
)
def test_output_and_gradients_match_dense_masks(length, window, packed):
    *qkv, weight = inputs(length)
    ids = packed_ids(length) if packed else None

    def run(function):
        def loss(*qkv):
            out = function(*qkv)
            return (out * weight).sum(), out

        gradients, out = jax.jit(jax.grad(loss, argnums=(0, 1, 2), has_aux=True))(*qkv)
        return [out, *gradients]

    ours = run(lambda *qkv: attention(window)(*qkv, segment_ids=ids))
    expected = run(lambda *qkv: oracle(*qkv, window, ids))
    for x, y in zip(ours, expected, strict=True):
        np.testing.assert_allclose(x, y, atol=2e-5)


def test_bfloat16_matches_float32_on_the_same_inputs():
    *qkv, _ = inputs(300, dtype=jnp.bfloat16)
    expected = oracle(*(x.astype(jnp.float32) for x in qkv), 64, None)
    out = window_attention(*qkv, sliding_window=64)
    assert out.dtype == jnp.bfloat16
    error = jnp.linalg.norm(out.astype(jnp.float32) - expected) / jnp.linalg.norm(expected)
    assert error < 5e-3


@pytest.mark.parametrize("window", [None, 32])
def test_memory_is_linear_in_length(window):
    def temporary_bytes(length):
        shape = jax.ShapeDtypeStruct((1, length, 2, 8), jnp.float32)
        ids = jax.ShapeDtypeStruct((1, length), jnp.int32)

        def loss(query, key, value, ids):
            return attention(window)(query, key, value, segment_ids=ids).sum()

        compiled = (
            jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(shape, shape, shape, ids).compile()
        )
        return compiled.memory_analysis().temp_size_in_bytes

    assert temporary_bytes(8192) < 4.5 * temporary_bytes(2048)


def test_time_of_the_window_is_linear_in_length():
    def flops(length):
        shape = jax.ShapeDtypeStruct((1, length, 2, 8), jnp.float32)
        # One chunk, times their number: XLA counts a loop's body once.
        lowered = jax.jit(attention(32)).lower(shape, shape, shape)
        return lowered.compile().cost_analysis()["flops"]

    assert flops(4096) < 1.5 * flops(1024)


@pytest.fixture
def with_cudnn(monkeypatch):
    """Makes JAX trace cuDNN calls on a machine without it."""
    from jax._src.cudnn import fused_attention_stablehlo

    monkeypatch.setattr(fused_attention_stablehlo, "check_cudnn_version", lambda: 91000)


def lowered_text(platform, dtype, window, packed, head_dim=64, length=64):
    *qkv, _ = inputs(length, head_dim=head_dim, dtype=dtype)
    ids = packed_ids(length) if packed else None

    def function(query, key, value):
        return attention(window)(query, key, value, segment_ids=ids)

    def gradients(*qkv):
        out, vjp = jax.vjp(function, *qkv)
        return vjp(out)

    return jax.jit(gradients).trace(*qkv).lower(lowering_platforms=(platform,)).as_text()


@pytest.mark.usefixtures("with_cudnn")
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("window", [None, 16])
def test_cudnn_is_chosen_by_the_platform_lowered_for(window, packed):
    for platform, dtype, head_dim, length, fused in (
        ("cuda", jnp.bfloat16, 64, 64, True),
        ("cuda", jnp.bfloat16, 64, 63, True),
        ("cpu", jnp.bfloat16, 64, 64, False),
        ("tpu", jnp.bfloat16, 64, 64, False),
        ("cuda", jnp.float32, 64, 64, False),
        ("cuda", jnp.bfloat16, 60, 64, False),
    ):
        text = lowered_text(platform, dtype, window, packed, head_dim, length)
        for direction in ("", "Backward"):
            used = re.search(rf"__cudnn\$fmha\w*{direction}", text)
            assert bool(used) == fused, (platform, dtype, head_dim, length, direction)


def test_without_cudnn_the_export_for_cuda_still_works():
    *qkv, _ = inputs(64, dtype=jnp.bfloat16)
    exported = jax.export.export(jax.jit(dense_attention), platforms=["cuda"])(*qkv)
    assert exported.platforms == ("cuda",)


@pytest.mark.gpu
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("window", [None, 100])
def test_cudnn_matches_dense_masks(window, packed):
    *qkv, weight = inputs(2100 + 1, head_dim=64, dtype=jnp.bfloat16)
    ids = packed_ids(2101) if packed else None

    def loss(function, *qkv):
        out = function(*qkv)
        return (out.astype(jnp.float32) * weight).sum(), out

    def run(function, *qkv):
        gradient = jax.grad(functools.partial(loss, function), argnums=(0, 1, 2), has_aux=True)
        gradients, out = jax.jit(gradient)(*qkv)
        return [out, *gradients]

    wide = [x.astype(jnp.float32) for x in qkv]
    with jax.default_matmul_precision("highest"):
        expected = run(lambda *qkv: oracle(*qkv, window, ids), *wide)
    ours = run(lambda *qkv: attention(window)(*qkv, segment_ids=ids), *qkv)
    for x, y in zip(ours, expected, strict=True):
        assert jnp.linalg.norm(x.astype(jnp.float32) - y) / jnp.linalg.norm(y) < 1e-2
