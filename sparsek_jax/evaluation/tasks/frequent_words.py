"""Frequent words extraction: the three most frequent coded words, of counts that fall as 1 / rank².

RULER's task fwe (Hsieh et al. 2024, arXiv 2404.06654) with its words and numbers: words of six
random letters, one for every 50 tokens of the prompt, with the frequencies of a zeta distribution
of exponent 2. The most frequent of all is "...", which does not count.
"""

from __future__ import annotations

import dataclasses
import math
import string

import numpy as np

from sparsek_jax.data import Tokenizer
from sparsek_jax.evaluation.tasks.draws import distinct_codes
from sparsek_jax.evaluation.tasks.task import (
    ANSWERS_WRITTEN,
    Example,
    encode_example,
    most_units,
    prompt_tokens,
)

_NUM_ASKED = 3
_TOKENS_PER_CODE = 50
_ZETA_OF_2 = math.pi**2 / 6
# With so many words, the third of the coded ones is more frequent than the fourth, rounded as well.
_LEAST_WORDS = 53
_MAX_TOKENS = 50


@dataclasses.dataclass(frozen=True)
class FrequentWords:
    """See the module."""

    name: str = "fwe"
    measure: str = ANSWERS_WRITTEN
    has_depth: bool = False

    def make(
        self, tokenizer: Tokenizer, length: int, depth: float | None, rng: np.random.Generator
    ) -> Example:
        """See `Task.make`; a unit is a word, of whatever rank its turn is."""
        del depth
        num_codes = max(length // _TOKENS_PER_CODE - 1, _NUM_ASKED + 1)
        codes = distinct_codes(rng, string.ascii_lowercase, 6, num_codes)
        seed = int(rng.integers(2**63))

        def prompt(units):
            return _prompt(codes, _LEAST_WORDS - 1 + units, seed)

        units = most_units(lambda n: prompt_tokens(tokenizer, prompt(n)), length)
        asked = codes[:_NUM_ASKED]
        return encode_example(
            tokenizer,
            prompt(units),
            "".join(f" {code}" for code in asked),
            references=asked,
            max_tokens=_MAX_TOKENS,
        )


def _prompt(codes, num_words, seed):
    ranked = ("...", *codes)
    counts = (num_words / _ZETA_OF_2 / np.arange(1, len(ranked) + 1) ** 2).astype(int)
    words = [word for word, count in zip(ranked, counts, strict=True) for _ in range(count)]
    np.random.default_rng(seed).shuffle(words)
    return (
        "Read the following coded text and track the frequency of each coded word. Find the three "
        f"most frequently appeared coded words. {' '.join(words)}\nQuestion: Do not provide any "
        "explanation. Please ignore the dots '....'. What are the three most frequently appeared "
        "words in the above coded text? Answer: According to the coded text above, the three most "
        "frequently appeared words are:"
    )
