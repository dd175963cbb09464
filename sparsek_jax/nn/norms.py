"""Norms: over the features of a token, and over the time so far."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, Int32


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
) -> tuple[Float[Array, "B T 1"], Float[Array, "B T K"], Float[Array, "B T K"]]:
    """Statistics of the positions of the document so far, `start <= j <= t`.

    Returns:
      Their count, mean, and sum of squared distances from the mean.
    """

    def merge(left, right):
        (start_left, *left), (start_right, *right) = left, right
        return start_right, *_merged(left, right, start_left == start_right)

    first = start[:, :, None]
    elements = (first, jnp.ones_like(first, x.dtype), x, jnp.zeros_like(x))
    return jax.lax.associative_scan(merge, elements, axis=1)[1:]


def _merged(left, right, same):
    """Count, mean and sum of squares of both parts where `same`, else of the right one.

    Merging partial statistics (Chan et al.) loses fewer digits to a mean than sums of squares do.
    """
    (count_left, mean_left, m2_left), (count_right, mean_right, m2_right) = left, right
    kept = jnp.where(same, count_left, 0.0)
    count = kept + count_right
    delta = jnp.where(same, mean_right - mean_left, 0.0)
    mean = mean_right - delta * (kept / count)
    m2 = m2_right + jnp.where(same, m2_left, 0.0) + delta**2 * (kept * count_right / count)
    return count, mean, m2


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["count", "first", "mean", "m2"],
    meta_fields=[],
)
@dataclasses.dataclass(frozen=True)
class TimestepState:
    """What a TimestepNorm remembers of the values so far; all zero before the first one.

    Attributes:
      count: How many they are.
      first: The first one.
      mean: Mean of their distances from the first one.
      m2: Sum of the squared distances from their mean.
    """

    count: Int32[Array, " B"]
    first: Float[Array, "B K"]
    mean: Float[Array, "B K"]
    m2: Float[Array, "B K"]


class TimestepNorm(nnx.Module):
    """Causal normalisation over time with a learnable gain (Megalodon, arXiv 2404.08801).

    Position t is normalised by mean and variance of the positions of its document up to t; the
    first becomes 0. There is no bias: SparseK ignores a shift of all scores.
    """

    def __init__(self, num_features: int, *, gain: float = 1.0, epsilon: float = 1e-5):
        """Initialises the gains, all to `gain`."""
        self.gain = nnx.Param(jnp.full((num_features,), gain, jnp.float32))
        self.num_features = num_features
        self.epsilon = epsilon

    def __call__(self, x: Float[Array, "B T K"], start: Int[Array, "B T"]) -> Float[Array, "B T K"]:
        """Normalises x `[B, T, K]`, float32; `start` is every position's document start."""
        # The norm ignores a shift. Measured from the document's first value, x keeps the digits
        # that a mean much larger than the deviations would cost.
        first = jnp.take_along_axis(x, start[:, :, None], axis=1)
        x = x - jax.lax.stop_gradient(first)
        return self._normalised(x, *timestep_statistics(x, start))

    def init_state(self, batch_size: int) -> TimestepState:
        """The state before the first position."""
        # Three arrays: one that occurs twice could not be donated.
        zeros = (jnp.zeros((batch_size, self.num_features), jnp.float32) for _ in range(3))
        return TimestepState(jnp.zeros((batch_size,), jnp.int32), *zeros)

    def extend(
        self, x: Float[Array, "B C K"], state: TimestepState, num_tokens: Int[Array, " B"]
    ) -> tuple[TimestepState, Float[Array, "B C K"]]:
        """Normalises the next positions of one document; of these, `num_tokens` are remembered."""
        started = (state.count > 0)[:, None]
        first = jnp.where(started, state.first, x[:, 0])
        x = x - first[:, None]
        before = (
            state.count[:, None, None].astype(x.dtype),
            state.mean[:, None],
            state.m2[:, None],
        )
        after = timestep_statistics(x, jnp.zeros(x.shape[:2], jnp.int32))
        count, mean, m2 = _merged(before, after, started[:, None])
        last = jnp.maximum(num_tokens - 1, 0)[:, None, None]

        def remembered(new, old):
            new = jnp.take_along_axis(new, last, axis=1)[:, 0]
            return jnp.where(num_tokens[:, None] > 0, new, old)

        state = TimestepState(
            count=state.count + num_tokens,
            first=jnp.where(num_tokens[:, None] > 0, first, state.first),
            mean=remembered(mean, state.mean),
            m2=remembered(m2, state.m2),
        )
        return state, self._normalised(x, count, mean, m2)

    def resume(
        self,
        x: Float[Array, "B T K"],
        state: TimestepState,
        start: Int[Array, "B T"],
        goes_on: Bool[Array, " B"],
    ) -> tuple[TimestepState, Float[Array, "B T K"]]:
        """Normalises rows of which the first document may go on from the row before.

        Args:
          x: Values, float32.
          state: Of the document before, up to its last position.
          start: Every position's document start in the row.
          goes_on: Whether the first document of the row is that document.

        Returns:
          The state of the last document of every row, and the normalised values.
        """
        old = goes_on[:, None, None] & (start == 0)[:, :, None]
        first = jnp.take_along_axis(x, start[:, :, None], axis=1)
        first = jax.lax.stop_gradient(jnp.where(old, state.first[:, None], first))
        x = x - first
        before = (
            state.count[:, None, None].astype(x.dtype),
            state.mean[:, None],
            state.m2[:, None],
        )
        count, mean, m2 = _merged(before, timestep_statistics(x, start), old)
        state = TimestepState(
            count=count[:, -1, 0].astype(jnp.int32),
            first=first[:, -1],
            mean=mean[:, -1],
            m2=m2[:, -1],
        )
        return state, self._normalised(x, count, mean, m2)

    def _normalised(self, x, count, mean, m2):
        return self.gain[...] * (x - mean) * jax.lax.rsqrt(m2 / count + self.epsilon)
