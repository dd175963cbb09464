"""Which keys can ever be selected or lie above a threshold: the others need not be looked at.

Thresholds only rise, and adding keys to a pool only raises them. So the threshold of any stretch of
positions that lies in a key's own document and does not go beyond the key is a lower bound of that
of every pool the key is ever in. A key below such a bound is never selected and never has a gate.
Of scores in no particular order about `2.5k (1 + ln(T / 2.5k))` remain.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int32

from sparsek_jax.ops.tracing import computed_once

_POINTS = (15, 31)  # at which sums are taken, round by round
_BLOCKS = 256  # that a row is cut into, at most; what is joined is a table of all pairs
_MARGIN = 1.001  # what float32 sums may be off by, and more


def capacities(num_selected: int, length: int) -> list[int]:
    """How many remaining keys to make room for: the first usually does, the last nearly always.

    Powers of two, as sorting takes as long as for the next one; none where it would not pay.
    """
    many = 2.5 * num_selected
    expected = many * (1 + math.log(max(length / many, 1)))
    room = _power_of_two(expected + max(expected / 4, _block_size(num_selected, length)))
    return [x for x in (room, 2 * room, 4 * room) if 2 * x <= length]


def _power_of_two(least: float) -> int:
    return 1 << math.ceil(math.log2(least))


def _block_size(num_selected: int, length: int) -> int:
    """Positions of a block, which has a threshold of its own only if it holds more than k keys."""
    return _power_of_two(max(2 * num_selected, length / _BLOCKS))


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
    size = _block_size(num_selected, length)
    if size > length:
        return jnp.ones((length,), bool)
    num_blocks = length // size
    blocks = u[: num_blocks * size].reshape(num_blocks, size)
    # With every block ends a stretch: all whole blocks of its last key's document up to there.
    block = np.arange(num_blocks, dtype=np.int32)
    first = (start[size - 1 :: size] + size - 1) // size
    is_joined = (first[:, None] <= block) & (block <= block[:, None])

    # Sums are rounded down to integers, whose sums are exact.
    unit = 2.0 ** (30 - (length - 1).bit_length())
    enough = math.ceil(_MARGIN * num_selected * unit)
    lowest, highest, total, total_of_squares = _statistics(u)
    lowest -= 1.0
    # Where thresholds may be, whatever a few scores are that lie far off: there are fewer than k
    # above mean + deviation * sqrt(T / k). What is not finite bounds nothing.
    mean = total / length
    deviation = jnp.sqrt(jnp.maximum(total_of_squares / length - mean * mean, 0.0))
    low = mean - 3.0 * deviation - 1.0
    low = jnp.where(low > lowest, low, lowest)
    high = mean + math.sqrt(length / num_selected) * deviation
    high = jnp.where(high < highest, high, highest)
    bounds = jnp.full((num_blocks,), lowest)
    for num_points in _POINTS:
        # The same for all stretches, so that every key's gate is computed once a point.
        step = (high - low) / (num_points + 1)
        # Where they are taken they must be what was tried.
        points = computed_once(low + step * np.arange(1, num_points + 1, dtype=np.float32))
        gates = jnp.clip(blocks - points[:, None, None], 0.0, 1.0).sum(axis=-1)
        gates = (gates * unit).astype(jnp.int32)
        # Axes: point, stretch, block.
        is_below = jnp.where(is_joined, gates[:, None], 0).sum(axis=-1) >= enough
        bounds = jnp.maximum(bounds, jnp.where(is_below, points[:, None], -jnp.inf).max(axis=0))
        # Between the lowest and the highest of the thresholds, points are closer next time.
        low = jnp.clip(jnp.where(first <= block, bounds, high).min(), low, high)
        high = jnp.minimum(bounds.max() + step, high)

    # The newest stretch that does not go beyond a key; it must not begin before the document.
    bounds = jnp.pad(jnp.repeat(bounds, size), (size - 1, 0), constant_values=-jnp.inf)
    ends = np.arange(1, length + 1, dtype=np.int32) // size * size
    bounds = jnp.where(start <= ends - size, bounds[:length], -jnp.inf)
    return u >= bounds


def _statistics(u):
    """The lowest score, the highest, their sum and that of their squares, of one reduction."""

    def combine(x, y):
        return jnp.minimum(x[0], y[0]), jnp.maximum(x[1], y[1]), x[2] + y[2], x[3] + y[3]

    start = tuple(np.float32(x) for x in (np.inf, -np.inf, 0, 0))
    return jax.lax.reduce((u, u, u, u * u), start, combine, dimensions=(0,))
