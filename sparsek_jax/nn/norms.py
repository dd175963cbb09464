"""Norms: over features, and over the time so far."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from sparsek_jax.nn.config import NormKind


def feature_norm(
    kind: NormKind, num_features: int, eps: float, *, rngs: nnx.Rngs
) -> nnx.RMSNorm | nnx.LayerNorm:
    """Makes a norm over the last axis. It computes in, and returns, float32."""
    if kind == "rmsnorm":
        return nnx.RMSNorm(num_features, epsilon=eps, dtype=jnp.float32, rngs=rngs)
    # The "fast" variance E[x^2] - E[x]^2 cancels.
    return nnx.LayerNorm(
        num_features, epsilon=eps, dtype=jnp.float32, use_fast_variance=False, rngs=rngs
    )


class TimestepNorm(nnx.Module):
    """Norm by the mean and variance of each feature over the time so far.

    Megalodon (arXiv 2404.08801), with as many groups as features and without its prior and bias:
    a shift common to all scores of a pool does not change what SparseK selects, nor its gates.

    Attributes:
      scale: Learnable gain, `[K]`, 1 at first.
    """

    def __init__(self, num_features: int, *, eps: float = 1e-5):
        self.scale = nnx.Param(jnp.ones(num_features, jnp.float32))
        self.eps = eps

    def __call__(
        self, x: Float[Array, "B T K"], segment_ids: Int[Array, "B T"] | None = None
    ) -> Float[Array, "B T K"]:
        """Normalises `x[t]` by the statistics of x[0..t] of its document.

        A document's first value becomes 0.

        Args:
          x: `[B, T, K]` float32.
          segment_ids: Ids of packed documents; the statistics restart with each.

        Returns:
          `[B, T, K]` float32.
        """
        mean, variance = running_moments(x, segment_ids)
        return (x - mean) * jax.lax.rsqrt(variance + self.eps) * self.scale[...]


def running_moments(
    x: Float[Array, "B T K"], segment_ids: Int[Array, "B T"] | None = None
) -> tuple[Float[Array, "B T K"], Float[Array, "B T K"]]:
    """Mean and (population) variance of each feature from its document's start to each time.

    Merges the moments of neighbouring stretches of time in a tree (Chan, Golub, LeVeque 1983): no
    difference of large sums, so nothing cancels, however long the row or far the mean from 0. Time
    and memory O(T).
    """
    is_start = jnp.zeros((*x.shape[:2], 1), bool)
    if segment_ids is not None:
        is_start = is_start.at[:, 1:, 0].set(segment_ids[:, 1:] != segment_ids[:, :-1])

    def merge(left, right):
        n_left, mean_left, m2_left, start_left = left
        n_right, mean_right, m2_right, start_right = right
        # A stretch that holds the start of a document forgets all before it.
        n_left = jnp.where(start_right, 0.0, n_left)
        m2_left = jnp.where(start_right, 0.0, m2_left)
        count = n_left + n_right
        delta = mean_right - mean_left
        # Exactly mean_right where n_left is 0: nothing leaks from the document before.
        mean = mean_right - delta * (n_left / count)
        m2 = m2_left + m2_right + delta**2 * (n_left * n_right / count)
        return count, mean, m2, start_left | start_right

    once = jnp.ones_like(x[..., :1])
    count, mean, m2, _ = jax.lax.associative_scan(
        merge, (once, x, jnp.zeros_like(x), is_start), axis=1
    )
    return mean, m2 / count
