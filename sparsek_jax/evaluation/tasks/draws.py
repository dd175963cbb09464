"""Random words, numbers and UUIDs for prompts."""

from __future__ import annotations

import uuid
from collections.abc import Iterator, Sequence

import numpy as np

from sparsek_jax.evaluation.tasks.words import ADJECTIVES, NOUNS, VERBS


def draw_uuid(rng: np.random.Generator) -> str:
    """Returns a random UUID of version 4, 36 characters."""
    return str(uuid.UUID(bytes=rng.bytes(16), version=4))


def draw_number(rng: np.random.Generator, digits: int) -> str:
    """Returns a random number of so many digits, the first of which is not zero."""
    return str(rng.integers(10 ** (digits - 1), 10**digits))


def draw_phrase(rng: np.random.Generator) -> str:
    """Returns an adjective and a noun, such as "calm-otter"."""
    return f"{_any_of(rng, ADJECTIVES)}-{_any_of(rng, NOUNS)}"


def distinct_codes(
    rng: np.random.Generator, alphabet: str, size: int, count: int
) -> tuple[str, ...]:
    """Returns `count` strings of `size` random letters, none of them twice."""
    codes = {}
    while len(codes) < count:
        code = "".join(alphabet[i] for i in rng.integers(len(alphabet), size=size))
        codes[code] = None
    return tuple(codes)


def distinct_words(rng: np.random.Generator) -> Iterator[str]:
    """Yields words, none of them twice, as many as any prompt needs.

    First English ones, then compounds of two nouns.
    """
    words = ADJECTIVES + NOUNS + VERBS
    yield from (words[i] for i in rng.permutation(len(words)))
    seen = set(words)
    while True:
        compound = _any_of(rng, NOUNS) + _any_of(rng, NOUNS)
        if compound not in seen:
            seen.add(compound)
            yield compound


def _any_of(rng: np.random.Generator, words: Sequence[str]) -> str:
    # Not rng.choice, which makes an array of all of them first.
    return words[rng.integers(len(words))]
