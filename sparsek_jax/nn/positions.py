"""Positions of tokens in their documents, and the rotary embedding of them."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Int32

from sparsek_jax.ops.selection import document_bounds


def document_positions(
    segment_ids: Int[Array, "B T"] | None, batch: int, length: int
) -> Int32[Array, "B T"]:
    """Counts from 0 in every document, a maximal run of equal `segment_ids` (None: the row)."""
    start, _ = document_bounds(segment_ids, batch, length)
    return jnp.arange(length, dtype=jnp.int32) - start


def apply_rotary(
    x: Float[Array, "B T N H"],
    positions: Int[Array, "B T"],
    *,
    theta: float,
    rotary_dim: int,
) -> Float[Array, "B T N H"]:
    """Rotary position embedding (arXiv 2104.09864) of the first `rotary_dim` dimensions.

    Dimension i turns with dimension i + rotary_dim / 2 (the halves of Llama and GPT-NeoX, not
    neighbours) by the angle position * theta^(-2i / rotary_dim), in float32.

    Args:
      x: Queries or keys, `[B, T, N, H]`.
      positions: Position of every token, `[B, T]`.
      theta: Base of the wavelengths.
      rotary_dim: Even, at most H; the other dimensions are returned as they are.

    Returns:
      Shape and dtype of `x`.
    """
    exponent = jnp.arange(0, rotary_dim, 2, dtype=jnp.float32) / max(rotary_dim, 1)
    angle = positions[..., None, None].astype(jnp.float32) * theta**-exponent
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    turned, rest = jnp.split(x, [rotary_dim], axis=-1)
    left, right = jnp.split(turned.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([left * cos - right * sin, right * cos + left * sin], axis=-1)
    return jnp.concatenate([turned.astype(x.dtype), rest], axis=-1)
