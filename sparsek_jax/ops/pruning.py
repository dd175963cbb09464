"""Which keys can ever be selected or lie above a threshold: the others need not be looked at.

Thresholds only rise, and adding keys to a pool only raises them. So the threshold of any stretch of
positions that lies in a key's own document and does not go beyond the key is a lower bound of that
of every pool the key is ever in. A key below such a bound is never selected and never has a gate.
Of scores in no particular order about `3k (1 + ln(T / 3k))` remain.
"""

import math
from collections.abc import Callable

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int32

_ROUNDS = 14
# What float32 sums may be off by, and more.
_MARGIN = 1.001


def capacity(num_selected: int, length: int) -> int | None:
    """How many remaining keys to make room for; None where it would not be worth it."""
    expected = 3 * num_selected * (1 + math.log(max(length / (3 * num_selected), 1)))
    room = math.ceil(1.5 * expected / 128) * 128
    return room if 2 * room <= length else None


def may_matter(
    u: Float[Array, " T"], start: Int32[Array, " T"], num_selected: int
) -> Bool[Array, " T"]:
    """Marks, in one row, a superset of the keys that are ever above their pool's threshold.

    Args:
      u: Finite scores.
      start: First position of every position's document.
      num_selected: k.
    """
    (length,) = u.shape
    smallest = 1 << (2 * num_selected - 1).bit_length()
    if smallest > length:
        return jnp.ones((length,), bool)
    num_levels = (length // smallest).bit_length()
    num_blocks = length // smallest
    blocks = u[: num_blocks * smallest].reshape(num_blocks, smallest)
    # Row l of what follows is of level l, which joins 2^l neighbouring blocks; each block holds the
    # value of those it is joined to.
    low = _joined(jnp.broadcast_to(blocks.min(axis=1), (num_levels, num_blocks)), jnp.min) - 1.0
    high = _joined(jnp.broadcast_to(blocks.max(axis=1), (num_levels, num_blocks)), jnp.max)

    # Unrolled, this is one launch on a GPU.
    for _ in range(_ROUNDS):
        middle = 0.5 * (low + high)
        gates = jnp.clip(blocks - middle[..., None], 0.0, 1.0)
        above = _joined(gates.sum(axis=-1), jnp.sum) >= _MARGIN * num_selected
        low, high = jnp.where(above, middle, low), jnp.where(above, high, middle)

    position = jnp.arange(length, dtype=jnp.int32)
    level = jnp.arange(num_levels, dtype=jnp.int32)[:, None]
    last = ((position + 1) // smallest >> level) - 1
    inside = (last >= 0) & ((last << level) * smallest >= start)
    bounds = jnp.where(inside, low[level, jnp.maximum(last, 0) << level], -jnp.inf)
    return u >= bounds.max(axis=0)


def _joined(
    x: Float[Array, "levels blocks"], operation: Callable[..., Array]
) -> Float[Array, "levels blocks"]:
    """Reduces row l over runs of 2^l entries, the last of which may be shorter."""
    rows = []
    for level, row in enumerate(x):
        whole = len(row) >> level << level
        joined = operation(row[:whole].reshape(-1, 1 << level), axis=1)
        # An unfinished run bounds nothing, as it ends behind every key that could ask.
        rows.append(jnp.concatenate([jnp.repeat(joined, 1 << level), row[whole:]]))
    return jnp.stack(rows)
