"""Common words extraction: the ten words that a long list repeats more often than the others.

RULER's task cwe (Hsieh et al. 2024, arXiv 2404.06654) with its words and numbers, after a short
solved example: below 4,096 tokens common words stand there 6 times and others once, from there on
30 and 3 times. The listed words are those of `words` and not RULER's, so scores are comparable with
published ones in kind, not to the digit.
"""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np

from sparsek_jax.data import Tokenizer
from sparsek_jax.evaluation.tasks.draws import distinct_words
from sparsek_jax.evaluation.tasks.task import (
    ANSWERS_WRITTEN,
    Example,
    encode_example,
    most_units,
    prompt_tokens,
)

_NUM_COMMON = 10
_LONG = 4096
_MAX_TOKENS = 120


@dataclasses.dataclass(frozen=True)
class CommonWords:
    """See the module."""

    name: str = "cwe"
    measure: str = ANSWERS_WRITTEN
    has_depth: bool = False

    def make(
        self, tokenizer: Tokenizer, length: int, depth: float | None, rng: np.random.Generator
    ) -> Example:
        """See `Task.make`; a unit is one more word that is not common, however often repeated."""
        del depth
        is_long = length >= _LONG
        solved = tuple(itertools.islice(distinct_words(rng), 40 if is_long else 20))
        times = (10, 3) if is_long else (3, 1)
        example = f"{_prompt(solved, times, _draw_seed(rng))}{_answer(solved)}\n"
        times, seed = (30, 3) if is_long else (6, 1), _draw_seed(rng)
        source, words = distinct_words(rng), []

        def prompt(units):
            words.extend(itertools.islice(source, max(0, _NUM_COMMON + units - len(words))))
            return example + _prompt(words[: _NUM_COMMON + units], times, seed)

        units = most_units(lambda n: prompt_tokens(tokenizer, prompt(n)), length)
        return encode_example(
            tokenizer,
            prompt(units),
            _answer(words),
            references=tuple(words[:_NUM_COMMON]),
            max_tokens=_MAX_TOKENS,
        )


def _draw_seed(rng):
    return int(rng.integers(2**63))


def _prompt(words, times, seed):
    common, others = (list(part) for part in (words[:_NUM_COMMON], words[_NUM_COMMON:]))
    entries = times[0] * common + times[1] * others
    np.random.default_rng(seed).shuffle(entries)
    return (
        "Below is a numbered list of words. In these words, some appear more often than others. "
        f"Memorize the ones that appear most often.\n{_numbered(entries)}\nQuestion: What are the "
        f"{_NUM_COMMON} most common words in the above list? Answer: The top {_NUM_COMMON} words "
        "that appear most often in the list are:"
    )


def _answer(words):
    return f" {_numbered(words[:_NUM_COMMON])}"


def _numbered(words):
    return " ".join(f"{i}. {word}" for i, word in enumerate(words, start=1))
