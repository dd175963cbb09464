import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparsek_jax.nn.rotary import apply_rotary, document_positions


@pytest.mark.parametrize("rotary_dim", [0, 2, 8, 16])
def test_rotary_turns_complex_pairs_of_halves(rotary_dim):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, 5, 3, 16))
    positions = np.array([[0, 1, 2, 3, 70000], [4, 5, 0, 1, 2]])
    out = apply_rotary(
        jnp.asarray(x, jnp.float32), jnp.asarray(positions), theta=5e5, rotary_dim=rotary_dim
    )
    half = rotary_dim // 2
    pairs = x[..., :half] + 1j * x[..., half:rotary_dim]
    frequency = 5e5 ** (-2 * np.arange(half) / max(rotary_dim, 1))
    pairs = pairs * np.exp(1j * positions[:, :, None, None] * frequency)
    expected = np.concatenate([pairs.real, pairs.imag, x[..., rotary_dim:]], axis=-1)
    # float32 holds the angle 70000 * frequency to about 4e-3.
    np.testing.assert_allclose(out[0, :4], expected[0, :4], atol=1e-5)
    np.testing.assert_allclose(out[1], expected[1], atol=1e-5)
    np.testing.assert_allclose(out[0, 4], expected[0, 4], atol=3e-2)


def test_products_depend_on_the_distance_only():
    query, key = jax.random.normal(jax.random.key(0), (2, 1, 1, 1, 32))

    def product(query_position, key_position):
        turned = [
            apply_rotary(x, jnp.array([[p]]), theta=1e4, rotary_dim=32)
            for x, p in ((query, query_position), (key, key_position))
        ]
        return (turned[0] * turned[1]).sum()

    np.testing.assert_allclose(product(3, 1), product(1003, 1001), rtol=1e-3)
    assert abs(product(3, 1) - product(5, 1)) > 1e-2


def test_rotary_keeps_bfloat16():
    x = jnp.ones((1, 2, 1, 4), jnp.bfloat16)
    assert apply_rotary(x, jnp.zeros((1, 2), int), theta=1e4, rotary_dim=2).dtype == jnp.bfloat16


def test_positions_restart_with_every_run_of_ids():
    ids = jnp.array([[3, 3, 3, 1, 1, 3, 0, 0]])
    assert document_positions(ids, 1, 8).tolist() == [[0, 1, 2, 0, 1, 0, 0, 1]]
    assert document_positions(None, 2, 3).tolist() == [[0, 1, 2]] * 2
