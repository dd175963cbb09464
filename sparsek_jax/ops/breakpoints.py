"""The sum of a pool's gates in numbers that add up exactly: what every search for tau has to do.

The gates of a pool sum up to f(x) = sum of clip(u - x, 0, 1), and f(tau) = k. As
clip(u - x, 0, 1) = relu(u - x) - relu(u - 1 - x), let every key open at the breakpoint u, with
weight +1, and close at the breakpoint u - 1, with weight -1. Then f(x) is the sum of
weight * (b - x) over the breakpoints b > x: piecewise linear and falling.

Sums are integers in fixed point, so differences of prefix sums are exact and no query depends on
another one's rounding. They may wrap around: only f - k, which fits, is ever read as a number.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int32


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
    u: Float[Array, "*n"],
    closes: Int32[Array, "*n"],
    is_in_pool: Bool[Array, "*n"],
    sums: Sums,
    in_fixed_point: tuple[Int32[Array, "*n"], Int32[Array, "*n"]],
    k: int,
    bits: int,
) -> Float[Array, "*n"]:
    """Where f is k, from a breakpoint where it is at most that, and exceeds it at the next below.

    Args:
      u: Score of the breakpoint's key.
      closes: 1 if the key closes there, 0 if it opens.
      is_in_pool: Whether the key is of the pool.
      sums: Over the breakpoints of the pool above this one.
      in_fixed_point: Its value, high and low part.
      k: What f is to be.
      bits: Of fixed point.
    """
    # f is linear in between. At a corner of f, and at the lower end of a flat piece, tau is the
    # breakpoint.
    high, low = (x.astype(jnp.float32) for x in excess(sums, *in_fixed_point, k, bits))
    missing = -(high * 2.0**-bits + low * 4.0**-bits)
    slope = sums.slope + jnp.where(is_in_pool, 1 - 2 * closes, 0)
    return u - closes.astype(u.dtype) - missing / jnp.maximum(slope, 1).astype(jnp.float32)
