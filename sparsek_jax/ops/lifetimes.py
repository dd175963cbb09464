"""From when to when a key is attended to, and the lists of keys that chunks of queries share.

The cutoff only rises, so a key is attended to by one run of queries. Each query whose pool exceeds
k adds one key to the pool and drops one for good: the newcomer, if it comes after the cutoff, and
else the key that was the cutoff. An accepted newcomer takes the slot of the key it displaces, so a
key keeps its slot, a number below k, for as long as it is selected.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int32

from sparsek_jax.ops.indexing import gather, rows_of, scatter


class Lifetimes(NamedTuple):
    """Of every key of every row.

    Attributes:
      until: First query that does not attend to the key any more; the end of its document, if it is
        never dropped. Query t attends to key j exactly if `j <= t < until[j]`, window included.
      slot: The key's place among the k selected keys, from 0, while it is selected.
    """

    until: Int32[Array, "R T"]
    slot: Int32[Array, "R T"]


def chain_starts(previous: Int32[Array, "R M"]) -> Int32[Array, "R M"]:
    """Where one gets to from every key by going on to `previous` until that is the key itself."""
    row = rows_of(previous)
    # Every round goes four times as far.
    for _ in range(-(-previous.shape[1].bit_length() // 2)):
        fourth = previous
        for _ in range(3):
            fourth = gather(previous, row, fourth)
        previous = fourth
    return previous


def key_lifetimes(
    kth: Int32[Array, "R M"],
    start: Int32[Array, "R M"],
    end: Int32[Array, "R M"],
    *,
    num_selected: int,
    chain_starts: Callable[[Int32[Array, "R M"]], Int32[Array, "R M"]] = chain_starts,
) -> Lifetimes:
    """Follows every key from its entry into the pool; time is told by the keys that enter.

    Args:
      kth: The k-th key of the pool when each key has entered; anything where there are fewer.
      start: First key of every key's document.
      end: Key after the last of every key's document.
      num_selected: k.
      chain_starts: As the function of this name.

    Returns:
      Lifetimes, `until` as the key at whose entry this one is dropped, or the end of the document.
    """
    row = rows_of(kth)
    newcomer = jnp.arange(kth.shape[1], dtype=jnp.int32)
    exceeds = newcomer - start >= num_selected
    previous_kth = jnp.concatenate([kth[:, :1], kth[:, :-1]], axis=1)
    rejected = kth == previous_kth

    dropped = jnp.where(rejected, newcomer, previous_kth)
    until = scatter(end, (row, dropped), newcomer, where=exceeds)

    # A key's predecessor in its slot, itself for the first.
    predecessor = jnp.where(exceeds & ~rejected, previous_kth, newcomer)
    return Lifetimes(until, chain_starts(predecessor) - start)


def dropped_keys(until: Int32[Array, "B T K"], end: Int32[Array, "B T"]) -> Int32[Array, "B T K"]:
    """The key that every query is the first not to attend to any more; T if there is none.

    A query adds at most one key to the pool, so it drops at most one.

    Args:
      until: As in `Lifetimes`, of every KV head.
      end: Position after the last one of every position's document.
    """
    batch, length, num_heads = until.shape
    index = (np.arange(batch)[:, None, None], until, np.arange(num_heads))
    position = jnp.arange(length, dtype=jnp.int32)[:, None]
    return scatter(jnp.full_like(until, length), index, position, where=until < end[..., None])


def chunk_lists(
    keys: Int32[Array, "R M"],
    lifetimes: Lifetimes,
    *,
    length: int,
    num_selected: int,
    window: int,
    chunk_size: int,
    packed: bool,
) -> Int32[Array, "R chunks k"]:
    """Lists every key that a chunk's first query has selected at its slot; -1 elsewhere.

    Args:
      keys: Positions of all that are ever selected, in order, and maybe others.
      lifetimes: Of these; `until` is 0 where there is no key.
      length: T.
      num_selected: k, at most T.
      window: w.
      chunk_size: Queries per chunk.
      packed: Whether rows hold several documents.
    """
    num_rows = len(keys)
    row = rows_of(keys)
    num_chunks = -(-length // chunk_size)
    chunk = (keys + window + chunk_size - 1) // chunk_size
    is_listed = chunk * chunk_size < lifetimes.until
    flat = (row * num_chunks + chunk) * num_selected + lifetimes.slot
    newest = jnp.full((num_rows * num_chunks * num_selected,), -1, jnp.int32)
    ids = jnp.broadcast_to(jnp.arange(keys.shape[1], dtype=jnp.int32), keys.shape)
    newest = newest.at[jnp.where(is_listed, flat, newest.size)].max(ids, mode="drop")
    occupant = jax.lax.cummax(newest.reshape(num_rows, num_chunks, num_selected), axis=1)
    at = row[..., None], jnp.maximum(occupant, 0)
    is_selected = occupant >= 0
    if packed:
        # Before the document ends a slot only ever passes to a newer key.
        first_query = chunk_size * np.arange(num_chunks, dtype=np.int32)[:, None]
        is_selected &= gather(lifetimes.until, *at) > first_query
    return jnp.where(is_selected, gather(keys, *at), -1)
