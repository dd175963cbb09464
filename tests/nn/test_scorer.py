import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sparsek_jax.nn import ScoringNetwork


@pytest.mark.parametrize("score_scale", [1.0, 3.0])
@pytest.mark.parametrize("timestep_norm", [False, True])
def test_score_is_norm_of_projection_plus_slope(timestep_norm, score_scale):
    scorer = ScoringNetwork(
        6, 2, timestep_norm=timestep_norm, score_scale=score_scale, slope=0.25, rngs=nnx.Rngs(0)
    )
    x = jax.random.normal(jax.random.key(0), (1, 9, 6))
    ids = jnp.array([[1] * 4 + [2] * 5])
    expected = np.asarray(x, np.float64)[0] @ np.asarray(scorer.kernel[...], np.float64)
    for t in reversed(range(9)):
        start = 0 if t < 4 else 4
        if timestep_norm:
            seen = expected[start : t + 1]
            expected[t] = (expected[t] - seen.mean(0)) / np.sqrt(seen.var(0) + 1e-5)
            expected[t] *= score_scale
        expected[t] += 0.25 * (t - start)
    np.testing.assert_allclose(scorer(x, ids)[0], expected, atol=1e-4)


def test_the_scale_of_first_scores_is_in_the_gain_or_the_kernel():
    x = jax.random.normal(jax.random.key(0), (8, 64, 32))
    for timestep_norm in (False, True):
        one, three = (
            ScoringNetwork(
                32, 2, timestep_norm=timestep_norm, score_scale=scale, slope=0.0, rngs=nnx.Rngs(0)
            )(x)
            for scale in (1.0, 3.0)
        )
        np.testing.assert_allclose(three, 3 * one, atol=1e-5)
        assert 0.5 < jnp.std(one) < 1.5


def test_a_learned_slope_is_per_64_positions_of_the_document():
    plain, sloped = (
        ScoringNetwork(6, 2, learned_slope=learned, rngs=nnx.Rngs(0)) for learned in (False, True)
    )
    x = jax.random.normal(jax.random.key(0), (1, 9, 6))
    ids = jnp.array([[1] * 4 + [2] * 5])
    np.testing.assert_array_equal(sloped(x, ids), plain(x, ids))
    sloped.head_slope[...] = jnp.array([64.0, -32.0])
    gain = np.outer([0, 1, 2, 3, 0, 1, 2, 3, 4], [1, -0.5])
    np.testing.assert_allclose(sloped(x, ids)[0], plain(x, ids)[0] + gain, atol=1e-5)
    slope_gradient = jax.grad(lambda slope: _score_sum(sloped, slope, x, ids))(
        sloped.head_slope[...]
    )
    np.testing.assert_allclose(slope_gradient, np.full(2, 16 / 64), rtol=1e-6)


def _score_sum(scorer, slope, x, ids):
    graph, state = nnx.split(scorer)
    state["head_slope"] = state["head_slope"].replace(slope)
    return nnx.merge(graph, state)(x, ids).sum()


def test_sinks_are_above_all_other_scores_and_pass_no_gradient():
    scorer = ScoringNetwork(6, 2, slope=3.0, num_sinks=2, rngs=nnx.Rngs(0))
    plain = ScoringNetwork(6, 2, slope=3.0, rngs=nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(0), (1, 9, 6))
    ids = jnp.array([[1] * 4 + [2] * 5])
    scores, expected = np.array(scorer(x, ids)[0]), np.array(plain(x, ids)[0])
    sinks = [0, 1, 4, 5]
    others = [2, 3, 6, 7, 8]
    assert (scores[sinks] >= 1 + scores[others].max(axis=0)).all()
    np.testing.assert_array_equal(scores[others], expected[others])
    gradient = np.asarray(jax.grad(lambda x: scorer(x, ids)[:, jnp.array(sinks)].sum())(x))
    np.testing.assert_array_equal(gradient, 0)


def test_the_slope_decides_between_equal_tokens_far_into_a_row():
    scorer = ScoringNetwork(4, 1, rngs=nnx.Rngs(0))
    x = jnp.ones((1, 65536, 4))
    assert bool((jnp.diff(scorer(x)[0, 1:, 0]) > 0).all())


def test_no_tokens_have_no_scores():
    for num_sinks in (0, 2):
        scorer = ScoringNetwork(4, 2, num_sinks=num_sinks, rngs=nnx.Rngs(0))
        for shape in ((0, 5), (3, 0)):
            assert scorer(jnp.ones((*shape, 4))).shape == (*shape, 2)


def test_scores_are_float32_for_bfloat16_tokens():
    scorer = ScoringNetwork(32, 3, rngs=nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(0), (2, 16, 32), jnp.bfloat16)
    scores = scorer(x)
    assert scores.dtype == jnp.float32
    np.testing.assert_allclose(scores, scorer(x.astype(jnp.float32)), atol=1e-6)


def test_a_later_token_changes_no_earlier_score():
    scorer = ScoringNetwork(4, 2, rngs=nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(0), (1, 33, 4))
    changed = scorer(x.at[:, 20:].add(100.0))
    np.testing.assert_array_equal(scorer(x)[:, :20], changed[:, :20])
    assert bool((scorer(x)[:, 20:] != changed[:, 20:]).any())
