"""What a row of a batch hands to the next row of the same document: constant in size.

A row with its memory in front is a sequence of which the operator selects as it would from the
whole document. For scores are absolute and a dropped key never returns, so that of the pool so far
no more than the k best keys can be selected, and of others nothing but scores can matter, to the
gates' thresholds: those above them, the support. The newest w keys, the window, follow the pool.

Unlike the cache of generation (ops/cache.py) all this is differentiable, and a row may hold several
documents, of which the first goes on and the last is remembered.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Float32, Int, Int32

from sparsek_jax.ops.selection import document_bounds
from sparsek_jax.ops.tracing import computed_once


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["key", "value", "score", "count", "position"],
    meta_fields=["num_selected", "sliding_window"],
)
@dataclasses.dataclass(frozen=True)
class Memory:
    """The past of every row's document; `init_memory` makes an empty one.

    S is the number of scores per token: the KV heads, or 1; P how many scores of dropped keys there
    is room for. Heads select different keys but have the same number of them.

    Attributes:
      key: The selected keys from the oldest on, from row 0; the window's up to the last row.
      value: As `key`.
      score: Those of the selected keys from row 0, then of the best dropped ones; the window's up
        to the last row.
      count: How many scores there are.
      position: Of the document's next token; 0 while there is no document.
      num_selected: k.
      sliding_window: w.
    """

    key: Float[Array, "B k+w K H"]
    value: Float[Array, "B k+w K H"]
    score: Float32[Array, "B k+P+w S"]
    count: Int32[Array, " B"]
    position: Int32[Array, " B"]
    num_selected: int
    sliding_window: int


class Sequence(NamedTuple):
    """A memory and the row behind it: L = k + P + w + T tokens for the operator.

    What of the memory does not exist, or is of another document, comes first, as a document of its
    own. Dropped keys have a score, but neither key nor value, which no query sees.

    Attributes:
      key: Keys.
      value: Values.
      scores: Scores.
      segment_ids: Of documents.
    """

    key: Float[Array, "B L K H"]
    value: Float[Array, "B L K H"]
    scores: Float32[Array, "B L S"]
    segment_ids: Int[Array, "B L"]


def init_memory(
    batch_size: int,
    *,
    num_kv_heads: int,
    head_dim: int,
    num_selected: int,
    sliding_window: int,
    num_scores: int,
    support_size: int,
    dtype: jax.typing.DTypeLike,
) -> Memory:
    """Makes an empty memory.

    Args:
      batch_size: B.
      num_kv_heads: K.
      head_dim: H.
      num_selected: k; 0 for a window alone.
      sliding_window: w.
      num_scores: S.
      support_size: P. Gates are exact while no more dropped keys than these have scores above the
        threshold; without gates none is needed.
      dtype: Of keys and values.
    """
    rows = num_selected + sliding_window

    def empty(*shape, dtype):
        return jnp.zeros((batch_size, *shape), dtype)

    return Memory(
        key=empty(rows, num_kv_heads, head_dim, dtype=dtype),
        value=empty(rows, num_kv_heads, head_dim, dtype=dtype),
        score=empty(rows + support_size, num_scores, dtype=jnp.float32),
        count=empty(dtype=jnp.int32),
        position=empty(dtype=jnp.int32),
        num_selected=num_selected,
        sliding_window=sliding_window,
    )


def goes_on(memory: Memory, positions: Int[Array, "B T"]) -> Bool[Array, " B"]:
    """Whether a row begins where its memory ends, given its tokens' positions in documents.

    A row in the middle of a document whose last row was not remembered has nothing to go on from.
    """
    return (positions[:, 0] > 0) & (positions[:, 0] == memory.position)


def with_memory(
    memory: Memory,
    key: Float[Array, "B T K H"],
    value: Float[Array, "B T K H"],
    scores: Float[Array, "B T S"],
    *,
    positions: Int[Array, "B T"],
    segment_ids: Int[Array, "B T"],
) -> Sequence:
    """Puts rows behind their memories.

    Args:
      memory: Of the rows before.
      key: Keys of the rows, dtype of the memory.
      value: Values.
      scores: Scores that count on from those of the rows before.
      positions: Of the tokens in their documents.
      segment_ids: Ids of packed documents (maximal runs of equal ids).
    """
    k, w = memory.num_selected, memory.sliding_window
    size = memory.score.shape[1]
    count = jnp.where(goes_on(memory, positions), memory.count, 0)[:, None]
    exists = np.arange(size) >= size - count
    # How many keys of the pool come before; the window is full if there are any.
    slot = np.arange(size - w) - (size - w - jnp.maximum(count - w, 0))
    window = jnp.broadcast_to(np.arange(w), (len(slot), w))
    key_row = jnp.concatenate([jnp.where(slot < k, slot, k + w), k + window], axis=1)
    score_row = jnp.concatenate([slot, size - w + window], axis=1)

    def joined(past, row, new):
        # Also keeps out the NaNs of a memory that has gone bad.
        past = _where(exists, _rows(past, jnp.where(exists, row, 0)), 0)
        return jnp.concatenate([past, new], axis=1)

    first = segment_ids[:, :1]
    return Sequence(
        joined(memory.key, key_row, key),
        joined(memory.value, key_row, value),
        joined(memory.score, score_row, computed_once(scores.astype(jnp.float32))),
        jnp.concatenate([jnp.where(exists, first, first - 1), segment_ids], axis=1),
    )


def remember(memory: Memory, sequence: Sequence, positions: Int[Array, "B T"]) -> Memory:
    """Returns the memory of the last document of every row.

    Args:
      memory: That the sequence begins with.
      sequence: Of `with_memory`.
      positions: Of the row's tokens in their documents.
    """
    k, w = memory.num_selected, memory.sliding_window
    size = memory.score.shape[1]
    batch, length, num_scores = sequence.scores.shape
    start = document_bounds(sequence.segment_ids, batch, length)[0][:, -1:]
    row = np.arange(length)
    in_pool = (row >= start) & (row < length - w)
    # A NaN comes first and is never dropped, so that it stays loud.
    rank = jnp.where(jnp.isnan(sequence.scores), jnp.inf, sequence.scores)
    rank = _where(in_pool, rank, -jnp.inf)
    order = jnp.argsort(-jax.lax.stop_gradient(rank), axis=1, stable=True)
    selected = order[:, :k]
    is_selected = np.arange(k) < jnp.sum(in_pool, axis=1, keepdims=True)
    # Oldest first, for of equal scores the older key is the better.
    selected = jnp.sort(_where(is_selected, selected, length), axis=1)
    window = np.broadcast_to(np.arange(length - w, length)[:, None], (batch, w, num_scores))
    key_row = jnp.concatenate([selected, window], axis=1)
    key_row = jnp.broadcast_to(key_row, (batch, k + w, sequence.key.shape[2]))
    score_row = jnp.concatenate([selected, order[:, k : size - w], window], axis=1)
    return dataclasses.replace(
        memory,
        key=_head_rows(sequence.key, key_row),
        value=_head_rows(sequence.value, key_row),
        score=_head_rows(sequence.scores, score_row),
        count=jnp.minimum(length - start[:, 0], size),
        position=positions[:, -1] + 1,
    )


def attend_after(
    memory: Memory,
    attend: Callable[..., Float[Array, "B L N H"]],
    query: Float[Array, "B T N H"],
    key: Float[Array, "B T K H"],
    value: Float[Array, "B T K H"],
    scores: Float[Array, "B T S"],
    *,
    positions: Int[Array, "B T"],
    segment_ids: Int[Array, "B T"],
) -> tuple[Memory, Float[Array, "B T N H"]]:
    """Attends from rows to themselves and to what is remembered of the rows before.

    Args:
      memory: Of the rows before.
      attend: Attention of `(query, key, value, scores, segment_ids)`, with the numbers k and w of
        the memory.
      query: Queries of the rows.
      key: Keys.
      value: Values.
      scores: Scores that count on from those of the rows before.
      positions: Of the tokens in their documents.
      segment_ids: Ids of packed documents.

    Returns:
      The memory of the last document of every row, and the attention output.
    """
    sequence = with_memory(memory, key, value, scores, positions=positions, segment_ids=segment_ids)
    past = memory.score.shape[1]
    # Nothing is asked of the past: its queries are zero, and their outputs dropped.
    query = jnp.pad(query, ((0, 0), (past, 0), (0, 0), (0, 0)))
    out = attend(query, *sequence)[:, past:]
    return remember(memory, sequence, positions), out


def _where(tokens, x, y):
    """`jnp.where` with a condition on the first two axes."""
    return jnp.where(tokens.reshape(tokens.shape + (1,) * (x.ndim - 2)), x, y)


# Batching dimensions of a gather may be sharded; those of a flat index may not.
_rows = jax.vmap(lambda x, index: x.at[index].get(mode="fill", fill_value=0))
_head_rows = jax.vmap(
    jax.vmap(
        lambda x, index: x.at[index].get(mode="fill", fill_value=0), in_axes=(1, 1), out_axes=1
    )
)
