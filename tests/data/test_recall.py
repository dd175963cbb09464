import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsek_jax.data.recall import mqar_rows


def rows(seed=0, **changes):
    sizes = {"batch_size": 3, "length": 64, "vocab_size": 40, "num_pairs": 4} | changes
    return mqar_rows(np.random.default_rng(seed), **sizes)


@settings(max_examples=50)
@given(
    num_pairs=st.integers(1, 20),
    more=st.integers(0, 60),
    vocabulary=st.integers(0, 50),
    power=st.floats(0.01, 1),
    random_filler=st.booleans(),
    seed=st.integers(0, 2**32 - 1),
)
def test_rows_are_as_zoology_defines_them(num_pairs, more, vocabulary, power, random_filler, seed):
    length, vocab_size = 4 * num_pairs + 2 * more, 2 * (num_pairs + 1) + vocabulary
    batch = rows(
        seed,
        length=length,
        vocab_size=vocab_size,
        num_pairs=num_pairs,
        power=power,
        random_filler=random_filler,
    )
    assert {name: (x.shape, x.dtype.name) for name, x in batch.items()} == {
        "inputs": ((3, length), "int32"),
        "targets": ((3, length), "int32"),
        "loss_mask": ((3, length), "float32"),
        "positions": ((3, length), "int32"),
        "segment_ids": ((3, length), "int32"),
    }
    context = 2 * num_pairs
    for inputs, targets, mask in zip(
        batch["inputs"], batch["targets"], batch["loss_mask"], strict=True
    ):
        keys, values = inputs[:context:2], inputs[1:context:2]
        assert len(set(keys)) == len(set(values)) == num_pairs
        assert 1 <= keys.min() <= keys.max() < vocab_size // 2
        assert vocab_size // 2 <= values.min() <= values.max() < vocab_size
        queries = np.flatnonzero(mask)
        assert set(mask[queries]) == {1}
        assert (queries >= context).all()
        assert not (queries % 2).any()
        # Each key once, and nowhere else.
        assert sorted(inputs[queries]) == sorted(keys)
        others = np.delete(inputs[context:], queries - context)
        assert not np.isin(others, keys).any()
        assert random_filler or not others.any()
        value_of = dict(zip(keys, values, strict=True))
        assert [value_of[key] for key in inputs[queries]] == list(targets[queries])
        assert not targets[mask == 0].any()


@settings(max_examples=30)
@given(
    num_pairs=st.integers(1, 8),
    wider=st.integers(0, 20),
    gap=st.integers(0, 10),
    more=st.integers(0, 20),
    num_fillers=st.integers(0, 30),
    random_filler=st.booleans(),
    seed=st.integers(0, 2**32 - 1),
)
def test_pairs_can_stand_among_filler_far_from_the_queries(
    num_pairs, wider, gap, more, num_fillers, random_filler, seed
):
    spread, gap = 2 * (num_pairs + wider), 2 * gap
    words = 24
    batch = rows(
        seed,
        length=spread + gap + 2 * (num_pairs + more),
        vocab_size=words + num_fillers,
        num_pairs=num_pairs,
        random_filler=random_filler,
        spread=spread,
        gap=gap,
        num_fillers=num_fillers,
    )
    for inputs, targets, mask in zip(
        batch["inputs"], batch["targets"], batch["loss_mask"], strict=True
    ):
        (queries,) = np.nonzero(mask)
        assert len(queries) == num_pairs
        assert queries.min() >= spread + gap
        keys = inputs[queries]
        assert len(set(keys)) == num_pairs
        # A key stands in two places: in its pair, and where it is asked for.
        places = np.flatnonzero(np.isin(inputs, keys))
        assert len(places) == 2 * num_pairs
        firsts = places[places < spread]
        assert len(firsts) == num_pairs
        assert not (firsts % 2).any()
        value_of = dict(zip(inputs[firsts], inputs[firsts + 1], strict=True))
        assert [value_of[key] for key in keys] == list(targets[queries])
        assert words // 2 <= targets[queries].min() <= targets[queries].max() < words
        filler = np.delete(inputs, np.concatenate([firsts, firsts + 1, queries]))
        if not random_filler:
            assert not filler.any()
        elif num_fillers and filler.size:
            assert words <= filler.min() <= filler.max() < words + num_fillers


def test_pairs_are_anywhere_among_the_first_tokens():
    batch = rows(batch_size=20_000, length=16, num_pairs=1, spread=10, num_fillers=10, gap=2)
    (_, places) = np.nonzero(batch["inputs"][:, :10:2] < 30)
    assert np.abs(np.bincount(places, minlength=5) / 20_000 - 0.2).max() < 0.015


def test_rows_depend_on_the_seed():
    first, again, other = rows(0), rows(0), rows(1)
    for name in first:
        np.testing.assert_array_equal(first[name], again[name])
    assert not np.array_equal(first["inputs"], other["inputs"])
    assert not np.array_equal(first["inputs"][0], first["inputs"][1])


def test_gaps_follow_the_power_law():
    """Of one pair the query is drawn once, so its place has the law's own frequencies."""
    sizes = {"batch_size": 20_000, "length": 22, "num_pairs": 1}
    for power in (0.01, 0.5, 1.0):
        places = (np.nonzero(rows(power=power, **sizes)["loss_mask"])[1] - 2) // 2
        weights = np.arange(1.0, 11) ** (power - 1)
        expected = weights / weights.sum()
        found = np.bincount(places, minlength=10) / len(places)
        assert np.abs(found - expected).max() < 0.015


def test_filler_is_uniform_over_what_it_may_be():
    batch = rows(batch_size=5000, length=20, vocab_size=8, num_pairs=1)
    filler = batch["inputs"][:, 2:][batch["loss_mask"][:, 2:] == 0]
    shares = np.bincount(filler, minlength=8) / len(filler)
    # A token from 1 to 3 is the key in one row of three.
    expected = np.array([1, 2 / 3, 2 / 3, 2 / 3, 1, 1, 1, 1]) / 7
    assert np.abs(shares - expected).max() < 0.01


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"length": 63}, "length=63; expected an even number of at least 16"),
        ({"length": 14}, "length=14; expected an even number of at least 16"),
        ({"vocab_size": 9}, "vocab_size=9; expected at least 10"),
        ({"num_pairs": 0}, "num_pairs=0; expected at least 1"),
        ({"batch_size": 0}, "batch_size=0; expected at least 1"),
        ({"spread": 6}, "spread=6; expected an even number of at least 8"),
        ({"spread": 9}, "spread=9; expected an even number of at least 8"),
        ({"gap": -2}, "gap=-2; expected at least 0"),
        ({"gap": 1}, "gap=1; expected an even number"),
        ({"spread": 40, "gap": 18}, "length=64; expected an even number of at least 66"),
        ({"num_fillers": -1}, "num_fillers=-1; expected at least 0"),
        ({"num_fillers": 31}, "vocab_size=40; expected at least 41"),
        ({"power": 0.0}, "power=0.0; expected a number above 0 and at most 1"),
    ],
)
def test_impossible_arguments_are_named(changes, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        rows(**changes)
