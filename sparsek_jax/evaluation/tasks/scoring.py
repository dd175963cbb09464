"""Exact match of answers, or of each token of them, and their nats, in one forward pass.

A model that is shown the right answer and finds each of its tokens the likeliest after those before
would have written just that answer by itself, greedily: up to its first other token, greedy
decoding sees the same context. So exact match under greedy decoding needs no decoding (up to the
rounding in which decoding differs from a forward pass). What would follow the answer does not
count.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jaxtyping import Array, Bool, Float32, Int, Int32

from sparsek_jax.evaluation.tasks.task import Example

# Of parameters, tokens [B, T] and positions [B, A]: logits [B, A, V] of the tokens after these.
Predict = Callable[[Any, Int[Array, "B T"], Int[Array, "B A"]], Float32[Array, "B A V"]]


@dataclasses.dataclass(frozen=True)
class Score:
    """How a model did on an example.

    Attributes:
      credit: 1 if greedy decoding writes the answer, else 0; of queries, the share that is right.
        Of text that was written, the share of the references that it contains.
      nats: Negative log-likelihood of the answer, summed over its tokens.
    """

    credit: float
    nats: float


def score(
    predict: Predict,
    params: Any,
    examples: Sequence[Example],
    *,
    batch_size: int,
    rows: NamedSharding | None = None,
) -> Iterator[Score]:
    """Scores examples in their order, by one program for all of them.

    Args:
      predict: The model; compiled once for each shape, so keep the same one for all calls.
      params: Its first argument.
      examples: Of about the same length: all are padded behind to the longest.
      batch_size: Examples in a forward pass.
      rows: How batches are split over devices; None: not at all.

    Yields:
      The score of every example.
    """
    width = max(len(example.tokens) for example in examples)
    answer_width = max(len(example.answer) for example in examples)
    for start in range(0, len(examples), batch_size):
        batch = examples[start : start + batch_size]
        arrays = _arrays(batch, batch_size, width, answer_width)
        correct, nats = jax.device_get(_measure(predict, params, *jax.device_put(arrays, rows)))
        for example, right, lost in zip(batch, correct, nats, strict=False):
            right = right[: len(example.answer)]
            credit = right.all() if example.queries is None else right.mean()
            yield Score(float(credit), float(lost))


def _arrays(
    batch: Sequence[Example], size: int, width: int, answer_width: int
) -> tuple[np.ndarray, ...]:
    """Tokens `[B, T]`; positions before answers, these, and which are real, `[B, A]`."""
    # Padding is behind, out of sight of what comes before; the rows that lack are padding, too.
    tokens = np.zeros((size, width), np.int32)
    at = np.zeros((size, answer_width), np.int32)
    answers = np.zeros((size, answer_width), np.int32)
    real = np.zeros((size, answer_width), bool)
    for i, example in enumerate(batch):
        count = len(example.answer)
        tokens[i, : len(example.tokens)] = example.tokens
        at[i, :count], answers[i, :count], real[i, :count] = example.at, example.answer, True
    return tokens, at, answers, real


@functools.partial(jax.jit, static_argnames="predict")
def _measure(
    predict: Predict,
    params: Any,
    tokens: Int32[Array, "B T"],
    at: Int32[Array, "B A"],
    answers: Int32[Array, "B A"],
    real: Bool[Array, "B A"],
) -> tuple[Bool[Array, "B A"], Float32[Array, " B"]]:
    logits = predict(params, tokens, at)
    correct = jnp.argmax(logits, axis=-1) == answers
    log_p = jax.nn.log_softmax(logits, axis=-1)
    nats = -jnp.take_along_axis(log_p, answers[:, :, None], axis=-1)[:, :, 0]
    return correct, jnp.sum(jnp.where(real, nats, 0.0), axis=1)
