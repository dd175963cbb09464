"""Native Sparse Attention (Yuan et al. 2025, arXiv 2502.11089)."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float32

from sparsek_jax.nn.alternatives.blocks import (
    RememberingAttention,
    attend_to_blocks,
    best_blocks,
    by_kv_head,
    find_queries,
    queries_at_a_time,
    whole_blocks,
)
from sparsek_jax.nn.attention import float32_linear
from sparsek_jax.nn.causal import over_query_chunks, positioned_attention, window_attention
from sparsek_jax.nn.config import AttentionConfig
from sparsek_jax.ops.products import einsum_f32


class BlockCompression(nnx.Module):
    """One row for every block of keys, or of values: the mean of what an MLP makes of its rows.

    The MLP knows the position within the block, adds to its input, and starts with adding nothing.
    It has an eighth of the head's channels and is the same for all heads, where the paper's MLP
    takes a whole block at once, so that the layer has hardly more parameters than others.
    """

    def __init__(self, head_dim: int, block_size: int, *, rngs: nnx.Rngs):
        """Initialises the MLP.

        Args:
          head_dim: H.
          block_size: Rows of a block.
          rngs: Source of the initial weights.
        """
        width = max(head_dim // 8, 1)
        self.inner = float32_linear(head_dim, width, rngs=rngs)
        self.position = nnx.Param(jnp.zeros((block_size, width)))
        self.outer = float32_linear(
            width, head_dim, kernel_init=nnx.initializers.zeros_init(), rngs=rngs
        )

    def __call__(self, rows: Float32[Array, "B M size K H"]) -> Float32[Array, "B M K H"]:
        """Compresses every block."""
        hidden = self.inner(rows) + self.position[:, None]
        hidden = jax.nn.gelu(hidden, approximate=False).mean(axis=2)
        return rows.mean(axis=2) + self.outer(hidden)


class NativeSparseAttention(RememberingAttention):
    """Three kinds of attention, summed by gates that the hidden state gives to each query head.

    - Compressed: over one compressed key for every block that is complete.
    - Selected: over blocks of together k keys: the query's own, the first one, the one before its
      own, and then those to which the compressed attention of all query heads of the KV head is
      largest. No gradient flows through the choice.
    - Window: over the w newest keys.

    As in the paper, but for these: blocks that are compressed do not overlap and are those that are
    selected, and the three kinds share their keys and values.

    Its initialiser takes the arguments of `Attention`.
    """

    def __init__(self, config: AttentionConfig, d_model: int, *, rngs: nnx.Rngs, **kwargs):
        super().__init__(config, d_model, rngs=rngs, **kwargs)
        self.gates = float32_linear(d_model, 3 * config.num_heads, rngs=rngs)
        self.compress_key, self.compress_value = (
            BlockCompression(config.head_dim, config.block_size, rngs=rngs) for _ in range(2)
        )

    def attend(self, x, query, key, value, row, start, sharding, layer):
        """Returns the gated sum of compressed and selected attention, `[B, C, N, H]`."""
        del layer
        blocks = whole_blocks(start, self.config.block_size)
        key, value = (array.astype(jnp.float32) for array in (key, value))
        compressed_key = self.compress_key(blocks.gather(key))
        compressed_value = self.compress_value(blocks.gather(value))
        num_kv_heads = key.shape[2]
        count = self.config.num_selected // blocks.size - 1

        def compare(query, row):
            queries = find_queries(row, start, blocks.size)
            before = queries.own - blocks.size
            by_head = by_kv_head(query, num_kv_heads)
            weights = _weights(by_head, compressed_key, queries.complete(blocks))
            compressed = einsum_f32("bkgcm,bmkh->bckgh", weights, compressed_value)
            mass = jnp.swapaxes(jax.lax.stop_gradient(weights.sum(axis=2)), 1, 2)
            begin = blocks.begin[:, None]
            fixed = (begin == queries.start[..., None]) | (begin == before[..., None])
            mass = jnp.where(fixed[:, :, None], jnp.inf, mass)
            choice = best_blocks(mass, queries.past(blocks)[:, :, None], count)
            return compressed.reshape(query.shape).astype(query.dtype), choice[..., None, :]

        chunk_size = queries_at_a_time(row.shape[1], blocks.begin.shape[1])
        compressed, choice = over_query_chunks(compare, query, row, chunk_size=chunk_size)
        own = find_queries(row, start, blocks.size).own
        selected = attend_to_blocks(
            query, key, value, blocks, choice, row, own, blocks.size - 1, sharding
        )
        return self._gated(x, 0, compressed) + self._gated(x, 1, selected)

    def mix(self, x, query, key, value, segment_ids, sharding, layer):
        """Returns attention output `[B, T, N, H]` and None."""
        out, _ = super().mix(x, query, key, value, segment_ids, sharding, layer)
        window = window_attention(
            query,
            key,
            value,
            sliding_window=self.config.sliding_window,
            segment_ids=segment_ids,
        )
        return out + self._gated(x, 2, window), None

    def mix_next(self, x, query, key, value, cache, positions, num_tokens, layer):
        """Returns the extended cache and attention output `[B, C, N, H]`, NaN beyond its room."""
        cache, out = super().mix_next(x, query, key, value, cache, positions, num_tokens, layer)
        window = positioned_attention(
            query,
            cache.key,
            cache.value,
            positions=positions,
            key_positions=jnp.arange(cache.key.shape[1]),
            sliding_window=self.config.sliding_window,
        )
        return cache, out + self._gated(x, 2, window)

    def _gated(self, x, branch, out):
        """The output of a branch, times the gate of every head."""
        gates = jax.nn.sigmoid(self.gates(x)).reshape(*x.shape[:2], 3, -1, 1)
        return out * gates[:, :, branch].astype(out.dtype)


def _weights(
    query: Float32[Array, "B C K G H"],
    key: Float32[Array, "B M K H"],
    seen: Bool[Array, "B C M"],
) -> Float32[Array, "B K G C M"]:
    """Softmax of scaled products over the blocks that are seen; zeros where none is."""
    logits = einsum_f32("bckgh,bmkh->bkgcm", query, key) * query.shape[-1] ** -0.5
    seen = seen[:, None, None]
    # Not -inf, which would make NaNs of rows without any.
    weights = jax.nn.softmax(jnp.where(seen, logits, jnp.finfo(logits.dtype).min))
    return jnp.where(seen, weights, 0.0)
