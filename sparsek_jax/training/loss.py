"""Hidden states of a batch, and cross-entropy that never holds the logits of all tokens at once."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Float32, Int

from sparsek_jax import nn
from sparsek_jax.nn.decoder import output_logits
from sparsek_jax.ops.products import einsum_f32

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


class TokenLoss(NamedTuple):
    """What is known of every target, each `[B, T]`.

    Attributes:
      nats: Negative log-likelihood, in nats.
      log_z: Logarithm of its normaliser (for a z-loss).
      likeliest: Whether no other token is likelier.
    """

    nats: Float32[Array, "B T"]
    log_z: Float32[Array, "B T"]
    likeliest: Bool[Array, "B T"]


def token_loss(
    table: Float[Array, "V D"],
    hidden: Float[Array, "B T D"],
    targets: Int[Array, "B T"],
    *,
    chunk_size: int,
) -> TokenLoss:
    """Negative log-likelihood of every target, and what else its logits tell.

    Args:
      table: Output projection, a row for every token of the vocabulary.
      hidden: Final hidden states.
      targets: Next tokens.
      chunk_size: Positions per row whose logits exist at a time, forward and backward.
    """
    batch, length, width = hidden.shape
    chunk_size = min(chunk_size, length)
    padding = -length % chunk_size
    hidden = jnp.pad(hidden, ((0, 0), (0, padding), (0, 0)))
    targets = jnp.pad(targets, ((0, 0), (0, padding)))
    chunks = (
        jnp.moveaxis(hidden.reshape(batch, -1, chunk_size, width), 1, 0),
        jnp.moveaxis(targets.reshape(batch, -1, chunk_size), 1, 0),
    )
    loss = jax.lax.map(lambda chunk: _chunk_loss(table, *chunk), chunks)
    return jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1).reshape(batch, -1)[:, :length], loss)


@jax.custom_vjp
def _chunk_loss(table, hidden, targets):
    """`token_loss` of one chunk; the logits are computed again for the gradient."""
    logits = output_logits(table, hidden)
    log_z = jax.nn.logsumexp(logits, axis=-1)
    of_target = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    return TokenLoss(log_z - of_target, log_z, of_target >= jnp.max(logits, axis=-1))


def _chunk_loss_fwd(table, hidden, targets):
    loss = _chunk_loss(table, hidden, targets)
    return loss, (table, hidden, targets, loss.log_z)


def _chunk_loss_bwd(residuals, cotangents):
    table, hidden, targets, log_z = residuals
    d_nats, d_log_z, _ = cotangents
    probability = jnp.exp(output_logits(table, hidden) - log_z[..., None])
    is_target = targets[..., None] == jnp.arange(table.shape[0], dtype=targets.dtype)
    d_logits = (d_nats + d_log_z)[..., None] * probability
    d_logits -= jnp.where(is_target, d_nats[..., None], 0.0)
    # In the precision of the model, products run at full speed and logits are read half as often.
    d_logits = d_logits.astype(hidden.dtype)
    d_hidden = einsum_f32("...v,vd->...d", d_logits, table.astype(hidden.dtype))
    d_table = einsum_f32("btv,btd->vd", d_logits, hidden)
    return d_table.astype(table.dtype), d_hidden.astype(hidden.dtype), None


_chunk_loss.defvjp(_chunk_loss_fwd, _chunk_loss_bwd)
