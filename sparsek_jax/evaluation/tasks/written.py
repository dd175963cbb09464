"""Credit for what a model writes, by RULER's rule: the share of the references that it contains.

Where several answers are right, in any order and any way of listing them, one forward pass cannot
tell whether they would have been given. So the model writes, greedily, from its cache.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

from sparsek_jax.evaluation.tasks.task import Example
from sparsek_jax.generation.engine import Engine
from sparsek_jax.generation.sampling import Sampling


def share_found(text: str, references: Sequence[str]) -> float:
    """Returns the share of the references that stand in a text, upper or lower case alike."""
    return sum(reference.lower() in text.lower() for reference in references) / len(references)


def written_credits(
    engine: Engine, examples: Sequence[Example], *, batch_size: int
) -> Iterator[float]:
    """Lets a model write after every prompt.

    The texts of a batch end when all have all their references, or with `max_tokens`, the most that
    one of the examples has.

    Args:
      engine: The model; a few programs are compiled for all calls, or for each length if it has
        layers with dense attention.
      examples: With references.
      batch_size: Texts that are written together.

    Yields:
      The share of its references that each example's text contains, in order.

    Raises:
      NonFiniteLogitsError: Logits are not finite.
    """
    max_tokens = max(example.max_tokens for example in examples)
    for batch in itertools.batched(examples, batch_size):
        # Of another number of rows another program would have to be compiled.
        rows = [*batch, *[batch[-1]] * (batch_size - len(batch))]
        session = engine.start_tokens(
            [example.prompt.tolist() for example in rows], max_tokens=max_tokens
        )
        texts = [""] * len(rows)

        def all_found(rows=rows, texts=texts):
            return all(
                share_found(text, example.references) == 1
                for text, example in zip(texts, rows, strict=True)
            )

        for row, piece in session.stream(
            max_tokens=max_tokens, sampling=Sampling(temperature=0), cancelled=all_found
        ):
            texts[row] += piece
        for text, example in zip(texts[: len(batch)], batch, strict=True):
            yield share_found(text, example.references)
