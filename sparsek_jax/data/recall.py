"""Rows of associative recall: pairs of random tokens, then the first of each again.

The task is MQAR of Zoology (Arora et al. 2023, arXiv 2312.04927), which tells apart architectures
that language modelling at small scale does not.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float32, Int32, Shaped


def check_mqar(
    *,
    batch_size: int,
    length: int,
    vocab_size: int,
    num_pairs: int,
    power: float = 0.01,
    spread: int = 0,
    gap: int = 0,
    num_fillers: int = 0,
) -> None:
    """Checks the arguments of `mqar_rows`.

    Raises:
      ValueError: One is out of range; the message names it.
    """
    for name, value, least in (
        ("batch_size", batch_size, 1),
        ("num_pairs", num_pairs, 1),
        ("gap", gap, 0),
        ("num_fillers", num_fillers, 0),
    ):
        if value < least:
            raise ValueError(f"{name}={value}; expected at least {least}")
    spread = spread or 2 * num_pairs
    if spread % 2 or spread < 2 * num_pairs:
        raise ValueError(f"spread={spread}; expected an even number of at least {2 * num_pairs}")
    if gap % 2:
        raise ValueError(f"gap={gap}; expected an even number")
    least = spread + gap + 2 * num_pairs
    if length % 2 or length < least:
        raise ValueError(f"length={length}; expected an even number of at least {least}")
    least = num_fillers + 2 * (num_pairs + 1)
    if vocab_size < least:
        raise ValueError(f"vocab_size={vocab_size}; expected at least {least}")
    if not 0 < power <= 1:
        raise ValueError(f"power={power}; expected a number above 0 and at most 1")


def mqar_rows(
    rng: np.random.Generator,
    *,
    batch_size: int,
    length: int,
    vocab_size: int,
    num_pairs: int,
    power: float = 0.01,
    random_filler: bool = True,
    spread: int = 0,
    gap: int = 0,
    num_fillers: int = 0,
) -> dict[str, Int32[np.ndarray, "B T"] | Float32[np.ndarray, "B T"]]:
    """Makes rows of multi-query associative recall (MQAR).

    A row begins with `num_pairs` pairs of a key and its value, a token each. Behind them every key
    comes once more, and there its value is asked for, which the row does not show again. Keys are
    tokens from 1 to V // 2 - 1, values from V // 2 to V - 1, both without repetition.

    The places of queries are every other one behind the pairs. Of these, the g-th has a weight of
    g ** (power - 1), and the queries draw theirs one after another, the first pair's first. So most
    gaps are short, as those between repetitions in language are; `power` 1 makes all alike.

    Other than in Zoology, filler never is one of the row's keys: with a small vocabulary it would
    show many of them with other values.

    Three arguments, which Zoology does not have, make of it a task for memories that have to choose
    what they keep: pairs far from the queries, among filler that can be told from them.

    Args:
      rng: The only source of randomness.
      batch_size: B.
      length: T, even and at least 4 * num_pairs.
      vocab_size: V; above 1,000 as a rule, else guessing goes far.
      num_pairs: Zoology has one for every 16 tokens as a rule, and for up to every 4.
      power: Of the law of gaps, above 0 and at most 1.
      random_filler: Whether what stands between queries is random tokens, or 0.
      spread: Tokens at the beginning, even, among which the pairs stand at random places; 0: they
        stand side by side.
      gap: Tokens of filler behind these, even, before there may be a query.
      num_fillers: The last so many tokens of the vocabulary are filler and nothing else, and V
        above does not count them; 0: any token is filler but the row's keys.

    Returns:
      A batch with the fields that training takes, each `[B, T]`: "inputs"; "targets", the value
      where a key is asked for and 0 elsewhere; "loss_mask", float32, 1 where a key is asked for;
      "positions" and "segment_ids" of rows of one document each. All but the mask are int32.

    Raises:
      ValueError: An argument is out of range; the message names it.
    """
    check_mqar(
        batch_size=batch_size,
        length=length,
        vocab_size=vocab_size,
        num_pairs=num_pairs,
        power=power,
        spread=spread,
        gap=gap,
        num_fillers=num_fillers,
    )
    spread = spread or 2 * num_pairs
    num_words = vocab_size - num_fillers
    half = num_words // 2
    keys = 1 + _distinct(rng, np.zeros(half - 1), batch_size, num_pairs)
    values = half + _distinct(rng, np.zeros(num_words - half), batch_size, num_pairs)
    pairs = 2 * np.sort(_distinct(rng, np.zeros(spread // 2), batch_size, num_pairs), axis=1)
    first = (spread + gap) // 2
    log_weights = (power - 1) * np.log(np.arange(1, length // 2 - first + 1))
    queries = 2 * (first + _distinct(rng, log_weights, batch_size, num_pairs))

    shape = (batch_size, length)
    if not random_filler:
        inputs = np.zeros(shape, np.int32)
    elif num_fillers:
        inputs = rng.integers(num_words, vocab_size, size=shape, dtype=np.int32)
    else:
        inputs = _tokens_but(rng, keys, shape, vocab_size)
    targets = np.zeros(shape, np.int32)
    loss_mask = np.zeros(shape, np.float32)
    for array, places, what in (
        (inputs, pairs, keys),
        (inputs, pairs + 1, values),
        (inputs, queries, keys),
        (targets, queries, values),
        (loss_mask, queries, np.float32(1)),
    ):
        np.put_along_axis(array, places, what, axis=1)
    return {
        "inputs": inputs,
        "targets": targets,
        "loss_mask": loss_mask,
        "positions": np.tile(np.arange(length, dtype=np.int32), (batch_size, 1)),
        "segment_ids": np.ones((batch_size, length), np.int32),
    }


def _distinct(
    rng: np.random.Generator, log_weights: Shaped[np.ndarray, " N"], rows: int, count: int
) -> Int32[np.ndarray, "B n"]:
    """Draws `count` indices without replacement in each row, one after another by their weights."""
    # The order of log-weights with Gumbel noise is that of such draws.
    noisy = log_weights + rng.gumbel(size=(rows, len(log_weights)))
    return np.argsort(-noisy, axis=1)[:, :count].astype(np.int32)


def _tokens_but(
    rng: np.random.Generator,
    excluded: Int32[np.ndarray, "B n"],
    shape: tuple[int, int],
    vocab_size: int,
) -> Int32[np.ndarray, "B T"]:
    """Random tokens, in every row other than the excluded ones."""
    is_excluded = np.zeros((shape[0], vocab_size), bool)
    np.put_along_axis(is_excluded, excluded, True, axis=1)
    tokens = rng.integers(vocab_size, size=shape, dtype=np.int32)
    while (again := np.take_along_axis(is_excluded, tokens, axis=1)).any():
        tokens[again] = rng.integers(vocab_size, size=again.sum(), dtype=np.int32)
    return tokens
