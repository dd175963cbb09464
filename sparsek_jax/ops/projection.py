"""The SparseK operator: Euclidean projection onto the capped simplex {0 <= p <= 1, sum p = k}."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, ScalarLike

from sparsek_jax.ops.checks import check_int, is_finite_number
from sparsek_jax.ops.tracing import varying_like

# Halving [-1, 0] this often passes the spacing of the dtype's numbers just below one.
_ROUNDS = {np.dtype("float32"): 26, np.dtype("float64"): 54}


def sparsek(
    z: Float[Array, "..."],
    k: ScalarLike,
    *,
    axis: int = -1,
    where: Bool[Array, "..."] | None = None,
) -> Float[Array, "..."]:
    """Projects `z` onto {0 <= p <= 1, sum p = k} along `axis`: SparseK, arXiv 2406.16747.

    The solution is `clip(z - tau, 0, 1)` with the one `tau` that makes it sum to `k`; `k = 1` is
    sparsemax. Where no more than `k` entries exist, every one is 1. The gradient is the closed form
    `s * (g - mean_s(g))` on the interior `s = {0 < p < 1}`.

    Args:
      z: Scores, any float dtype and shape `[..., n, ...]`. Computed in float32 (float64 stays
        float64).
      k: Target sum, a positive int or float or a traced scalar. Differentiable when it is a float.
      axis: The axis that is projected.
      where: Optional mask, broadcastable to `z`. Masked entries take no part and get zero; their
        gradient is zero.

    Returns:
      The projection, shape and dtype of `z`. A row with a NaN in an unmasked entry is NaN
      throughout.

    Raises:
      TypeError: `z` or `where` has the wrong dtype, or `axis` is not an int.
      ValueError: `k` is not a positive scalar, or `axis` or `where` does not fit `z`.
    """
    z = jnp.asarray(z)
    if not jnp.issubdtype(z.dtype, jnp.floating):
        raise TypeError(f"z must be a floating-point array, got dtype {z.dtype}")
    if z.ndim == 0:
        raise ValueError("z must have at least one axis, got a scalar")
    check_int("axis", axis)
    if not -z.ndim <= axis < z.ndim:
        raise ValueError(f"axis={axis} is out of range for z of shape {z.shape}")
    _check_k(k)
    if where is None:
        where = jnp.ones(z.shape, bool)
    where = jnp.asarray(where)
    if where.dtype != bool:
        raise TypeError(f"where must be a boolean array, got dtype {where.dtype}")
    try:
        where = jnp.broadcast_to(where, z.shape)
    except ValueError:
        raise ValueError(
            f"where of shape {where.shape} does not broadcast to z of shape {z.shape}"
        ) from None
    if z.shape[axis] == 0:
        return z
    if isinstance(k, int | np.integer):
        # All ones in any case; a larger int may not fit an array's dtype.
        k = min(k, z.shape[axis])

    dtype = jnp.promote_types(z.dtype, jnp.float32)
    arrays = (
        jnp.moveaxis(z.astype(dtype), axis, -1),
        jnp.asarray(k).astype(dtype),
        jnp.moveaxis(where, axis, -1),
    )
    # Under `shard_map` k may be replicated where z is split. Its gradient is then a sum over
    # devices, which this cast's transpose takes.
    p = _project(*(varying_like(x, *arrays) for x in arrays))
    return jnp.moveaxis(p, -1, axis).astype(z.dtype)


def _check_k(k: Any) -> None:
    """Raises unless `k` is a positive scalar, as far as its value is known while tracing."""
    if np.shape(k):
        raise ValueError(f"k must be a scalar, got shape {np.shape(k)}")
    if isinstance(k, jax.core.Tracer):
        return
    # No float may hold a large int.
    is_int = isinstance(k, int) and not isinstance(k, bool)
    if not ((is_int or is_finite_number(k)) and k > 0):
        raise ValueError(f"k={k!r} must be a positive and finite number")


@jax.custom_vjp
def _project(
    z: Float[Array, "*batch n"], k: Float[Array, ""], where: Bool[Array, "*batch n"]
) -> Float[Array, "*batch n"]:
    n = z.shape[-1]
    num_valid = jnp.sum(where, -1, keepdims=True)
    has_nan = jnp.any(where & jnp.isnan(z), -1, keepdims=True)
    big = jnp.finfo(z.dtype).max
    finite = jnp.where(where, jnp.clip(jnp.nan_to_num(z, nan=0.0), -big, big), -big)

    # With c the ceil(k)-th largest entry, tau lies in [c - 1, c): fewer than k entries exceed c, at
    # least k reach it. Measured from c every entry that matters is small, so scores near 1e4 lose
    # no digit.
    nth = jnp.clip(jnp.ceil(k).astype(jnp.int32), 1, n) - 1
    pivot = jnp.take(jnp.sort(finite, axis=-1, descending=True), nth, axis=-1)[..., None]
    y = jnp.where(where, jnp.clip(finite - pivot, -1.0, 1.0), -1.0)

    def interior_and_ones(tau):
        interior = where & (y > tau) & (y < tau + 1)
        return interior, jnp.sum(where & (y >= tau + 1), -1, keepdims=True)

    def halve(_, bracket):
        low, high = bracket
        middle = (low + high) / 2
        interior, ones = interior_and_ones(middle)
        mass = jnp.sum(jnp.where(interior, y - middle, 0), -1, keepdims=True)
        # At `low` the sum exceeds k, so that a score exactly one above tau counts as a one there,
        # not as interior.
        too_low = mass > k - ones.astype(y.dtype)
        return jnp.where(too_low, middle, low), jnp.where(too_low, high, middle)

    high = jnp.zeros_like(pivot)
    low, _ = jax.lax.fori_loop(0, _ROUNDS[z.dtype], halve, (high - 1, high))

    # The bracket has found which entries are interior; for them tau has a closed form.
    interior, ones = interior_and_ones(low)
    count = jnp.sum(interior, -1, keepdims=True)
    total = jnp.sum(jnp.where(interior, y, 0), -1, keepdims=True)
    solved = (total - (k - ones.astype(y.dtype))) / jnp.maximum(count, 1).astype(y.dtype)
    tau = jnp.where(count > 0, solved, low)
    p = jnp.where(where & (num_valid > k), jnp.clip(y - tau, 0, 1), where.astype(y.dtype))
    return jnp.where(has_nan & where, jnp.nan, p)


def _project_fwd(z, k, where):
    p = _project(z, k, where)
    return p, (p, k)


def _project_bwd(residuals, g):
    p, k = residuals
    # NaN rows must not look finite to whoever inspects the gradient.
    interior = ~((p <= 0) | (p >= 1))
    count = jnp.maximum(jnp.sum(interior, -1, keepdims=True), 1).astype(p.dtype)
    mean = jnp.sum(jnp.where(interior, g, 0), -1, keepdims=True) / count
    dz = jnp.where(interior, g - mean, 0) + jnp.where(jnp.isnan(p), jnp.nan, 0)
    dk = jnp.sum(jnp.where(jnp.any(interior, -1, keepdims=True), mean, 0)).astype(k.dtype)
    return dz, dk, None


_project.defvjp(_project_fwd, _project_bwd)
