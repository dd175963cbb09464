"""A decoder-only language model whose layers may use different kinds of attention."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Float32, Int

from sparsek_jax.nn.alternatives import DenseAttention, WindowAttention
from sparsek_jax.nn.attention import SparseKAttention, scaled_normal
from sparsek_jax.nn.config import AttentionKind, DecoderConfig
from sparsek_jax.nn.norms import feature_norm
from sparsek_jax.nn.positions import document_positions

_ATTENTION = {
    "sparsek": SparseKAttention,
    "dense": DenseAttention,
    "window": WindowAttention,
}
_EMBEDDING_INIT = jax.nn.initializers.truncated_normal(stddev=0.02)


class Mlp(nnx.Module):
    """SwiGLU (arXiv 2002.05202) or GELU feed-forward network.

    Attributes:
      gate: Projection `[d_model, mlp_dim]` under the SiLU; SwiGLU only.
      up: Projection `[d_model, mlp_dim]`.
      down: Projection `[mlp_dim, d_model]`.
    """

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs):
        linear = functools.partial(
            nnx.Linear, use_bias=config.mlp_bias, dtype=jnp.dtype(config.dtype), rngs=rngs
        )
        inner = functools.partial(
            linear, config.d_model, config.mlp_dim, kernel_init=scaled_normal(1.0)
        )
        self.gate = inner() if config.activation == "swiglu" else None
        self.up = inner()
        self.down = linear(
            config.mlp_dim, config.d_model, kernel_init=scaled_normal(_residual_scale(config))
        )

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """Applies the network to every token."""
        if self.gate is None:
            return self.down(jax.nn.gelu(self.up(x), approximate=False))
        return self.down(jax.nn.silu(self.gate(x)) * self.up(x))


class Block(nnx.Module):
    """Pre-norm transformer block.

    Attributes:
      attention_norm: Norm before the attention.
      attention: A `SelfAttention`; the scorer of the sparsek kind reads the normed tokens as well.
      mlp_norm: Norm before the MLP.
      mlp: The MLP.
    """

    def __init__(self, config: DecoderConfig, kind: AttentionKind, *, rngs: nnx.Rngs):
        norm = functools.partial(
            feature_norm, config.norm, config.d_model, config.norm_eps, rngs=rngs
        )
        self.config = config
        self.attention_norm = norm()
        self.attention = _ATTENTION[kind](
            config.attention,
            config.d_model,
            out_scale=_residual_scale(config),
            norm_eps=config.norm_eps,
            dtype=jnp.dtype(config.dtype),
            rngs=rngs,
        )
        self.mlp_norm = norm()
        self.mlp = Mlp(config, rngs=rngs)

    def __call__(
        self,
        x: Float[Array, "B T D"],
        positions: Int[Array, "B T"],
        segment_ids: Int[Array, "B T"] | None,
    ) -> tuple[Float[Array, "B T D"], Float32[Array, "B T S"] | None]:
        """Returns the new residual stream and the attention's scores (None if it has none)."""
        mixed, scores = self.attention(
            self.attention_norm(x).astype(x.dtype),
            positions=positions,
            segment_ids=segment_ids,
            return_scores=True,
        )
        mlp_input = x if self.config.parallel_residual else x + mixed
        update = self.mlp(self.mlp_norm(mlp_input).astype(x.dtype))
        return x + mixed + update, scores


