"""Rotary position embedding (Su et al. 2021, arXiv 2104.09864)."""

import math

import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int, Int32

from sparsek_jax.nn.config import AttentionConfig
from sparsek_jax.ops.selection import document_bounds


def document_positions(
    segment_ids: Int[Array, "B T"] | None, batch: int, length: int
) -> Int32[Array, "B T"]:
    """Positions that count from 0 in every document; None: one document a row."""
    start, _ = document_bounds(segment_ids, batch, length)
    return jnp.arange(length, dtype=jnp.int32) - start


def rotary_frequencies(config: AttentionConfig) -> Float32[Array, " F"]:
    """Angles per position, `theta^(-2 i / rotary_dim)` for pair i of the channels, then scaled.

    "llama3" is the scaling of Llama 3.1 (arXiv 2407.21783): channels that turn often within the
    original context tell near tokens apart and stay, those that never complete a turn are slowed.
    """
    half = config.rotary_dim // 2
    frequencies = config.rope_theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    if config.rope_scaling == "none":
        return frequencies
    slowed = frequencies / config.rope_factor
    if config.rope_scaling == "linear":
        return slowed
    turns = frequencies * (config.rope_original_length / (2 * math.pi))
    low, high = config.rope_low_freq_factor, config.rope_high_freq_factor
    kept = jnp.clip((turns - low) / (high - low), 0.0, 1.0)
    return (1 - kept) * slowed + kept * frequencies


def apply_rotary(
    x: Float[Array, "B T N H"],
    positions: Int[Array, "B T"],
    *,
    frequencies: Float32[Array, " F"],
) -> Float[Array, "B T N H"]:
    """Rotates the leading 2 F channels of every head, in the half-split layout of Llama.

    Channel i is paired with channel i + F and turned by `position * frequencies[i]`. Angles and
    rotation are float32; the result has x's dtype.
    """
    (half,) = frequencies.shape
    if half == 0:
        return x
    angle = positions[:, :, None, None].astype(jnp.float32) * frequencies
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    first = x[..., :half].astype(jnp.float32)
    second = x[..., half : 2 * half].astype(jnp.float32)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return jnp.concatenate([rotated.astype(x.dtype), x[..., 2 * half :]], axis=-1)
