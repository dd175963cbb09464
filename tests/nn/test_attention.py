import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sparsek_jax.nn import AttentionConfig, SparseKAttention
from sparsek_jax.nn.alternatives import LAYERS, DenseAttention, WindowAttention
from sparsek_jax.ops.gating import GATINGS

CONFIG = AttentionConfig(
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    num_selected=3,
    sliding_window=4,
    implementation="reference",
)
X = jax.random.normal(jax.random.key(0), (2, 17, 16))
IDS = jnp.array([[1] * 6 + [2] * 11, [1] * 17])


def make(kind, config=CONFIG, **kwargs):
    return kind(config, 16, rngs=nnx.Rngs(0), **kwargs)


def test_kinds_share_their_parameters_and_sparsek_adds_a_scorer():
    config = dataclasses.replace(CONFIG, qk_norm=True, qkv_bias=True, out_bias=True)
    paths = {
        kind: dict(nnx.to_flat_state(nnx.state(make(kind, config))))
        for kind in (SparseKAttention, DenseAttention, WindowAttention)
    }
    dense = paths[DenseAttention]
    assert dense.keys() == paths[WindowAttention].keys()
    extra = paths[SparseKAttention].keys() - dense.keys()
    assert extra == {("scorer", "kernel"), ("scorer", "norm", "gain")}
    for path, parameter in dense.items():
        np.testing.assert_array_equal(parameter[...], paths[SparseKAttention][path][...])


@pytest.mark.parametrize("segment_ids", [None, IDS])
def test_sparsek_that_selects_everything_is_dense_and_that_sees_a_window_only_is_not(segment_ids):
    dense = make(DenseAttention)(X, segment_ids=segment_ids)
    everything = dataclasses.replace(CONFIG, num_selected=17)
    np.testing.assert_allclose(
        make(SparseKAttention, everything)(X, segment_ids=segment_ids), dense, atol=1e-5
    )
    sparse = make(SparseKAttention)(X, segment_ids=segment_ids)
    window = make(WindowAttention)(X, segment_ids=segment_ids)
    for x, y in ((sparse, dense), (window, dense), (sparse, window)):
        assert jnp.abs(x - y).max() > 1e-2


def test_positions_count_from_every_document_by_default():
    layer = make(SparseKAttention)
    positions = jnp.array([[*range(6), *range(11)], [*range(17)]])
    np.testing.assert_array_equal(
        layer(X, segment_ids=IDS), layer(X, segment_ids=IDS, positions=positions)
    )
    stretched = layer(X, segment_ids=IDS, positions=3 * positions)
    assert jnp.abs(layer(X, segment_ids=IDS) - stretched).max() > 1e-3


@pytest.mark.parametrize(("shared", "count"), [(False, 2), (True, 1)])
def test_scores_are_returned_on_request(shared, count):
    layer = make(SparseKAttention, dataclasses.replace(CONFIG, shared_scores=shared))
    out, scores = layer(X, return_scores=True)
    assert out.shape == X.shape
    assert scores.shape == (2, 17, count)
    np.testing.assert_array_equal(scores, layer.scorer(X))
    assert make(DenseAttention)(X, return_scores=True)[1] is None


@pytest.mark.parametrize("gating", GATINGS)
def test_the_scorer_learns_from_the_output(gating):
    layer = make(SparseKAttention, dataclasses.replace(CONFIG, gating=gating))
    gradient = nnx.grad(lambda layer: (layer(X) ** 2).sum())(layer)
    assert jnp.abs(gradient["scorer"]["kernel"][...]).max() > 1e-4
    assert all(jnp.isfinite(x).all() for x in jax.tree.leaves(gradient))


def test_half_precision_keeps_parameters_and_scores_in_float32():
    config = dataclasses.replace(CONFIG, qk_norm=True)
    half = make(SparseKAttention, config, dtype=jnp.bfloat16)
    assert {x.dtype for x in jax.tree.leaves(nnx.state(half))} == {jnp.dtype("float32")}
    x = X.astype(jnp.bfloat16)
    out, scores = half(x, return_scores=True)
    assert (out.dtype, scores.dtype) == (jnp.bfloat16, jnp.float32)
    full = make(SparseKAttention, config)(x.astype(jnp.float32))
    assert jnp.linalg.norm(out.astype(jnp.float32) - full) / jnp.linalg.norm(full) < 2e-2


