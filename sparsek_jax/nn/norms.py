"""Norms: over the features of a token, and over the time so far."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int


def make_norm(kind: str, num_features: int, epsilon: float, *, rngs: nnx.Rngs) -> nnx.Module:
    """Makes a norm over the last axis, computed in and returned as float32.

    Args:
      kind: "rmsnorm", or "layernorm" (with bias).
      num_features: Size of the last axis.
      epsilon: Added to the variance.
      rngs: Source of the initial weights.
    """
    if kind == "rmsnorm":
        return nnx.RMSNorm(num_features, epsilon=epsilon, dtype=jnp.float32, rngs=rngs)
    # The "fast" variance is a difference of two means and loses digits.
    return nnx.LayerNorm(
        num_features, epsilon=epsilon, dtype=jnp.float32, use_fast_variance=False, rngs=rngs
    )


# JAX 0.11.2 crashes on an associative scan in a `shard_map` outside of any jit.
@jax.jit
def timestep_statistics(
    x: Float[Array, "B T K"], start: Int[Array, "B T"]
) -> tuple[Float[Array, "B T K"], Float[Array, "B T K"]]:
    """Mean and (biased) variance over the positions of the document so far, `start <= j <= t`.

    Partial statistics are merged pairwise (Chan et al.), which loses fewer digits to a mean than
    sums of squares do.
    """

    def merge(left, right):
        start_left, count_left, mean_left, m2_left = left
        start_right, count_right, mean_right, m2_right = right
        same = start_left == start_right
        kept = jnp.where(same, count_left, 0.0)
        count = kept + count_right
        delta = jnp.where(same, mean_right - mean_left, 0.0)
        mean = mean_right - delta * (kept / count)
        m2 = m2_right + jnp.where(same, m2_left, 0.0) + delta**2 * (kept * count_right / count)
        return start_right, count, mean, m2

    first = start[:, :, None]
    elements = (first, jnp.ones_like(first, x.dtype), x, jnp.zeros_like(x))
    _, count, mean, m2 = jax.lax.associative_scan(merge, elements, axis=1)
    return mean, m2 / count


class TimestepNorm(nnx.Module):
    """Causal normalisation over time with a learnable gain (Megalodon, arXiv 2404.08801).

    Position t is normalised by mean and variance of the positions of its document up to t; the
    first becomes 0. There is no bias: SparseK ignores a shift of all scores.
    """

    def __init__(self, num_features: int, *, epsilon: float = 1e-5):
        self.gain = nnx.Param(jnp.ones((num_features,), jnp.float32))
        self.epsilon = epsilon

    def __call__(self, x: Float[Array, "B T K"], start: Int[Array, "B T"]) -> Float[Array, "B T K"]:
        """Normalises x `[B, T, K]`, float32; `start` is every position's document start."""
        # The norm ignores a shift. Measured from the document's first value, x keeps the digits
        # that a mean much larger than the deviations would cost.
        first = jnp.take_along_axis(x, start[:, :, None], axis=1)
        x = x - jax.lax.stop_gradient(first)
        mean, variance = timestep_statistics(x, start)
        return self.gain[...] * (x - mean) * jax.lax.rsqrt(variance + self.epsilon)
