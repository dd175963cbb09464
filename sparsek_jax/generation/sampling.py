"""Choosing the next token from logits."""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Int, Int32, Key, UInt32


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling:
    """How tokens are chosen.

    Attributes:
      temperature: Divides the logits; 0 takes the likeliest token.
      top_k: Only so many of the likeliest tokens may be drawn; None for all.
      top_p: Only the fewest likeliest tokens whose probabilities, at this temperature and among the
        `top_k`, sum to at least this may be drawn; None for all.
      seed: Decides the draws, together with a row's index and position.

    Raises:
      ValueError: A field is out of range.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    seed: int = 0

    def __post_init__(self):
        if not 0 <= self.temperature < math.inf:
            raise ValueError(
                f"temperature={self.temperature!r}; expected a finite number of at least 0"
            )
        if self.top_k is not None and not 1 <= self.top_k < 2**31:
            raise ValueError(f"top_k={self.top_k!r}; expected an integer from 1 to 2**31 - 1")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p!r}; expected a number above 0 and at most 1")
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"seed={self.seed!r}; expected an integer from 0 to 2**32 - 1")

    def arrays(self) -> dict[str, np.generic | None]:
        """The fields as scalars for a compiled function, which then suits other values too."""
        return {
            "temperature": np.float32(self.temperature),
            "top_k": None if self.top_k is None else np.int32(self.top_k),
            "top_p": None if self.top_p is None else np.float32(self.top_p),
            "seed": np.uint32(self.seed),
        }


def token_keys(seed: UInt32[Array, ""], positions: Int[Array, " B"]) -> Key[Array, " B"]:
    """Random keys that depend on the seed, a row's index and its position, not on other rows."""
    rows = jax.vmap(jax.random.fold_in, (None, 0))(
        jax.random.key(seed), jnp.arange(len(positions), dtype=jnp.uint32)
    )
    return jax.vmap(jax.random.fold_in)(rows, positions)


def choose_tokens(
    logits: Float32[Array, "B V"],
    keys: Key[Array, " B"],
    *,
    temperature: Float[Array, ""],
    top_k: Int[Array, ""] | None = None,
    top_p: Float[Array, ""] | None = None,
) -> Int32[Array, " B"]:
    """Chooses a token for every row; of equal logits, the lowest token is the likeliest.

    Args:
      logits: Finite, float32 `[B, V]`.
      keys: A random key for every row.
      temperature: As in `Sampling`, as are the next two.
      top_k: More than V are all.
      top_p: Applies to what `top_k` leaves.

    Returns:
      Token ids, int32 `[B]`.
    """

    def draw():
        # The largest is zero, so that no temperature overflows.
        scaled = (logits - jnp.max(logits, axis=-1, keepdims=True)) / temperature
        if top_k is None and top_p is None:
            return jax.vmap(jax.random.categorical)(keys, scaled).astype(jnp.int32)
        order = jnp.argsort(scaled, axis=-1, descending=True, stable=True)
        ranked = jnp.take_along_axis(scaled, order, axis=-1)
        if top_k is not None:
            ranked = jnp.where(jnp.arange(ranked.shape[-1]) < top_k, ranked, -jnp.inf)
        if top_p is not None:
            probabilities = jax.nn.softmax(ranked, axis=-1)
            before = jnp.cumsum(probabilities, axis=-1) - probabilities
            # Rounded sums reach 1 before the last token does.
            ranked = jnp.where((before < top_p) | (top_p >= 1), ranked, -jnp.inf)
        rank = jax.vmap(jax.random.categorical)(keys, ranked)
        return jnp.take_along_axis(order, rank[:, None], axis=-1)[:, 0].astype(jnp.int32)

    def likeliest():
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)

    return jax.lax.cond(temperature > 0, draw, likeliest)
