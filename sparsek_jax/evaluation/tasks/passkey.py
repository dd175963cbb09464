"""Passkey retrieval: a number hidden in filler text.

The text is that of Mohtashami and Jaggi (2023), Landmark Attention, arXiv 2305.16300. Here the
filler is whole sentences, and every number has five digits, so that none is easier to spell.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from sparsek_jax.data import Tokenizer
from sparsek_jax.evaluation.tasks.task import (
    ANSWERED_EXACTLY,
    FILLER,
    Example,
    encode_example,
    most_units,
    prompt_tokens,
)

_INTRODUCTION = (
    "There is an important info hidden inside a lot of irrelevant text. Find it and memorize them. "
    "I will quiz you about the important information there."
)
_QUESTION = "What is the pass key? The pass key is"


@dataclasses.dataclass(frozen=True)
class Passkey:
    """See the module."""

    name: str = "passkey"
    measure: str = ANSWERED_EXACTLY
    has_depth: bool = True

    def make(
        self, tokenizer: Tokenizer, length: int, depth: float | None, rng: np.random.Generator
    ) -> Example:
        """See `Task.make`; a unit is a sentence."""
        passkey = int(rng.integers(10_000, 100_000))
        needle = f"The pass key is {passkey}. Remember it. {passkey} is the pass key."

        def prompt(sentences):
            before = round(depth * sentences)
            lines = (_INTRODUCTION, _filler(before), needle, _filler(sentences - before), _QUESTION)
            return "\n".join(line for line in lines if line)

        sentences = most_units(lambda n: prompt_tokens(tokenizer, prompt(n)), length)
        return encode_example(tokenizer, prompt(sentences), f" {passkey}")


def _filler(sentences: int) -> str:
    return " ".join(FILLER[i % len(FILLER)] for i in range(sentences))
