"""Which keys can ever be selected or lie above a threshold: the others need not be looked at.

Thresholds only rise, and adding keys to a pool only raises them. So the threshold of any stretch of
positions that lies in a key's own document and does not go beyond the key is a lower bound of that
of every pool the key is ever in. A key below such a bound is never selected and never has a gate.
Of scores in no particular order about `3k (1 + ln(T / 3k))` remain.
"""

import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int32

_ROUNDS = 4  # each leaves an eighth of the interval
_STRETCHES = 256  # of the shortest kind, at most; what is joined is a table of all pairs
_MARGIN = 1.001  # what float32 sums may be off by, and more


def capacities(num_selected: int, length: int) -> list[int]:
    """How many remaining keys to make room for: usually the first, less often the second.

    Powers of two, as sorting takes as long as for the next one; none where it would not pay.
    """
    expected = 3 * num_selected * (1 + math.log(max(length / (3 * num_selected), 1)))
    room = _power_of_two(1.25 * expected + _shortest(num_selected, length))
    return [x for x in (room, 2 * room) if 2 * x <= length]


def _power_of_two(least: float) -> int:
    return 1 << math.ceil(math.log2(least))


def _shortest(num_selected: int, length: int) -> int:
    """Positions of the shortest stretches that bound a threshold."""
    return _power_of_two(max(2 * num_selected, length / _STRETCHES))


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
    smallest = _shortest(num_selected, length)
    if smallest > length:
        return jnp.ones((length,), bool)
    num_levels = (length // smallest).bit_length()
    num_blocks = length // smallest
    blocks = u[: num_blocks * smallest].reshape(num_blocks, smallest)
    # Level l joins 2^l neighbouring blocks; each block holds the value of those it is joined to.
    level = np.arange(num_levels, dtype=np.int32)[:, None]
    run = np.arange(num_blocks, dtype=np.int32) >> level
    run_start, run_end = run << level, np.minimum((run + 1) << level, num_blocks)
    low = jnp.full(run.shape, u.min() - 1.0)
    high = jnp.full(run.shape, u.max())

    # Sums are rounded down to integers, whose prefix sums are exact.
    unit = 2.0 ** (30 - (length - 1).bit_length())
    enough = math.ceil(_MARGIN * num_selected * unit)
    eighths = np.arange(1, 8, dtype=np.float32)[:, None, None] / 8
    for _ in range(_ROUNDS):
        # Axes: point, level, block.
        points = low + (high - low) * eighths
        gates = jnp.clip(blocks - points[..., None], 0.0, 1.0).sum(axis=-1)
        up_to = jnp.cumsum((gates * unit).astype(jnp.int32), axis=-1)
        before = jnp.where(run_start > 0, up_to[:, level, run_start - 1], 0)
        above = up_to[:, level, run_end - 1] - before >= enough
        low, high = (
            jnp.maximum(low, jnp.where(above, points, -jnp.inf).max(axis=0)),
            jnp.minimum(high, jnp.where(above, jnp.inf, points).min(axis=0)),
        )

    position = jnp.arange(length, dtype=jnp.int32)
    last = ((position + 1) // smallest >> level) - 1
    is_past = (last >= 0) & ((last << level) * smallest >= start)
    bounds = jnp.where(is_past, low[level, jnp.maximum(last, 0) << level], -jnp.inf).max(axis=0)
    # Points may have been rounded one way where they were tried and another where they were taken.
    return u >= bounds - 1e-6 * jnp.abs(bounds)
