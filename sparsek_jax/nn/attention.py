"""Self-attention layers: what all kinds share, and SparseK attention."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Float32, Int

from sparsek_jax.nn.config import AttentionConfig
from sparsek_jax.nn.norms import feature_norm
from sparsek_jax.nn.positions import apply_rotary, document_positions
from sparsek_jax.nn.scorer import ScoringNetwork
from sparsek_jax.ops import sparsek_attention


class SelfAttention(nnx.Module):
    """Causal grouped-query self-attention; a subclass's `attend` says who attends to whom.

    Attributes:
      query: Projection `[d_model, N * H]`.
      key: Projection `[d_model, K * H]`.
      value: Projection `[d_model, K * H]`.
      out: Projection `[N * H, d_model]`.
      query_norm: RMSNorm of each query head, if `config.qk_norm`.
      key_norm: RMSNorm of each key head, if `config.qk_norm`.
    """

    def __init__(
        self,
        config: AttentionConfig,
        d_model: int,
        *,
        out_scale: float = 1.0,
        norm_eps: float = 1e-6,
        dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        """Makes the layer; `config.kind` and `config.pattern` are the decoder's and ignored here.

        Args:
          config: Heads and settings.
          d_model: Features of a token.
          out_scale: Factor on the initial output projection.
          norm_eps: Epsilon of the QK-norm.
          dtype: Of the computation; parameters are float32.
          rngs: Source of the initial parameters (stream "params").
        """
        self.config = config
        self.dtype = dtype
        linear = functools.partial(
            nnx.Linear,
            dtype=dtype,
            kernel_init=jax.nn.initializers.lecun_normal(),
            rngs=rngs,
        )
        query_dim = config.num_heads * config.head_dim
        key_dim = config.num_kv_heads * config.head_dim
        self.query = linear(d_model, query_dim, use_bias=config.qkv_bias)
        self.key = linear(d_model, key_dim, use_bias=config.qkv_bias)
        self.value = linear(d_model, key_dim, use_bias=config.qkv_bias)
        self.out = linear(
            query_dim,
            d_model,
            use_bias=config.out_bias,
            kernel_init=scaled_normal(out_scale),
        )
        if config.qk_norm:
            self.query_norm = feature_norm("rmsnorm", config.head_dim, norm_eps, rngs=rngs)
            self.key_norm = feature_norm("rmsnorm", config.head_dim, norm_eps, rngs=rngs)

    def __call__(
        self,
        x: Float[Array, "B T D"],
        *,
        positions: Int[Array, "B T"] | None = None,
        segment_ids: Int[Array, "B T"] | None = None,
        return_scores: bool = False,
    ) -> Float[Array, "B T D"] | tuple[Float[Array, "B T D"], Float32[Array, "B T S"] | None]:
        """Mixes every token with earlier ones of its document.

        Args:
          x: Tokens' features, `[B, T, d_model]`.
          positions: Position of every token in its document; None: counted from `segment_ids`.
          segment_ids: Ids of packed documents (maximal runs of equal ids); None: each row is one.
          return_scores: Also return the scores of the tokens.

        Returns:
          `[B, T, d_model]` in the layer's dtype; with `return_scores`, this and the float32 scores,
          None for a kind that has none.
        """
        if positions is None:
            positions = document_positions(segment_ids, *x.shape[:2])
        config = self.config

        def heads(projection, count):
            return projection(x).reshape(*x.shape[:2], count, config.head_dim)

        query = heads(self.query, config.num_heads)
        key = heads(self.key, config.num_kv_heads)
        value = heads(self.value, config.num_kv_heads)
        if config.qk_norm:
            query, key = self.query_norm(query), self.key_norm(key)
        rotate = functools.partial(
            apply_rotary,
            positions=positions,
            theta=config.rope_theta,
            rotary_dim=config.rotary_dim,
        )
        query = rotate(query).astype(self.dtype)
        key = rotate(key).astype(self.dtype)
        scores = self.score(x, positions, segment_ids)
        mixed = self.attend(query, key, value, scores, segment_ids)
        out = self.out(mixed.reshape(*x.shape[:2], -1))
        return (out, scores) if return_scores else out

    def score(
        self, x: Float[Array, "B T D"], positions: Int[Array, "B T"], segment_ids
    ) -> Float32[Array, "B T S"] | None:
        """Returns the importance of every token, None for a kind that does not need it."""
        del x, positions, segment_ids
        return None

    def attend(self, query, key, value, scores, segment_ids) -> Float[Array, "B T N H"]:
        """Attends: query `[B, T, N, H]`, key and value `[B, T, K, H]`, scores as of `score`."""
        raise NotImplementedError


class SparseKAttention(SelfAttention):
    """SparseK attention (arXiv 2406.16747): a window, and k tokens that a learned score selects.

    Attributes:
      scorer: The `ScoringNetwork`; all other parameters are those of `SelfAttention`.
    """

    def __init__(self, config: AttentionConfig, d_model: int, *, rngs: nnx.Rngs, **kwargs: Any):
        """Makes the layer; arguments as of `SelfAttention`."""
        super().__init__(config, d_model, rngs=rngs, **kwargs)
        self.scorer = ScoringNetwork(
            d_model,
            config.num_scores,
            timestep_norm=config.timestep_norm,
            slope=config.slope,
            rngs=rngs,
        )

    def score(self, x, positions, segment_ids):
        """Scores every token."""
        return self.scorer(x, positions=positions, segment_ids=segment_ids)

    def attend(self, query, key, value, scores, segment_ids):
        """Applies `sparsek_jax.sparsek_attention`."""
        return sparsek_attention(
            query,
            key,
            value,
            scores,
            num_selected=self.config.num_selected,
            sliding_window=self.config.sliding_window,
            gating=self.config.gating,
            segment_ids=segment_ids,
            implementation=self.config.implementation,
        )


def scaled_normal(scale: float) -> jax.nn.initializers.Initializer:
    """LeCun's truncated normal times `scale`."""
    return jax.nn.initializers.variance_scaling(scale**2, "fan_in", "truncated_normal")
