import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sparsek_jax.nn import AttentionConfig, SparseKAttention
from sparsek_jax.nn.alternatives import DenseAttention, WindowAttention
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
