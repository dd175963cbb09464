"""A model on a task, at several lengths and depths."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np

from sparsek_jax.data import Tokenizer
from sparsek_jax.evaluation.tasks.scoring import Score
from sparsek_jax.evaluation.tasks.task import Example, Task


@dataclasses.dataclass(frozen=True)
class Cell:
    """Results at one length and depth.

    Attributes:
      length: Tokens that prompts could have.
      depth: Share of the filler before what is asked for; None for a task that has no depths.
      samples: Examples.
      prompt_tokens: That their prompts have, mean.
      correct: Examples with full credit.
      accuracy: Mean credit of the examples, see `Score`.
      nats_per_token: Mean loss of the answers' tokens.
    """

    length: int
    depth: float | None
    samples: int
    prompt_tokens: float
    correct: int
    accuracy: float
    nats_per_token: float


@dataclasses.dataclass(frozen=True)
class Grid:
    """Lengths and depths, and how many examples of each pair.

    Attributes:
      lengths: Ascending, in tokens.
      depths: Ascending, from 0 to 1. Tasks without depths ignore them.
      samples: Examples in each cell.
      seed: Of all of them.
    """

    lengths: tuple[int, ...]
    depths: tuple[float, ...]
    samples: int
    seed: int

    def depths_of(self, task: Task) -> tuple[float | None, ...]:
        """The depths of a task's cells."""
        return self.depths if task.has_depth else (None,)

    def examples(self, task: Task, tokenizer: Tokenizer, length: int) -> list[Example]:
        """Makes the examples of a length, depth by depth.

        They do not depend on what else is in the grid, and those of the same number differ between
        depths in nothing else.

        Raises:
          ValueError: The length is too short for the task.
        """
        try:
            return [
                task.make(tokenizer, length, depth, np.random.default_rng([self.seed, length, i]))
                for depth in self.depths_of(task)
                for i in range(self.samples)
            ]
        except ValueError as error:
            raise ValueError(f"eval.task_lengths, task {task.name}: {error}") from error

    def cells(
        self, task: Task, length: int, examples: Sequence[Example], scores: Sequence[Score]
    ) -> Iterator[Cell]:
        """Sums up what `examples` made."""
        for i, depth in enumerate(self.depths_of(task)):
            part = slice(i * self.samples, (i + 1) * self.samples)
            tokens = sum(len(example.answer) for example in examples[part])
            credits = [score.credit for score in scores[part]]
            yield Cell(
                length=length,
                depth=depth,
                samples=self.samples,
                prompt_tokens=float(np.mean([len(example.prompt) for example in examples[part]])),
                correct=credits.count(1),
                accuracy=float(np.mean(credits)),
                nats_per_token=sum(score.nats for score in scores[part]) / tokens,
            )
