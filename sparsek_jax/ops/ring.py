"""Where the newest w tokens lie in a ring: token p in row p % w."""

import jax.numpy as jnp
from jaxtyping import Array, Int32


def rows_in_order(length: Int32[Array, " B"], size: int) -> Int32[Array, "B w"]:
    """Rows from the oldest token to the newest; those not yet written to come first.

    Args:
      length: Tokens written so far.
      size: w, rows of the ring.
    """
    return (length[:, None] + jnp.arange(size, dtype=jnp.int32)) % max(size, 1)


def ages(length: Int32[Array, " B"], size: int) -> Int32[Array, "B w"]:
    """How many tokens after every row's own were written; at least `length` where it has none.

    Args:
      length: Tokens written so far.
      size: w, rows of the ring.
    """
    return (length[:, None] - 1 - jnp.arange(size, dtype=jnp.int32)) % max(size, 1)
