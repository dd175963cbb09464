"""Induction: of random tokens, a passage begins again at the end, and should go on as it did.

What induction heads do (Olsson et al. 2022, arXiv 2209.11895): find what is repeated, and copy what
followed. Depth 0 repeats the beginning of the prompt.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from sparsek_jax.data import Tokenizer
from sparsek_jax.evaluation.tasks.task import ANSWERED_EXACTLY, Example, most_units, text_ids

# Tokens that are repeated, enough to find the place by, and tokens that are to follow.
_CUE, _ANSWER = 8, 8


@dataclasses.dataclass(frozen=True)
class Induction:
    """See the module."""

    name: str = "induction"
    measure: str = ANSWERED_EXACTLY
    has_depth: bool = True

    def make(
        self, tokenizer: Tokenizer, length: int, depth: float | None, rng: np.random.Generator
    ) -> Example:
        """See `Task.make`; a unit is a random token."""
        units = most_units(lambda n: 1 + n + 2 * _CUE + _ANSWER, length)
        ids = text_ids(tokenizer)
        cue, answer, filler = (rng.choice(ids, size) for size in (_CUE, _ANSWER, units))
        before = round(depth * units)
        bos = np.array([tokenizer.bos_id], np.int32)
        parts = (bos, filler[:before], cue, answer, filler[before:], cue)
        return Example(np.concatenate(parts), answer)
