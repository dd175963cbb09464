"""Needles in a haystack: what was said of one key, in filler or among the same about other keys.

RULER's task niah (Hsieh et al. 2024, arXiv 2404.06654) with its words, in the three of its eight
settings whose haystack is no download. Here needles have distinct keys, the haystack has as many
units as fit, and the depth is given where RULER draws it. Words are those of `words` and not
RULER's, so scores are comparable with published ones in kind, not to the digit.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np

from sparsek_jax.data import Tokenizer
from sparsek_jax.evaluation.tasks.draws import draw_number, draw_phrase, draw_uuid
from sparsek_jax.evaluation.tasks.task import (
    ANSWERS_WRITTEN,
    FILLER,
    Example,
    encode_example,
    most_units,
    prompt_tokens,
)

Draw = Callable[[np.random.Generator], str]

# RULER lets a model write so much.
_MAX_TOKENS = 128


def _draw_value(rng: np.random.Generator) -> str:
    return draw_number(rng, digits=7)


@dataclasses.dataclass(frozen=True)
class Niah:
    """See the module.

    Attributes:
      name: As in `Task`.
      kind: What values are called: "number" or "uuid".
      draw_key: Draws what a needle is about.
      draw_value: Draws what it says.
      among_needles: Whether the haystack is other needles, or filler that repeats.
      measure: As in `Task`.
      has_depth: As in `Task`.
    """

    name: str
    kind: str
    draw_key: Draw
    draw_value: Draw
    among_needles: bool
    measure: str = ANSWERS_WRITTEN
    has_depth: bool = True

    def make(
        self, tokenizer: Tokenizer, length: int, depth: float | None, rng: np.random.Generator
    ) -> Example:
        """See `Task.make`; a unit is another needle, or the five sentences of filler."""
        key, value = self.draw_key(rng), self.draw_value(rng)
        hay, keys = [], {key}

        def straw():
            if not self.among_needles:
                return " ".join(FILLER)
            while (other := self.draw_key(rng)) in keys:
                pass
            keys.add(other)
            return self._needle(other, self.draw_value(rng))

        def prompt(units):
            while len(hay) < units:
                hay.append(straw())
            before = round(depth * units)
            lines = (*hay[:before], self._needle(key, value), *hay[before:units])
            return "\n".join((self._introduction(), *lines, self._question(key)))

        units = most_units(lambda n: prompt_tokens(tokenizer, prompt(n)), length)
        return encode_example(
            tokenizer, prompt(units), f" {value}", references=(value,), max_tokens=_MAX_TOKENS
        )

    def _needle(self, key: str, value: str) -> str:
        return f"One of the special magic {self.kind}s for {key} is: {value}."

    def _introduction(self) -> str:
        return (
            f"A special magic {self.kind} is hidden within the following text. Make sure to "
            f"memorize it. I will quiz you about the {self.kind} afterwards."
        )

    def _question(self, key: str) -> str:
        subject = f"special magic {self.kind} for {key} mentioned in the provided text"
        return f"What is the {subject}? The {subject} is"


NIAH_SINGLE_1 = Niah("niah_single_1", "number", draw_phrase, _draw_value, among_needles=False)
NIAH_MULTIKEY_2 = Niah("niah_multikey_2", "number", draw_phrase, _draw_value, among_needles=True)
NIAH_MULTIKEY_3 = Niah("niah_multikey_3", "uuid", draw_uuid, draw_uuid, among_needles=True)
