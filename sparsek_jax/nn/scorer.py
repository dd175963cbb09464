"""The scoring network: one importance score per key, independent of the query."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from sparsek_jax.ops.products import einsum_f32
from sparsek_jax.ops.selection import document_bounds


def timestep_statistics(
    x: Float[Array, "B T K"], start: Int[Array, "B T"]
) -> tuple[Float[Array, "B T K"], Float[Array, "B T K"]]:
    """Mean and (biased) variance over the positions of the document so far, `start <= j <= t`.

    Partial statistics are merged pairwise (Chan et al.), which loses no digit to a large mean.
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

    first = jnp.broadcast_to(start[:, :, None], x.shape)
    elements = (first, jnp.ones_like(x), x, jnp.zeros_like(x))
    _, count, mean, m2 = jax.lax.associative_scan(merge, elements, axis=1)
    return mean, m2 / count


class TimestepNorm(nnx.Module):
    """Causal normalisation over time with a learnable gain (Megalodon, arXiv 2404.08801).

    Position t is normalised by mean and variance of the positions of its document up to t.
    """

    def __init__(self, num_features: int, *, epsilon: float = 1e-5):
        self.gain = nnx.Param(jnp.ones((num_features,), jnp.float32))
        self.epsilon = epsilon

    def __call__(self, x: Float[Array, "B T K"], start: Int[Array, "B T"]) -> Float[Array, "B T K"]:
        """Normalises x `[B, T, K]`, float32; `start` is every position's document start."""
        mean, variance = timestep_statistics(x, start)
        return self.gain[...] * (x - mean) * jax.lax.rsqrt(variance + self.epsilon)


class ScoringNetwork(nnx.Module):
    """Scores `u = TimestepNorm(x w) + slope * position` (arXiv 2406.16747, section 3).

    The slope is added after the norm and not divided by the length: newer keys gain for good, so
    that a key once dropped never returns.
    """

    def __init__(
        self,
        d_model: int,
        num_scores: int,
        *,
        timestep_norm: bool = True,
        slope: float = 1e-6,
        rngs: nnx.Rngs,
    ):
        """Initialises the network.

        Args:
          d_model: Width of the input.
          num_scores: Scores per position: the KV heads, or 1.
          timestep_norm: Whether scores are normalised over time.
          slope: Added per position within the document.
          rngs: Source of the initial weights.
        """
        init = nnx.initializers.lecun_normal()
        self.kernel = nnx.Param(init(rngs.params(), (d_model, num_scores), jnp.float32))
        self.norm = TimestepNorm(num_scores) if timestep_norm else None
        self.slope = slope

    def __call__(
        self, x: Float[Array, "B T D"], segment_ids: Int[Array, "B T"] | None = None
    ) -> Float[Array, "B T K"]:
        """Returns float32 scores `[B, T, num_scores]` of x `[B, T, d_model]`, any float dtype."""
        batch, length, _ = x.shape
        start, _ = document_bounds(segment_ids, batch, length)
        scores = einsum_f32("btd,dk->btk", x.astype(jnp.float32), self.kernel[...])
        if self.norm is not None:
            scores = self.norm(scores, start)
        position = jnp.arange(length) - start
        return scores + self.slope * position[:, :, None].astype(jnp.float32)
