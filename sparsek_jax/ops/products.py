"""Matrix products with one rule of precision, for the operator, scorer and output projection."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float32, Inexact


def einsum_f32(
    subscripts: str, x: Inexact[Array, "..."], y: Inexact[Array, "..."]
) -> Float32[Array, "..."]:
    """Product of two arrays of one dtype, accumulated in and returned as float32.

    float32 operands are multiplied in full precision; the default rounds them to TF32 on GPU and to
    bfloat16 on TPU.
    """
    if x.dtype == jnp.float32:
        return jnp.einsum(subscripts, x, y, precision=jax.lax.Precision.HIGHEST)

    def widened(x, y):
        return jnp.einsum(subscripts, x.astype(jnp.float32), y.astype(jnp.float32))

    def mixed(x, y):
        return jnp.einsum(subscripts, x, y, preferred_element_type=jnp.float32)

    # XLA's CPU backend cannot multiply bfloat16 into float32 at every shape.
    return jax.lax.platform_dependent(x, y, cpu=widened, default=mixed)
