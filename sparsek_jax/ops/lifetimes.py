"""From when to when a key is attended to, and the lists of keys that chunks of queries share.

The cutoff only rises, so a key is attended to by one run of queries. Each query whose pool exceeds
k adds one key to the pool and drops one for good: the newcomer, if it comes after the cutoff, and
else the key that was the cutoff. An accepted newcomer takes the slot of the key it displaces, so a
key keeps its slot, a number below k, for as long as it is selected.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int32


class Lifetimes(NamedTuple):
    """Of every key of one row.

    Attributes:
      until: First query that does not attend to the key any more; the end of its document, if it is
        never dropped. Query t attends to key j exactly if `j <= t < until[j]`, window included.
      slot: The key's place among the k selected keys, from 0, while it is selected.
    """

    until: Int32[Array, " T"]
    slot: Int32[Array, " T"]


def key_lifetimes(
    kth: Int32[Array, " T"],
    start: Int32[Array, " T"],
    end: Int32[Array, " T"],
    *,
    num_selected: int,
    window: int,
) -> Lifetimes:
    """Follows every key from its entry into the pool.

    Args:
      kth: Position of the k-th key of every query's pool; anything where there are fewer than k.
      start: First position of every position's document.
      end: Position after the last of every position's document.
      num_selected: k.
      window: w.
    """
    (length,) = kth.shape
    position = jnp.arange(length, dtype=jnp.int32)
    newcomer = position - window
    exceeds = newcomer - start + 1 > num_selected
    previous_kth = jnp.concatenate([kth[:1], kth[:-1]])
    rejected = kth == previous_kth

    dropped = jnp.where(rejected, newcomer, previous_kth)
    until = end.at[jnp.where(exceeds, dropped, length)].set(position, mode="drop")

    # A key's predecessor in its slot, itself for the first. Repeated squaring reaches the first.
    entry = jnp.minimum(position + window, length - 1)
    displaces = (position + window < end) & (exceeds & ~rejected)[entry]
    first = jnp.where(displaces, previous_kth[entry], position)
    for _ in range(length.bit_length()):
        first = first[first]
    return Lifetimes(until, first - start)


def chunk_lists(
    lifetimes: Lifetimes, *, num_selected: int, window: int, chunk_size: int
) -> Int32[Array, "chunks k"]:
    """Lists every key that a chunk's first query has selected at its slot; -1 elsewhere.

    Args:
      lifetimes: Of one row.
      num_selected: k, at most T.
      window: w.
      chunk_size: Queries per chunk.
    """
    until, slot = lifetimes
    (length,) = until.shape
    num_chunks = -(-length // chunk_size)
    position = jnp.arange(length, dtype=jnp.int32)
    chunk = (position + window + chunk_size - 1) // chunk_size
    is_listed = chunk * chunk_size < until
    newest = jnp.full((num_chunks, num_selected), -1, jnp.int32)
    newest = newest.at[jnp.where(is_listed, chunk, num_chunks), slot].max(position, mode="drop")
    occupant = jax.lax.cummax(newest, axis=0)
    first_query = chunk_size * jnp.arange(num_chunks, dtype=jnp.int32)[:, None]
    alive = (occupant >= 0) & (until[jnp.maximum(occupant, 0)] > first_query)
    return jnp.where(alive, occupant, -1)
