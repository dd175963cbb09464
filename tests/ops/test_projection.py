import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from sparsek_jax import sparsek
from tests.ops import oracle


def vectors():
    """Vectors of few lengths (each compiles once) and values that bfloat16 holds exactly."""
    values = st.integers(-256, 256).map(lambda i: i / 64)
    return hnp.arrays(np.float32, st.sampled_from([1, 2, 3, 8, 33]), elements=values)


project = jax.jit(sparsek)


def random(shape, kind, seed=0):
    rng = np.random.default_rng(seed)
    z = {
        "gaussian": lambda: rng.normal(size=shape),
        "near_constant": lambda: rng.normal(size=shape) * 1e-3,
        "tied": lambda: np.round(rng.normal(size=shape) * 2) / 2,
        "heavy_tailed": lambda: rng.standard_cauchy(size=shape),
        "all_equal": lambda: np.full(shape, 0.7),
        "large": lambda: rng.choice([-1e4, 1e4], size=shape) + rng.normal(size=shape),
        "shifted": lambda: rng.normal(size=shape) + 1e4,
    }[kind]()
    return z.astype(np.float32)


KINDS = ["gaussian", "near_constant", "tied", "heavy_tailed", "all_equal", "large", "shifted"]


@pytest.mark.parametrize("kind", KINDS)
def test_equals_float64_oracle(kind):
    z = random((6, 301), kind)
    for k in (1, 2, 2.5, 17, 300, 300.5):
        p = jax.jit(sparsek)(z, k)
        expected = np.stack([oracle.sparsek(row, k) for row in z])
        np.testing.assert_allclose(p, expected, atol=1e-6, rtol=0)


@given(vectors(), st.floats(0.125, 50, width=16))
def test_kkt_conditions(z, k):
    p = np.asarray(project(z, k), np.float64)
    assert np.all((p >= 0) & (p <= 1))
    if k >= len(z):
        np.testing.assert_array_equal(p, 1)
        return
    np.testing.assert_allclose(p.sum(), k, atol=1e-5)
    # z - p is one number on the interior, at least that where p = 1, at most that where p = 0.
    slack = z - p
    lower = np.max(slack[p < 1])
    upper = np.min(slack[p > 0])
    assert lower <= upper + 1e-6


@given(vectors(), st.integers(1, 45), st.integers(0, 2**31))
def test_gradient_is_the_closed_form(z, k, seed):
    g = np.random.default_rng(seed).normal(size=z.shape).astype(np.float32)
    p, vjp = jax.vjp(lambda z: project(z, k), z)
    interior = (np.asarray(p) > 0) & (np.asarray(p) < 1)
    expected = interior * (g - (g * interior).sum() / max(interior.sum(), 1))
    np.testing.assert_allclose(vjp(g)[0], expected, atol=2e-6)


@pytest.mark.parametrize("kind", ["gaussian", "near_constant", "heavy_tailed"])
def test_gradients_against_finite_differences(kind):
    z = random((31,), kind).astype(np.float64)
    g = np.random.default_rng(1).normal(size=z.shape)
    k, step = 5.3, 1e-7
    with jax.enable_x64(True):
        dz, dk = jax.grad(lambda z, k: jnp.vdot(sparsek(z, k), g), argnums=(0, 1))(
            jnp.asarray(z), k
        )

    def value(z, k):
        return oracle.sparsek(z, k) @ g

    basis = np.eye(len(z)) * step
    numeric = [(value(z + e, k) - value(z - e, k)) / (2 * step) for e in basis]
    np.testing.assert_allclose(dz, numeric, atol=1e-6)
    np.testing.assert_allclose(
        dk, (value(z, k + step) - value(z, k - step)) / (2 * step), atol=1e-6
    )


def test_k_one_is_sparsemax():
    z = random((8, 33), "gaussian")
    np.testing.assert_allclose(
        sparsek(z, 1), jax.vmap(optax.projections.projection_simplex)(z), atol=1e-6
    )


@given(vectors(), st.integers(1, 12), st.sampled_from([-4.0, 0.5, 64.0]))
def test_shift_invariance(z, k, shift):
    np.testing.assert_allclose(project(z + np.float32(shift), k), project(z, k), atol=1e-6)


def test_ties_share_equally():
    p = sparsek(jnp.array([3.0, 1.0, 1.0, 1.0, -2.0]), 2)
    np.testing.assert_allclose(p, [1, 1 / 3, 1 / 3, 1 / 3, 0], atol=1e-7)


def test_gradient_is_zero_where_the_projection_is_locally_constant():
    # Any tau in [0, 4] gives the same p; tied saturated entries are not interior.
    z = jnp.array([5.0, 5.0, 0.0, 0.0, -3.0])
    p, vjp = jax.vjp(lambda z: sparsek(z, 2), z)
    np.testing.assert_array_equal(p, [1, 1, 0, 0, 0])
    np.testing.assert_array_equal(vjp(jnp.arange(5.0))[0], 0)


@pytest.mark.parametrize(("n", "k"), [(1, 1), (1, 0.25), (3, 3), (3, 7), (4, 3.999)])
def test_small_sizes(n, k):
    p = sparsek(jnp.full(n, -2.0), k)
    np.testing.assert_allclose(p, min(k / n, 1), atol=1e-6)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@given(z=vectors(), k=st.integers(1, 12))
