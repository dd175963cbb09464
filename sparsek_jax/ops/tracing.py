"""Helpers for code that is traced under `shard_map`."""

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
