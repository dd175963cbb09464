"""Helpers for code that others trace: inside their `shard_map`, or fused with what they compute."""

import jax
from jaxtyping import Array


def varying_like(x: Array, *references: Array) -> Array:
    """Marks `x` as varying over the mesh axes that any of `references` varies over.

    Inside `shard_map` a loop's carry must keep its type, and a constant initial value varies over
    no axis. Elsewhere this is the identity.
    """
    axes = set().union(*(jax.typeof(r).manual_axis_type.varying for r in references))
    axes -= jax.typeof(x).manual_axis_type.varying
    return jax.lax.pcast(x, tuple(axes), to="varying") if axes else x


def computed_once(x: Array) -> Array:
    """Makes XLA compute `x` once and store it, so that all readers see the same bits.

    It would else recompute a cheap expression inside every fusion that reads it, and contract its
    multiplications and additions differently in each. Code that compares two values derived from
    `x` for order or equality, such as a score with a cutoff, must not see two roundings.
    """
    return jax.lax.optimization_barrier(x)
