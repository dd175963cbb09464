"""Key-value retrieval: the value of one key among many, all of them random UUIDs.

The text is that of Liu et al. (2023), Lost in the Middle, arXiv 2307.03172. Here the prompt goes on
to the value's opening quote, so that the answer is the value alone and not a way of writing it.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from sparsek_jax.data import Tokenizer
from sparsek_jax.evaluation.tasks.draws import draw_uuid
from sparsek_jax.evaluation.tasks.task import (
    ANSWERED_EXACTLY,
    Example,
    encode_example,
    most_units,
    prompt_tokens,
)

_INTRODUCTION = "Extract the value corresponding to the specified key in the JSON object below."


@dataclasses.dataclass(frozen=True)
class KeyValue:
    """See the module."""

    name: str = "key_value"
    measure: str = ANSWERED_EXACTLY
    has_depth: bool = True

    def make(
        self, tokenizer: Tokenizer, length: int, depth: float | None, rng: np.random.Generator
    ) -> Example:
        """See `Task.make`; a unit is another pair."""
        key, value = _pair(rng)
        others = []

        def prompt(num_others):
            while len(others) < num_others:
                others.append(_pair(rng))
            before = round(depth * num_others)
            pairs = (*others[:before], (key, value), *others[before:num_others])
            records = ",\n ".join(f'"{k}": "{v}"' for k, v in pairs)
            return (
                f"{_INTRODUCTION}\n\nJSON data:\n{{{records}}}\n\n"
                f'Key: "{key}"\nCorresponding value: "'
            )

        num_others = most_units(lambda n: prompt_tokens(tokenizer, prompt(n)), length)
        return encode_example(tokenizer, prompt(num_others), value)


def _pair(rng: np.random.Generator) -> tuple[str, str]:
    return draw_uuid(rng), draw_uuid(rng)
