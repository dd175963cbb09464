"""The scoring network of SparseK attention."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from sparsek_jax.nn.norms import TimestepNorm
from sparsek_jax.nn.positions import document_positions


class ScoringNetwork(nnx.Module):
    """Importance of every token, whichever query asks (arXiv 2406.16747).

    score = TimestepNorm(x w) + slope * position. The slope comes after the norm: a score once
    computed never changes, so a key that lost its place never returns.

    Attributes:
      kernel: w, `[d_model, num_scores]`.
      norm: The norm over time, or None.
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
        """Makes the network.

        Args:
          d_model: Features of a token.
          num_scores: Scores of a token: the number of KV heads, or 1 if they share it.
          timestep_norm: Whether to normalise over time.
          slope: Added to the score per position.
          rngs: Source of the initial parameters (stream "params").
        """
        init = jax.nn.initializers.lecun_normal()
        self.kernel = nnx.Param(init(rngs.params(), (d_model, num_scores), jnp.float32))
        self.norm = TimestepNorm(num_scores) if timestep_norm else None
        self.slope = slope

    def __call__(
        self,
        x: Float[Array, "B T D"],
        *,
        positions: Int[Array, "B T"] | None = None,
        segment_ids: Int[Array, "B T"] | None = None,
    ) -> Float[Array, "B T S"]:
        """Scores every token, in float32 whatever the dtype of `x`.

        Args:
          x: Tokens' features, `[B, T, d_model]`.
          positions: Position of every token in its document; None: counted from `segment_ids`.
          segment_ids: Ids of packed documents; the norm restarts with each.

        Returns:
          `[B, T, num_scores]` float32.
        """
        if positions is None:
            positions = document_positions(segment_ids, *x.shape[:2])
        scores = jnp.matmul(
            x.astype(jnp.float32), self.kernel[...], precision=jax.lax.Precision.HIGHEST
        )
        if self.norm is not None:
            scores = self.norm(scores, segment_ids)
        return scores + self.slope * positions[..., None].astype(jnp.float32)
