"""Hidden states of a batch, and cross-entropy that never holds the logits of all tokens at once."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int

from sparsek_jax import nn

# The fields of a batch that a model's loss is computed from.
LOSS_FIELDS = ("inputs", "targets", "positions", "segment_ids", "loss_mask")


def hidden_states(
    model: nn.Decoder, batch: Mapping[str, Int[Array, "B T"]], *, packing: str, **kwargs: Any
) -> Any:
    """`model.hidden` of a batch.

    Args:
      model: The language model.
      batch: `LOSS_FIELDS` of a batch, `[B, T]`.
      packing: `config.data.packing` of the batch.
      **kwargs: For `Decoder.hidden`.

    Returns:
      What `Decoder.hidden` returns.
    """
    # In a continuous row all is one document, and padding, at its end, is causally out of sight.
    segment_ids = batch["segment_ids"] if packing == "segments" else None
    return model.hidden(
        batch["inputs"], positions=batch["positions"], segment_ids=segment_ids, **kwargs
    )


def token_nats(
    logits: Callable[[Float[Array, "B c D"]], Float32[Array, "B c V"]],
    hidden: Float[Array, "B T D"],
    targets: Int[Array, "B T"],
    *,
    chunk_size: int,
) -> tuple[Float32[Array, "B T"], Float32[Array, "B T"]]:
    """Negative log-likelihood of every target, in nats, and the logarithm of its normaliser.

    Args:
      logits: Output projection of hidden states.
      hidden: Final hidden states.
      targets: Next tokens.
      chunk_size: Positions per row whose logits exist at a time, forward and backward.

    Returns:
      The nats and the log-normalisers (for a z-loss), both `[B, T]`.
    """
    batch, length, width = hidden.shape
    chunk_size = min(chunk_size, length)
    padding = -length % chunk_size
    hidden = jnp.pad(hidden, ((0, 0), (0, padding), (0, 0)))
    targets = jnp.pad(targets, ((0, 0), (0, padding)))

    @jax.checkpoint
    def chunk(inputs):
        hidden, targets = inputs
        scores = logits(hidden)
        log_z = jax.nn.logsumexp(scores, axis=-1)
        return log_z - jnp.take_along_axis(scores, targets[..., None], axis=-1)[..., 0], log_z

    chunks = (
        jnp.moveaxis(hidden.reshape(batch, -1, chunk_size, width), 1, 0),
        jnp.moveaxis(targets.reshape(batch, -1, chunk_size), 1, 0),
    )
    nats, log_z = jax.lax.map(chunk, chunks)
    return tuple(jnp.moveaxis(x, 0, 1).reshape(batch, -1)[:, :length] for x in (nats, log_z))
