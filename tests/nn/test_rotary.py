import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparsek_jax.nn import AttentionConfig
from sparsek_jax.nn.rotary import apply_rotary, document_positions, rotary_frequencies


def config(**fields):
    return AttentionConfig(**({"num_heads": 1, "num_kv_heads": 1, "head_dim": 16} | fields))


@pytest.mark.parametrize("rotary_dim", [0, 2, 8, 16])
def test_rotary_turns_complex_pairs_of_halves(rotary_dim):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, 5, 3, 16))
    positions = np.array([[0, 1, 2, 3, 70000], [4, 5, 0, 1, 2]])
    frequencies = rotary_frequencies(config(rope_theta=5e5, rotary_fraction=rotary_dim / 16))
    out = apply_rotary(jnp.asarray(x, jnp.float32), jnp.asarray(positions), frequencies=frequencies)
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

    frequencies = rotary_frequencies(config(head_dim=32))

    def product(query_position, key_position):
        turned = [
            apply_rotary(x, jnp.array([[p]]), frequencies=frequencies)
            for x, p in ((query, query_position), (key, key_position))
        ]
        return (turned[0] * turned[1]).sum()

    np.testing.assert_allclose(product(3, 1), product(1003, 1001), rtol=1e-3)
    assert abs(product(3, 1) - product(5, 1)) > 1e-2


def test_rotary_keeps_bfloat16():
    x = jnp.ones((1, 2, 1, 4), jnp.bfloat16)
    out = apply_rotary(x, jnp.zeros((1, 2), int), frequencies=jnp.ones(1))
    assert out.dtype == jnp.bfloat16


def test_linear_scaling_slows_all_frequencies():
    scaled = rotary_frequencies(config(rope_scaling="linear", rope_factor=4.0))
    np.testing.assert_allclose(scaled, rotary_frequencies(config()) / 4)


def test_llama3_scaling_keeps_fast_channels_and_slows_those_that_never_turn():
    fields = {"head_dim": 64, "rope_theta": 5e5, "rope_factor": 8.0, "rope_original_length": 8192}
    plain = np.asarray(rotary_frequencies(config(**fields)), np.float64)
    scaled = rotary_frequencies(config(**fields, rope_scaling="llama3"))
    expected = []
    for frequency in plain:  # as the paper's authors wrote it
        wavelength = 2 * np.pi / frequency
        if wavelength < 8192 / 4:
            expected.append(frequency)
        elif wavelength > 8192 / 1:
            expected.append(frequency / 8)
        else:
            smooth = (8192 / wavelength - 1) / (4 - 1)
            expected.append((1 - smooth) * frequency / 8 + smooth * frequency)
    np.testing.assert_allclose(scaled, expected, rtol=1e-5)
    divisors = plain / np.asarray(scaled)
    np.testing.assert_allclose((divisors.min(), divisors.max()), (1, 8), rtol=1e-5)


def test_positions_restart_with_every_run_of_ids():
    ids = jnp.array([[3, 3, 3, 1, 1, 3, 0, 0]])
    assert document_positions(ids, 1, 8).tolist() == [[0, 1, 2, 0, 1, 0, 0, 1]]
    assert document_positions(None, 2, 3).tolist() == [[0, 1, 2]] * 2
