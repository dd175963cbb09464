"""Variable tracking: all names that a value has got through a chain of assignments in filler text.

RULER's task vt (Hsieh et al. 2024, arXiv 2404.06654) with its words and numbers: one chain of four
hops, at random places in their order, after a solved example. The example has five lines of filler,
in RULER as many as fit into 500 tokens.
"""

from __future__ import annotations

import dataclasses
import string

import numpy as np

from sparsek_jax.data import Tokenizer
from sparsek_jax.evaluation.tasks.draws import distinct_codes, draw_number
from sparsek_jax.evaluation.tasks.task import (
    ANSWERS_WRITTEN,
    FILLER,
    Example,
    encode_example,
    most_units,
    prompt_tokens,
)

_NUM_VARIABLES = 5
# Every assignment has a line of filler of its own behind it.
_LEAST_LINES = _NUM_VARIABLES
_MAX_TOKENS = 30


@dataclasses.dataclass(frozen=True)
class VariableTracking:
    """See the module."""

    name: str = "vt"
    measure: str = ANSWERS_WRITTEN
    has_depth: bool = False

    def make(
        self, tokenizer: Tokenizer, length: int, depth: float | None, rng: np.random.Generator
    ) -> Example:
        """See `Task.make`; a unit is a line, of the five sentences of filler."""
        del depth
        solved, chain = _Chain.draw(rng, name_size=3), _Chain.draw(rng, name_size=5)
        example = f"{solved.prompt(_LEAST_LINES)}{solved.answer}\n\n"

        def prompt(units):
            return example + chain.prompt(_LEAST_LINES - 1 + units)

        units = most_units(lambda n: prompt_tokens(tokenizer, prompt(n)), length)
        return encode_example(
            tokenizer,
            prompt(units),
            chain.answer,
            references=chain.names,
            max_tokens=_MAX_TOKENS,
        )


@dataclasses.dataclass(frozen=True)
class _Chain:
    names: tuple[str, ...]
    value: str
    seed: int  # of the places in a text of any length

    @classmethod
    def draw(cls, rng: np.random.Generator, *, name_size: int) -> _Chain:
        names = distinct_codes(rng, string.ascii_uppercase, name_size, _NUM_VARIABLES)
        return cls(names, draw_number(rng, digits=5), int(rng.integers(2**63)))

    @property
    def answer(self) -> str:
        return "".join(f" {name}" for name in self.names)

    def prompt(self, num_lines: int) -> str:
        lines = [f"{' '.join(FILLER)}\n"] * num_lines
        places = np.random.default_rng(self.seed).choice(num_lines, _NUM_VARIABLES, replace=False)
        sources = (self.value, *(f"VAR {name}" for name in self.names))
        for place, name, source in zip(np.sort(places), self.names, sources, strict=False):
            lines[place] = f"VAR {name} = {source} {lines[place]}"
        return (
            "Memorize and track the chain(s) of variable assignment hidden in the following text."
            f"\n\n{' '.join(lines)}\n"
            f"Question: Find all variables that are assigned the value {self.value} in the text "
            "above. Answer: According to the chain(s) of variable assignment in the text above, "
            f"{_NUM_VARIABLES} variables are assigned the value {self.value}, they are:"
        )