def test_dtypes_compute_in_float32(dtype, z, k):
    p = project(jnp.asarray(z, dtype), k)
    assert p.dtype == dtype
    np.testing.assert_array_equal(p, project(z, k).astype(dtype))


def test_where_removes_entries_and_their_gradient():
    z = random((4, 20), "gaussian")
    where = np.random.default_rng(2).random((4, 20)) < 0.6
    p, vjp = jax.vjp(lambda z: sparsek(z, 3, where=where), z)
    (dz,) = vjp(random((4, 20), "gaussian", 3))
    for row in range(4):
        np.testing.assert_allclose(
            p[row][where[row]], oracle.sparsek(z[row][where[row]], 3), atol=1e-6
        )
    np.testing.assert_array_equal(np.asarray(p)[~where], 0)
    np.testing.assert_array_equal(np.asarray(dz)[~where], 0)
    assert np.any(np.asarray(dz)[where] != 0)


def test_where_all_false_is_zero_with_zero_gradient():
    z = jnp.array([[jnp.nan, 1.0, 2.0]])
    p, vjp = jax.vjp(lambda z: sparsek(z, 2, where=jnp.zeros(3, bool)), z)
    np.testing.assert_array_equal(p, 0)
    np.testing.assert_array_equal(vjp(jnp.ones_like(z))[0], 0)


def test_nan_stays_in_its_row():
    z = jnp.array([[1.0, jnp.nan, 0.0], [1.0, 2.0, 0.0], [1.0, 2.0, jnp.nan]])
    where = jnp.array([[True] * 3, [True] * 3, [True, True, False]])
    p, vjp = jax.vjp(lambda z: sparsek(z, 1, where=where), z)
    (dz,) = vjp(jnp.ones_like(z))
    np.testing.assert_array_equal(np.isnan(p).any(-1), [True, False, False])
    assert np.isnan(p[0]).all()
    np.testing.assert_array_equal(np.isnan(dz).any(-1), [True, False, False])


def test_infinite_scores_saturate():
    p = sparsek(jnp.array([jnp.inf, 0.0, 0.5, -jnp.inf]), 2)
    np.testing.assert_allclose(p, [1, 0.25, 0.75, 0], atol=1e-6)


def test_axis_batch_and_transformations():
    z = random((3, 7, 5, 2), "gaussian")
    expected = np.apply_along_axis(lambda row: oracle.sparsek(row, 2), 1, z)
    np.testing.assert_allclose(sparsek(z, 2, axis=1), expected, atol=1e-6)
    np.testing.assert_allclose(sparsek(z, 2, axis=-3), expected, atol=1e-6)
    over_batch = jax.vmap(lambda row: sparsek(row, 2, axis=0))
    np.testing.assert_allclose(jax.jit(over_batch)(z), expected, atol=1e-6)
    over_k = jax.vmap(lambda k: sparsek(z, k, axis=1))(jnp.array([1.0, 2.0]))
    np.testing.assert_allclose(over_k[1], expected, atol=1e-6)
    assert sparsek(jnp.zeros((2, 0)), 1).shape == (2, 0)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((jnp.arange(3), 1), TypeError, "z must be a floating-point array, got dtype int32"),
        ((jnp.float32(1.0), 1), ValueError, "z must have at least one axis"),
        ((jnp.ones(3), 0), ValueError, "k=0 must be a positive and finite number"),
        ((jnp.ones(3), float("nan")), ValueError, "k=nan must be a positive"),
        ((jnp.ones(3), jnp.ones(2)), ValueError, "k must be a scalar, got shape"),
        ((jnp.ones(3), "a"), ValueError, "k='a' must be a positive"),
        ((jnp.ones(3), None), ValueError, "k=None must be a positive"),
        ((jnp.ones(3), True), ValueError, "k=True must be a positive"),
        ((jnp.ones(3), -(10**400)), ValueError, "k=-10+ must be a positive"),
    ],
)
def test_bad_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        sparsek(*arguments)


@pytest.mark.parametrize("k", [10**400, np.int64(2**40), 1e300], ids=["int", "int64", "float"])
def test_everything_is_in_a_sum_beyond_all_numbers(k):
    np.testing.assert_array_equal(sparsek(jnp.array([1.0, -1.0]), k), 1)


@pytest.mark.parametrize("axis", ["a", (0, 1), 1.0, None, True])
def test_an_axis_is_an_int(axis):
    with pytest.raises(TypeError, match="axis must be an int, got"):
        sparsek(jnp.ones((3, 3)), 1, axis=axis)


def test_bad_keyword_arguments():
    with pytest.raises(ValueError, match="axis=2 is out of range"):
        sparsek(jnp.ones(3), 1, axis=2)
    with pytest.raises(TypeError, match="where must be a boolean array"):
        sparsek(jnp.ones(3), 1, where=jnp.ones(3))
    with pytest.raises(ValueError, match="does not broadcast"):
        sparsek(jnp.ones(3), 1, where=jnp.ones(2, bool))
