import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sparsek_jax.nn.norms import TimestepNorm, make_norm
from sparsek_jax.ops.selection import document_bounds


def timestep_norm_oracle(x, start, epsilon=1e-5):
    """Returns the normalised x, and the deviation it was divided by."""
    x, start = np.asarray(x, np.float64), np.asarray(start)
    mean, deviation = np.empty_like(x), np.empty_like(x)
    for b, t in np.ndindex(x.shape[:2]):
        seen = x[b, start[b, t] : t + 1]
        mean[b, t], deviation[b, t] = seen.mean(0), np.sqrt(seen.var(0) + epsilon)
    return (x - mean) / deviation, deviation


@pytest.mark.parametrize("offset", [0.0, 1e3, 1e6])
@pytest.mark.parametrize("packed", [False, True])
def test_timestep_norm_matches_float64(offset, packed):
    rng = np.random.default_rng(0)
    x = jnp.asarray(offset + rng.normal(size=(2, 257, 3)), jnp.float32)
    ids = jnp.asarray(np.sort(rng.integers(0, 9, (2, 257)), axis=1)) if packed else None
    start, _ = document_bounds(ids, 2, 257)
    norm = TimestepNorm(3)
    gain = np.array([1.0, 2.0, -0.5])
    norm.gain[...] = jnp.asarray(gain)
    expected, deviation = timestep_norm_oracle(x, start)
    expected *= gain
    # The deviations are exact differences, so that the mean costs no digit. What rounds is
    # magnified where the deviations so far are small.
    rounding = np.spacing(np.float32(1.0)) / deviation
    error = np.abs(jax.jit(norm)(x, start) - expected)
    assert (error < 10 * rounding).all(), (error / rounding).max()


def test_timestep_norm_keeps_its_digits_over_a_long_row():
    x = 100 + jax.random.normal(jax.random.key(0), (1, 16384, 1))
    out = jax.jit(TimestepNorm(1))(x, jnp.zeros((1, 16384), jnp.int32))
    wide = np.asarray(x, np.float64)[0, :, 0]
    count = np.arange(1, 16385)
    shifted = wide - 100
    mean = np.cumsum(shifted) / count
    variance = np.cumsum(shifted**2) / count - mean**2
    np.testing.assert_allclose(out[0, :, 0], (shifted - mean) / np.sqrt(variance + 1e-5), atol=1e-4)


@pytest.mark.parametrize("x", [np.zeros((1, 6, 2)), np.full((1, 6, 2), 7.0)])
def test_timestep_norm_of_a_constant_is_zero_with_finite_gradient(x):
    start = jnp.array([[0, 0, 2, 3, 3, 3]])
    norm = TimestepNorm(2)
    out, gradient = jax.value_and_grad(
        lambda x: (norm(x, start) * jnp.arange(12.0).reshape(1, 6, 2)).sum()
    )(jnp.asarray(x, jnp.float32))
    assert out == 0
    assert jnp.isfinite(gradient).all()


def test_timestep_norm_gradient_matches_float64_differences():
    rng = np.random.default_rng(1)
    x = rng.normal(size=(1, 12, 2))
    weight = rng.normal(size=x.shape)
    start, _ = document_bounds(jnp.array([[0] * 5 + [1] * 7]), 1, 12)
    norm = TimestepNorm(2)
    gradient = jax.grad(lambda x: (norm(x, start) * weight).sum())(jnp.asarray(x, jnp.float32))

    def loss(x):
        return (timestep_norm_oracle(x, start)[0] * weight).sum()

    expected = np.empty_like(x)
    for index in np.ndindex(x.shape):
        step = np.zeros_like(x)
        step[index] = 1e-6
        expected[index] = (loss(x + step) - loss(x - step)) / 2e-6
    # The second step of a document is nearly a sign function: large gradients.
    np.testing.assert_allclose(gradient, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_feature_norms_compute_in_float32(dtype):
    x = (50 + jax.random.normal(jax.random.key(0), (4, 64))).astype(dtype)
    wide = np.asarray(x, np.float64)
    rms = make_norm("rmsnorm", 64, 1e-6, rngs=nnx.Rngs(0))
    layer = make_norm("layernorm", 64, 1e-6, rngs=nnx.Rngs(0))
    rms.scale[...] = layer.scale[...] = jnp.linspace(0.5, 1.5, 64)
    layer.bias[...] = jnp.linspace(-1, 1, 64)
    scale, bias = np.linspace(0.5, 1.5, 64), np.linspace(-1, 1, 64)
    np.testing.assert_allclose(
        rms(x), wide / np.sqrt((wide**2).mean(-1, keepdims=True) + 1e-6) * scale, rtol=1e-5
    )
    centred = wide - wide.mean(-1, keepdims=True)
    np.testing.assert_allclose(
        layer(x),
        centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-6) * scale + bias,
        atol=1e-4,
    )