class Decoder(nnx.Module):
    """Decoder-only language model.

    Attributes:
      embedding: Token table `[vocab_size, d_model]`.
      layers: The blocks; with `config.scan_layers`, the blocks of one period of the pattern, their
        parameters stacked: layer i is entry i // period of block i % period.
      norm: The final norm.
      head: Output projection `[d_model, vocab_size]`, None with tied embeddings.
    """

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs):
        """Makes a decoder with random parameters, in float32.

        Matrices start as LeCun's truncated normal, those that write to the residual stream divided
        by sqrt(2 * num_layers), and the embedding with a standard deviation of 0.02.

        Args:
          config: The configuration.
          rngs: Source of the initial parameters (stream "params").
        """
        self.config = config
        # float32: the gradient of a frequent token is a sum of thousands.
        self.embedding = nnx.Embed(
            config.vocab_size,
            config.d_model,
            dtype=jnp.float32,
            embedding_init=_EMBEDDING_INIT,
            rngs=rngs,
        )
        self.layers = nnx.List(
            _stacked_blocks(config, config.attention.kind_of(layer), rngs)
            if config.scan_layers
            else Block(config, config.attention.kind_of(layer), rngs=rngs)
            for layer in range(config.period if config.scan_layers else config.num_layers)
        )
        self.norm = feature_norm(config.norm, config.d_model, config.norm_eps, rngs=rngs)
        self.head = None
        if not config.tie_embeddings:
            self.head = nnx.Linear(
                config.d_model,
                config.vocab_size,
                use_bias=False,
                kernel_init=_EMBEDDING_INIT,
                rngs=rngs,
            )

    def __call__(
        self,
        tokens: Int[Array, "B T"],
        *,
        positions: Int[Array, "B T"] | None = None,
        segment_ids: Int[Array, "B T"] | None = None,
    ) -> Float32[Array, "B T V"]:
        """Returns the float32 logits of every next token; arguments as of `hidden`."""
        return self.logits(self.hidden(tokens, positions=positions, segment_ids=segment_ids))

    def hidden(
        self,
        tokens: Int[Array, "B T"],
        *,
        positions: Int[Array, "B T"] | None = None,
        segment_ids: Int[Array, "B T"] | None = None,
        return_scores: bool = False,
    ) -> Float[Array, "B T D"] | tuple[Float[Array, "B T D"], dict[int, Float32[Array, "B T S"]]]:
        """Runs the layers.

        Args:
          tokens: Ids, `[B, T]`.
          positions: Position of every token in its document; None: counted from `segment_ids`.
          segment_ids: Ids of packed documents: a maximal run of equal ids is one, and sees no
            other. None: each row is one, for which attention has faster kernels.
          return_scores: Also return the importance scores.

        Returns:
          `[B, T, d_model]` in `config.dtype`, after the final norm. With `return_scores`, this and
          the float32 scores `[B, T, K or 1]` of each layer that has them, by its number.

        Raises:
          ValueError: An argument has the wrong shape or dtype.
        """
        config = self.config
        _check_ids("tokens", tokens, None)
        if segment_ids is not None:
            _check_ids("segment_ids", segment_ids, tokens.shape)
        if positions is None:
            positions = document_positions(segment_ids, *tokens.shape)
        _check_ids("positions", positions, tokens.shape)
        graphdefs, parameters = zip(*map(nnx.split, self.layers), strict=True)

        def run(graphdef, parameters, x):
            x, scores = nnx.merge(graphdef, parameters)(x, positions, segment_ids)
            return x, scores if return_scores else None

        run_blocks = [
            _with_remat(config, functools.partial(run, graphdef)) for graphdef in graphdefs
        ]

        def run_all(x, parameters):
            scores = []
            for run_block, block_parameters in zip(run_blocks, parameters, strict=True):
                x, block_scores = run_block(block_parameters, x)
                scores.append(block_scores)
            return x, scores

        x = self.embedding(tokens).astype(config.dtype)
        if config.scan_layers:
            x, stacked = jax.lax.scan(run_all, x, parameters)
            scores = [
                None
                if stacked[layer % config.period] is None
                else stacked[layer % config.period][layer // config.period]
                for layer in range(config.num_layers)
            ]
        else:
            x, scores = run_all(x, parameters)
        x = self.norm(x).astype(config.dtype)
        if return_scores:
            return x, {layer: s for layer, s in enumerate(scores) if s is not None}
        return x

    def logits(self, hidden: Float[Array, "*B D"]) -> Float32[Array, "*B V"]:
        """Projects hidden states `[..., d_model]` to float32 logits `[..., vocab_size]`."""
        tied = self.head is None
        kernel = self.embedding.embedding[...].T if tied else self.head.kernel[...]
        return jnp.matmul(hidden, kernel.astype(hidden.dtype), preferred_element_type=jnp.float32)


def _stacked_blocks(config: DecoderConfig, kind: AttentionKind, rngs: nnx.Rngs) -> Block:
    @nnx.split_rngs(splits=config.num_layers // config.period)
    @nnx.vmap
    def make(rngs):
        return Block(config, kind, rngs=rngs)

    return make(rngs)


def _with_remat(config: DecoderConfig, function):
    if config.remat == "none":
        return function
    policy = None
    if config.remat == "dots":
        policy = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
    # A scan's body is compiled apart from its recomputation, which therefore cannot be merged.
    return jax.checkpoint(function, policy=policy, prevent_cse=not config.scan_layers)


def _residual_scale(config: DecoderConfig) -> float:
    return 1 / math.sqrt(2 * config.num_layers)


def _check_ids(name: str, ids: Any, shape: tuple[int, ...] | None) -> None:
    if not jnp.issubdtype(ids.dtype, jnp.integer):
        raise ValueError(f"{name} has dtype {ids.dtype}; expected integers")
    if ids.ndim != 2 or shape not in (None, ids.shape):
        raise ValueError(f"{name} has shape {ids.shape}; expected {shape or '[B, T]'}")
