import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparsek_jax.generation.sampling import Sampling, choose_tokens, token_keys

# Out of order, with a tie, and two that are never likely.
PROBABILITIES = np.array([0.1, 0.4, 0.05, 0.2, 0.2, 0.03, 0.02])
LOGITS = jnp.log(PROBABILITIES).astype(jnp.float32)
DRAWS = 4000


@jax.jit
def draw(logits, settings):
    settings = dict(settings)
    keys = token_keys(settings.pop("seed"), jnp.arange(len(logits)))
    return choose_tokens(logits, keys, **settings)


def shares(logits=LOGITS, **fields):
    settings = Sampling(**fields).arrays()
    tokens = draw(jnp.tile(logits, (DRAWS, 1)), settings)
    return np.bincount(np.asarray(tokens), minlength=len(logits)) / DRAWS


def check(actual, expected):
    np.testing.assert_array_equal(actual[expected == 0], 0)
    np.testing.assert_allclose(actual, expected / expected.sum(), atol=0.03)


def only(*tokens):
    return np.where(np.isin(np.arange(7), tokens), PROBABILITIES, 0)


def test_temperature_divides_the_logits():
    check(shares(), PROBABILITIES)
    check(shares(temperature=0.5), PROBABILITIES**2)
    check(shares(temperature=2.0), PROBABILITIES**0.5)
    assert shares(temperature=1e-30)[1] == 1
    assert shares(1e30 * LOGITS, temperature=1e-30)[1] == 1


def test_greedy_takes_the_first_of_the_likeliest():
    assert shares(temperature=0)[1] == 1
    tied = jnp.array([0.0, 2.0, 2.0, 1.0])
    assert shares(tied, temperature=0)[1] == 1
    assert shares(tied, top_k=1)[1] == 1


def test_top_k_keeps_exactly_so_many_of_the_likeliest():
    check(shares(top_k=1), only(1))
    # Token 4 is as likely as token 3, but comes later.
    check(shares(top_k=2), only(1, 3))
    check(shares(top_k=3), only(1, 3, 4))
    check(shares(top_k=3, temperature=2.0), only(1, 3, 4) ** 0.5)
    check(shares(top_k=7), PROBABILITIES)
    check(shares(top_k=2**31 - 1), PROBABILITIES)


def test_top_p_keeps_the_fewest_with_that_mass():
    check(shares(top_p=1e-9), only(1))
    check(shares(top_p=0.39), only(1))
    check(shares(top_p=0.41), only(1, 3))
    check(shares(top_p=0.7), only(1, 3, 4))
    check(shares(top_p=0.89), only(0, 1, 3, 4))
    check(shares(top_p=1.0), PROBABILITIES)
    # At temperature 0.5 the likeliest has 0.62 of the mass.
    check(shares(top_p=0.6, temperature=0.5), only(1))
    check(shares(jnp.zeros(4), top_p=0.5), np.array([1, 1, 0, 0]))


def test_top_p_applies_to_what_top_k_leaves():
    """Of the three likeliest, 0.4 is half the mass, and 0.6 three quarters."""
    check(shares(top_k=3, top_p=0.49), only(1))
    check(shares(top_k=3, top_p=0.74), only(1, 3))
    check(shares(top_k=2, top_p=0.99), only(1, 3))


def test_rows_do_not_depend_on_each_other():
    logits = jax.random.normal(jax.random.key(0), (64, 50))
    for fields in ({}, {"top_k": 9, "top_p": 0.9}):
        settings = Sampling(seed=5, **fields).arrays()
        tokens = draw(logits, settings)
        np.testing.assert_array_equal(tokens[:20], draw(logits[:20], settings))
        other = draw(logits.at[:-1].set(0), settings)
        assert other[-1] == tokens[-1]


def test_seed_row_and_position_decide():
    keys = functools.partial(token_keys, np.uint32(3))
    first = jax.random.key_data(keys(jnp.array([4, 4, 7])))
    assert len(np.unique(first, axis=0)) == 3
    np.testing.assert_array_equal(first[:2], jax.random.key_data(keys(jnp.array([4, 4]))))
    other = jax.random.key_data(token_keys(np.uint32(4), jnp.array([4, 4, 7])))
    assert not (first == other).all(axis=1).any()
    largest = token_keys(np.uint32(2**32 - 1), jnp.array([0]))
    assert (jax.random.key_data(largest) != jax.random.key_data(keys(jnp.array([0])))).any()


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", -0.1),
        ("temperature", float("inf")),
        ("temperature", float("nan")),
        ("top_k", 0),
        ("top_k", 2**31),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("top_p", float("nan")),
        ("seed", -1),
        ("seed", 2**32),
    ],
)
def test_impossible_values_are_named(field, value):
    with pytest.raises(ValueError, match=f"^{field}={value}; expected"):
        Sampling(**{field: value})