@pytest.mark.parametrize("kind", LAYERS)
def test_no_tokens(kind):
    config = AttentionConfig(
        num_heads=4, num_kv_heads=2, head_dim=8, num_selected=8, sliding_window=8, block_size=4
    )
    layer = make(LAYERS[kind], config)
    for x, ids in ((X[:0], IDS[:0]), (X[:, :0], IDS[:, :0])):
        for segment_ids in (None, ids):
            out, scores = layer(x, segment_ids=segment_ids, return_scores=True)
            assert (out.shape, out.dtype) == (x.shape, x.dtype)
            _, full = jax.eval_shape(lambda: layer(X, return_scores=True))
            if full is None:
                assert scores is None
            else:
                assert (scores.shape, scores.dtype) == ((*x.shape[:2], 2), full.dtype)
        gradients = nnx.grad(lambda layer, x: layer(x).sum(), argnums=(0, 1))(layer, x)
        assert all((leaf == 0).all() for leaf in jax.tree.leaves(gradients))
        cache = layer.init_cache(len(x), max_length=17)
        cache, out = layer.extend(x, cache, jnp.zeros(len(x), jnp.int32))
        assert (out.shape, out.dtype) == (x.shape, x.dtype)


def test_shared_scores_of_no_tokens():
    layer = make(SparseKAttention, dataclasses.replace(CONFIG, shared_scores=True))
    assert layer(X[:0], return_scores=True)[1].shape == (0, 17, 1)


@pytest.mark.parametrize("kind", [SparseKAttention, DenseAttention])
@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"x": X[0]}, ValueError, r"x has shape \(17, 16\); expected \[B, T, d_model=16\]"),
        ({"x": X[..., :8]}, ValueError, r"x has shape \(2, 17, 8\); expected \[B, T, d_model=16\]"),
        ({"x": [[[1.0] * 16]]}, TypeError, r"x must be a floating-point array, got \[\[\["),
        ({"x": IDS}, TypeError, "x must be a floating-point array, got dtype int32"),
        ({"segment_ids": IDS[0]}, ValueError, r"segment_ids has shape \(17,\); expected \(2, 17\)"),
        (
            {"segment_ids": X[..., 0]},
            ValueError,
            "segment_ids has dtype float32; expected integers",
        ),
        ({"positions": IDS[0]}, ValueError, r"positions has shape \(17,\); expected \(2, 17\)"),
        ({"positions": IDS[:1]}, ValueError, r"positions has shape \(1, 17\); expected \(2, 17\)"),
        ({"positions": X[..., 0]}, ValueError, "positions has dtype float32; expected integers"),
        ({"positions": [[1]]}, ValueError, r"positions=\[\[1\]\]; expected an array of integers"),
    ],
)
def test_bad_arguments_are_named(kind, arguments, error, message):
    with pytest.raises(error, match=message):
        make(kind)(**({"x": X} | arguments))


def test_bad_arguments_are_named_by_every_method():
    layer = make(SparseKAttention)
    with pytest.raises(ValueError, match=r"x has shape \(2, 16\)"):
        layer.extend(X[:, 0], layer.init_cache(2), jnp.ones(2, int))
    with pytest.raises(ValueError, match=r"positions has shape \(1, 17\)"):
        layer.resume(X, layer.init_memory(2), positions=IDS[:1], segment_ids=IDS)


@pytest.mark.parametrize(
    ("d_model", "error", "message"),
    [
        (0, ValueError, "d_model=0 must be at least 1"),
        ("16", TypeError, "d_model must be an int, got '16'"),
    ],
)
def test_a_width_is_a_positive_int(d_model, error, message):
    for kind in (SparseKAttention, DenseAttention):
        with pytest.raises(error, match=message):
            kind(CONFIG, d_model, rngs=nnx.Rngs(0))


def test_arguments_are_checked_while_tracing():
    layer = make(SparseKAttention)
    expected = layer(X, segment_ids=IDS)

    @jax.jit
    @jax.vmap
    def by_row(x, ids):
        return layer(x[None], segment_ids=ids[None])[0]

    np.testing.assert_allclose(by_row(X, IDS), expected, atol=1e-5)
    with pytest.raises(ValueError, match=r"x has shape \(1, 17, 8\)"):
        by_row(X[..., :8], IDS)
