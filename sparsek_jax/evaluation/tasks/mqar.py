"""MQAR, multi-query associative recall, as Zoology defines it; see `sparsek_jax.data.recall`.

All pairs are at the beginning, a pair for every 16 tokens, and every key is asked for once. Random
tokens are no text: a model has to be trained on such rows, or be good at copying anything.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from sparsek_jax.data import Tokenizer
from sparsek_jax.data.recall import mqar_rows
from sparsek_jax.evaluation.tasks.task import Example, text_ids

_TOKENS_PER_PAIR = 16


@dataclasses.dataclass(frozen=True)
class Mqar:
    """See the module."""

    name: str = "mqar"
    measure: str = "share of the queries that it answered"
    has_depth: bool = False

    def make(
        self, tokenizer: Tokenizer, length: int, depth: float | None, rng: np.random.Generator
    ) -> Example:
        """See `Task.make`; a unit is two random tokens."""
        del depth
        if length < 1 + _TOKENS_PER_PAIR:
            raise ValueError(f"length={length}; expected at least {1 + _TOKENS_PER_PAIR} tokens")
        ids = text_ids(tokenizer)
        row_length = (length - 1) // 2 * 2
        rows = mqar_rows(
            rng,
            batch_size=1,
            length=row_length,
            vocab_size=len(ids),
            # With few ids there would not be enough of them for keys.
            num_pairs=min(row_length // _TOKENS_PER_PAIR, len(ids) // 4),
        )
        queries = np.flatnonzero(rows["loss_mask"][0])
        bos = np.array([tokenizer.bos_id], np.int32)
        return Example(
            prompt=np.concatenate([bos, ids[rows["inputs"][0]]]),
            answer=ids[rows["targets"][0, queries]],
            queries=(1 + queries).astype(np.int32),
        )
