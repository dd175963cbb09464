"""What a task is, and what generators of prompts share."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Protocol

import numpy as np
from jaxtyping import Int32

from sparsek_jax.data import Tokenizer

# Sentences that say nothing, in which tasks hide something else; in RULER, too.
FILLER = (
    "The grass is green.",
    "The sky is blue.",
    "The sun is yellow.",
    "Here we go.",
    "There and back again.",
)

# What an example is given credit for, in a report's words.
ANSWERED_EXACTLY = "answered exactly"
ANSWERS_WRITTEN = "share of the answers that it wrote"


@dataclasses.dataclass(frozen=True)
class Example:
    """A question with a right answer.

    Attributes:
      prompt: What the model reads, from bos on, `[P]`.
      answer: The tokens that must follow, `[A]`, at least one.
      queries: If not None, the answer's tokens are asked for one by one within the prompt, each
        after the token at its position, ascending, `[A]`; the model does not read them.
      references: If there are any, the model is let write, and these are what its text should
        contain; `answer` is then one way of writing them.
      max_tokens: How many tokens it may write then.
    """

    prompt: Int32[np.ndarray, " P"]
    answer: Int32[np.ndarray, " A"]
    queries: Int32[np.ndarray, " A"] | None = None
    references: tuple[str, ...] = ()
    max_tokens: int = 0

    @property
    def tokens(self) -> Int32[np.ndarray, " T"]:
        """What a forward pass has to read to be asked for all of the answer."""
        if self.queries is not None:
            return self.prompt
        return np.concatenate([self.prompt, self.answer[:-1]])

    @property
    def at(self) -> Int32[np.ndarray, " A"]:
        """The positions in `tokens` after each of which a token of the answer should come."""
        if self.queries is not None:
            return self.queries
        return len(self.prompt) - 1 + np.arange(len(self.answer), dtype=np.int32)


class Task(Protocol):
    """A generator of questions, of any length, about something at any depth.

    Attributes:
      name: In `TASKS`, and of the files of results.
      measure: What accuracy means, for people.
      has_depth: Whether it matters where something stands. If not, a report has no depths.
    """

    @property
    def name(self) -> str:
        """See the class."""

    @property
    def measure(self) -> str:
        """See the class."""

    @property
    def has_depth(self) -> bool:
        """See the class."""

    def make(
        self, tokenizer: Tokenizer, length: int, depth: float | None, rng: np.random.Generator
    ) -> Example:
        """Makes an example; the same one from a generator in the same state.

        Args:
          tokenizer: The model's.
          length: Most tokens of the prompt, bos included. As many as whole units of filler allow
            are used.
          depth: Share of the filler that stands before what is asked for, from 0 to 1. None, and
            ignored, if `has_depth` is false.
          rng: The only source of randomness. What is drawn does not depend on `depth`, so that
            examples of the same seed differ in nothing else.

        Raises:
          ValueError: `length` is too short for this task.
        """


def most_units(num_tokens: Callable[[int], int], length: int) -> int:
    """Returns the largest number of filler units, at least 1, with which a prompt still fits.

    Args:
      num_tokens: Tokens of the prompt by number of units, rising.
      length: Most tokens allowed.

    Raises:
      ValueError: One unit is too much.
    """
    low, below = 1, num_tokens(1)
    if below > length:
        raise ValueError(f"length={length}; expected at least {below} tokens")
    high = 2
    while (above := num_tokens(high)) <= length:
        low, below, high = high, above, 2 * high
    while high - low > 1:
        # Units are nearly alike, so a few interpolations do; each tokenizes a whole prompt.
        guess = low + (high - low) * (length - below) // (above - below)
        middle = min(max(guess, low + 1), high - 1)
        tokens = num_tokens(middle)
        if tokens <= length:
            low, below = middle, tokens
        else:
            high, above = middle, tokens
    return low


def prompt_tokens(tokenizer: Tokenizer, prompt: str) -> int:
    """Number of tokens of a prompt, with bos."""
    return 1 + len(tokenizer.encode(prompt))


def text_ids(tokenizer: Tokenizer) -> Int32[np.ndarray, " n"]:
    """The ids that stand for some text, ascending: neither bos nor other special tokens."""
    return np.flatnonzero(tokenizer.byte_lengths).astype(np.int32)


def encode_example(
    tokenizer: Tokenizer,
    prompt: str,
    answer: str,
    *,
    references: tuple[str, ...] = (),
    max_tokens: int = 0,
) -> Example:
    """Tokenizes a prompt and its answer as the one text that they are.

    Tokenized by itself an answer could get tokens that no model has seen there. A token across the
    border belongs to the answer.

    Args:
      tokenizer: The model's.
      prompt: Without bos.
      answer: What follows.
      references: As in `Example`.
      max_tokens: As in `Example`, but at least as many as the answer has.
    """
    alone = tokenizer.encode(prompt)
    together = tokenizer.encode(prompt + answer)
    size = min(len(alone), len(together))
    differ = np.flatnonzero(alone[:size] != together[:size])
    border = int(differ[0]) if differ.size else size
    bos = np.array([tokenizer.bos_id], np.int32)
    answer_ids = together[border:]
    return Example(
        np.concatenate([bos, together[:border]]),
        answer_ids,
        references=references,
        max_tokens=max(max_tokens, len(answer_ids)) if references else 0,
    )
