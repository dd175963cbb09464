"""Breakpoints of rows of scores in order: what every search for thresholds starts from and ends in.

The gates of a pool sum up to f(x) = sum of clip(u - x, 0, 1), and f(tau) = k. As
clip(u - x, 0, 1) = relu(u - x) - relu(u - 1 - x), let every key open at the breakpoint u, with
weight +1, and close at the breakpoint u - 1, with weight -1. Then f(x) is the sum of
weight * (b - x) over the breakpoints b > x: piecewise linear and falling.

Sums are integers in fixed point, so differences of prefix sums are exact and no query depends on
another one's rounding. They may wrap around: only f - k, which fits, is ever read as a number.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int32

from sparsek_jax.ops.indexing import gather, permute, rows_of


class Sums(NamedTuple):
    """Over the breakpoints of a pool that lie above some value.

    Attributes:
      slope: Of their weights, from 0 to the number of keys.
      high: Of their weighted values in fixed point, the high part.
      low: The low part.
    """

    slope: Int32[Array, "*n"]
    high: Int32[Array, "*n"]
    low: Int32[Array, "*n"]


class Breakpoints(NamedTuple):
    """Two a key, documents one after the other and the largest first within each.

    Breakpoint 2j is where key j opens, 2j + 1 where it closes.

    Attributes:
      u: Scores of the keys.
      order: Breakpoints by rank. Ties are in order of position.
      ranks: Their ranks.
      high: Values in fixed point, by rank: `high * 2^-bits + low * 4^-bits`, high modulo 2^32.
      low: 0 <= low < 2^bits.
      bits: So few that sums over all keys fit.
    """

    u: Float[Array, "R M"]
    order: Int32[Array, "R n"]
    ranks: Int32[Array, "R n"]
    high: Int32[Array, "R n"]
    low: Int32[Array, "R n"]
    bits: int


def sort_breakpoints(
    u: Float[Array, "R M"], start: Int32[Array, "R M"], *, packed: bool
) -> Breakpoints:
    """Sorts the breakpoints of rows.

    Args:
      u: Finite scores.
      start: Position of the first key of every key's document.
      packed: Whether to sort by document first. Without, scores must already fall from one document
        to the next.
    """
    num_rows, length = u.shape
    values = jnp.stack([u, u - 1.0], -1).reshape(num_rows, 2 * length)
    ids = jnp.broadcast_to(jnp.arange(2 * length, dtype=jnp.int32), values.shape)
    keys = (-values,)
    if packed:
        keys = (jnp.repeat(start, 2, axis=1), *keys)
    *_, order = jax.lax.sort((*keys, ids), num_keys=len(keys), is_stable=True)
    bits = resolution(length)
    high, low = fixed_point(gather(u, rows_of(u), order >> 1), bits)
    return Breakpoints(u, order, permute(ids, order), high - ((order & 1) << bits), low, bits)


def resolution(length: int) -> int:
    """Bits behind the point, of either part, with which sums over so many keys fit in an int32."""
    return min(15, 31 - max(length - 1, 1).bit_length())


def fixed_point(u: Float[Array, "*n"], bits: int) -> tuple[Int32[Array, "*n"], Int32[Array, "*n"]]:
    """Writes u as `high * 2^-bits + low * 4^-bits`: 0 <= low < 2^bits, high modulo 2^32."""
    magnitude = jnp.fmod(jnp.abs(u), 2.0 ** (32 - bits)) * 2.0**bits
    whole = jnp.floor(magnitude)
    high = whole.astype(jnp.uint32).astype(jnp.int32)
    low = jnp.floor((magnitude - whole) * 2.0**bits).astype(jnp.int32)
    borrow = (low > 0).astype(jnp.int32)
    negative = u < 0
    return (
        jnp.where(negative, -high - borrow, high),
        jnp.where(negative, (borrow << bits) - low, low),
    )


def excess(
    sums: Sums, high: Int32[Array, "*n"], low: Int32[Array, "*n"], k: int, bits: int
) -> tuple[Int32[Array, "*n"], Int32[Array, "*n"]]:
    """What f exceeds k by, at a value in fixed point, from the sums over breakpoints above it."""
    return sums.high - sums.slope * high - (k << bits), sums.low - sums.slope * low


def is_positive(high: Int32[Array, "*n"], low: Int32[Array, "*n"], bits: int) -> Bool[Array, "*n"]:
    """Whether a number in fixed point is, whose low part may be any."""
    carried = high + (low >> bits)
    return (carried > 0) | ((carried == 0) & (low & ((1 << bits) - 1) != 0))


def tau_at(
    breakpoint_: Float[Array, "*n"],
    excess_over_k: tuple[Int32[Array, "*n"], Int32[Array, "*n"]],
    slope: Int32[Array, "*n"],
    bits: int,
) -> Float[Array, "*n"]:
    """Where f is k, from a breakpoint where it is at most that, and exceeds it at the next above.

    Args:
      breakpoint_: Its value.
      excess_over_k: f - k there, in fixed point.
      slope: Of the weights of what is above and of itself, if it is of the pool.
      bits: Of fixed point.
    """
    # f is linear in between. At a corner of f, and at the lower end of a flat piece, tau is the
    # breakpoint.
    high, low = (x.astype(jnp.float32) for x in excess_over_k)
    missing = -(high * 2.0**-bits + low * 4.0**-bits)
    return breakpoint_ - missing / jnp.maximum(slope, 1).astype(jnp.float32)
