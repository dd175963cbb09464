import itertools
import re

import numpy as np

from sparsek_jax.evaluation.tasks.draws import (
    distinct_codes,
    distinct_words,
    draw_number,
    draw_phrase,
    draw_uuid,
)
from sparsek_jax.evaluation.tasks.words import ADJECTIVES, NOUNS, VERBS

WORDS = ADJECTIVES + NOUNS + VERBS


def test_no_word_is_in_the_lists_twice():
    assert len(set(WORDS)) == len(WORDS) == 1164
    assert all(re.fullmatch("[a-z]{2,10}", word) for word in WORDS)


def test_words_are_those_of_the_lists_and_then_compounds():
    first, again, other = (
        list(itertools.islice(distinct_words(np.random.default_rng(seed)), 3000))
        for seed in (0, 0, 1)
    )
    assert first == again != other
    assert len(set(first)) == 3000
    assert set(first[: len(WORDS)]) == set(WORDS)
    compounds = {a + b for a in NOUNS for b in NOUNS}
    assert compounds.issuperset(first[len(WORDS) :])


def test_codes_are_distinct_even_if_nearly_all_are_drawn():
    codes = distinct_codes(np.random.default_rng(0), "abc", 2, 9)
    assert set(codes) == {a + b for a in "abc" for b in "abc"}


def test_numbers_uuids_and_phrases_have_their_form():
    rng = np.random.default_rng(0)
    for _ in range(200):
        assert re.fullmatch(r"[1-9]\d{6}", draw_number(rng, 7))
        assert re.fullmatch(r"[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab].{16}", draw_uuid(rng))
        adjective, noun = draw_phrase(rng).split("-")
        assert adjective in ADJECTIVES
        assert noun in NOUNS
