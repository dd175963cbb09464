"""Training on documents in rows: what a row hands to the next row of its lane."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jaxtyping import Array, Float, Float32, Int

from sparsek_jax import nn

_ROW_FIELDS = ("inputs", "positions", "segment_ids")

# By name: "memory", a decoder's memory of the rows before; and with gradients that go one row back,
# "row", the newest of these rows, whose memory is then the one that it began with.
Past = dict[str, Any]


def no_past(model: nn.Decoder, batch_size: int, row_length: int | None = None) -> Past:
    """What comes before the first rows: nothing.

    Args:
      model: The language model.
      batch_size: Rows.
      row_length: Their tokens, if gradients shall go one row back; else None.
    """
    past = {"memory": model.init_memory(batch_size)}
    if row_length is not None:
        past["row"] = {name: jnp.zeros((batch_size, row_length), jnp.int32) for name in _ROW_FIELDS}
    return past


def resumed_states(
    model: nn.Decoder,
    past: Past,
    batch: Mapping[str, Int[Array, "B T"]],
    *,
    sharding: NamedSharding | None = None,
) -> tuple[Past, Float[Array, "B T D"], dict[int, Float32[Array, "B T K"]]]:
    """Hidden states of a batch that goes on from the batch before.

    Gradients stop at the memory, unless the past holds a row: then this row is computed once more,
    from the memory that it began with, and with gradients.

    Args:
      model: The language model.
      past: Of the rows before.
      batch: `inputs`, `positions` in the document and `segment_ids`.
      sharding: As in `Decoder.hidden`.

    Returns:
      The past of the next batch, hidden states, and what else `Decoder.resume` returns.
    """

    def resume(row, memory):
        inputs, positions, segment_ids = (row[name] for name in _ROW_FIELDS)
        return model.resume(
            inputs, memory, positions=positions, segment_ids=segment_ids, sharding=sharding
        )

    memory = past["memory"]
    if "row" not in past:
        memory, hidden, scores = resume(batch, memory)
        return {"memory": jax.lax.stop_gradient(memory)}, hidden, scores
    memory, _, _ = resume(past["row"], memory)
    _, hidden, scores = resume(batch, memory)
    row = {name: batch[name] for name in _ROW_FIELDS}
    return {"memory": jax.lax.stop_gradient(memory), "row": row}, hidden, scores
