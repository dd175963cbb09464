"""Rotary position embedding (Su et al. 2021, arXiv 2104.09864)."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Int32

from sparsek_jax.ops.selection import document_bounds


def document_positions(
    segment_ids: Int[Array, "B T"] | None, batch: int, length: int
) -> Int32[Array, "B T"]:
    """Positions that count from 0 in every document; None: one document a row."""
    start, _ = document_bounds(segment_ids, batch, length)
    return jnp.arange(length, dtype=jnp.int32) - start


def apply_rotary(
    x: Float[Array, "B T N H"],
    positions: Int[Array, "B T"],
    *,
    theta: float,
    rotary_dim: int,
) -> Float[Array, "B T N H"]:
    """Rotates the leading `rotary_dim` channels of every head, in the half-split layout of Llama.

    Channel i is paired with channel i + rotary_dim / 2 and turned by
    `position * theta^(-2 i / rotary_dim)`. Angles and rotation are float32; the result has x's
    dtype.
    """
    if rotary_dim == 0:
        return x
    half = rotary_dim // 2
    frequency = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angle = positions[:, :, None, None].astype(jnp.float32) * frequency
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    first = x[..., :half].astype(jnp.float32)
    second = x[..., half:rotary_dim].astype(jnp.float32)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return jnp.concatenate([rotated.astype(x.dtype), x[..., rotary_dim:]], axis=-1)
