"""The scoring network: one importance score per key, independent of the query."""

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from sparsek_jax.nn.norms import TimestepNorm, TimestepState
from sparsek_jax.ops.products import einsum_f32
from sparsek_jax.ops.selection import document_bounds


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
        scores = self._project(x)
        if self.norm is not None:
            scores = self.norm(scores, start)
        return self._sloped(scores, jnp.arange(length) - start)

    def extend(
        self,
        x: Float[Array, "B C D"],
        state: TimestepState | None,
        *,
        positions: Int[Array, "B C"],
        num_tokens: Int[Array, " B"],
    ) -> tuple[TimestepState | None, Float[Array, "B C K"]]:
        """Scores the next tokens of a document.

        Args:
          x: Their hidden states.
          state: What the norm remembers of the tokens before, `norm.init_state` at first; None
            without a norm.
          positions: The tokens' positions in the document.
          num_tokens: How many of these tokens to remember, the first ones.

        Returns:
          The new state, and float32 scores `[B, C, num_scores]`.
        """
        scores = self._project(x)
        if self.norm is not None:
            state, scores = self.norm.extend(scores, state, num_tokens)
        return state, self._sloped(scores, positions)

    def _project(self, x):
        return einsum_f32("btd,dk->btk", x.astype(jnp.float32), self.kernel[...])

    def _sloped(self, scores, positions):
        return scores + self.slope * positions[:, :, None].astype(jnp.float32)
