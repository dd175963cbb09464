"""The scoring network: one importance score per key, independent of the query."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from sparsek_jax.nn.norms import TimestepNorm, TimestepState
from sparsek_jax.ops.products import einsum_f32
from sparsek_jax.ops.selection import document_bounds

# Positions that a learned slope is per, so that it is about as large as the kernel.
SLOPE_UNIT = 64
# Score of a sink where later ones are not known: above all in documents of millions of tokens.
_SINK_SCORE = 1e9


def keep_sinks(
    scores: Float[Array, "B T K"], positions: Int[Array, "B T"], num_sinks: int
) -> Float[Array, "B T K"]:
    """Gives the first tokens of every document the highest scores: selected, with gates of 1.

    Args:
      scores: Of whole rows.
      positions: In the document.
      num_sinks: How many tokens; they must not be more than are selected.
    """
    # No higher than need be: thresholds are found within the range of the scores.
    highest = 2.0 + scores.max(axis=1, keepdims=True, initial=-jnp.inf)
    return _raise_sinks(scores, positions, num_sinks, highest)


def keep_sinks_next(
    scores: Float[Array, "B C K"], positions: Int[Array, "B C"], num_sinks: int
) -> Float[Array, "B C K"]:
    """As `keep_sinks`, for the next tokens of documents, whose later scores are not known."""
    return _raise_sinks(scores, positions, num_sinks, _SINK_SCORE)


def _raise_sinks(scores, positions, num_sinks, highest):
    if not num_sinks:
        return scores
    is_sink = positions[:, :, None] < num_sinks
    return jnp.where(is_sink, jax.lax.stop_gradient(highest), scores)


class ScoringNetwork(nnx.Module):
    """Scores `u = TimestepNorm(x w) + slope * position` (arXiv 2406.16747, section 3).

    The slope is added after the norm and not divided by the length: newer keys gain for good, so
    that a key once dropped never returns. That holds for any slope; a learned one is the rate at
    which a head forgets.
    """

    def __init__(
        self,
        d_model: int,
        num_scores: int,
        *,
        timestep_norm: bool = True,
        score_scale: float = 1.0,
        slope: float = 1e-6,
        learned_slope: bool = False,
        num_sinks: int = 0,
        rngs: nnx.Rngs,
    ):
        """Initialises the network.

        Args:
          d_model: Width of the input.
          num_scores: Scores per position: the KV heads, or 1.
          timestep_norm: Whether scores are normalised over time.
          score_scale: Standard deviation of the first scores, about. The larger, the closer gates
            are to 0 and 1.
          slope: Added per position within the document.
          learned_slope: Whether each score learns a slope in addition, from 0.
          num_sinks: First tokens of a document whose keys have the highest scores, whatever they
            are: they are always selected, with gates of 1.
          rngs: Source of the initial weights.
        """
        kernel = nnx.initializers.lecun_normal()(rngs.params(), (d_model, num_scores), jnp.float32)
        self.kernel = nnx.Param(kernel if timestep_norm else score_scale * kernel)
        self.norm = TimestepNorm(num_scores, gain=score_scale) if timestep_norm else None
        self.slope, self.num_sinks = slope, num_sinks
        # Per SLOPE_UNIT positions.
        self.head_slope = nnx.Param(jnp.zeros(num_scores, jnp.float32)) if learned_slope else None

    def __call__(
        self, x: Float[Array, "B T D"], segment_ids: Int[Array, "B T"] | None = None
    ) -> Float[Array, "B T K"]:
        """Returns float32 scores `[B, T, num_scores]` of x `[B, T, d_model]`, any float dtype."""
        batch, length, _ = x.shape
        start, _ = document_bounds(segment_ids, batch, length)
        scores = self._project(x)
        if self.norm is not None:
            scores = self.norm(scores, start)
        positions = jnp.arange(length) - start
        return keep_sinks(self._sloped(scores, positions), positions, self.num_sinks)

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
        return state, keep_sinks_next(self._sloped(scores, positions), positions, self.num_sinks)

    def resume(
        self,
        x: Float[Array, "B T D"],
        state: TimestepState | None,
        *,
        positions: Int[Array, "B T"],
        segment_ids: Int[Array, "B T"],
        goes_on: Bool[Array, " B"],
    ) -> tuple[TimestepState | None, Float[Array, "B T K"]]:
        """Scores rows of which the first document may go on from the row before.

        Args:
          x: Hidden states.
          state: What the norm remembers of the rows before; None without a norm.
          positions: The tokens' positions in their documents.
          segment_ids: Ids of the documents.
          goes_on: Whether the first document of the row is the last one of the row before.

        Returns:
          The new state, and float32 scores `[B, T, num_scores]`.
        """
        scores = self._project(x)
        if self.norm is not None:
            start, _ = document_bounds(segment_ids, *x.shape[:2])
            state, scores = self.norm.resume(scores, state, start, goes_on)
        return state, keep_sinks_next(self._sloped(scores, positions), positions, self.num_sinks)

    def _project(self, x):
        return einsum_f32("btd,dk->btk", x.astype(jnp.float32), self.kernel[...])

    def _sloped(self, scores, positions):
        slope = self.slope
        if self.head_slope is not None:
            slope = slope + self.head_slope[...] / SLOPE_UNIT
        return scores + slope * positions[:, :, None].astype(jnp.float32)
