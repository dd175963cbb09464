"""Gated linear attention (Yang et al. 2023, arXiv 2312.06635) beside a sliding window."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Float32, Int

from sparsek_jax.nn.alternatives.chunkwise import add_to_states, scan_blocks
from sparsek_jax.nn.attention import Attention, float32_linear
from sparsek_jax.nn.cache import (
    GatedLinearCache,
    extend_window_cache,
    init_gated_linear_cache,
)
from sparsek_jax.nn.causal import window_attention
from sparsek_jax.nn.config import AttentionConfig
from sparsek_jax.nn.norms import make_norm
from sparsek_jax.ops.products import einsum_f32
from sparsek_jax.ops.selection import document_bounds

_BLOCK = 64  # tokens, a power of two
# With which forget gates start near 1, as in the paper.
_TEMPERATURE = 16


class GatedLinearAttention(Attention):
    """Attention over a sliding window, and linear attention to all keys through forget gates.

    Every KV head keeps a matrix, the sum of the outer products of its keys and values, of which
    each key channel is multiplied by a forget gate before the next product is added. The queries
    read it: `S_t = diag(a_t) S_(t-1) + k_t v_t^T`, `o_t = S_t^T q_t`. What they read is normalised
    per query head (RMSNorm), multiplied by a gate of that head, and added to the window's output.

    As in the paper, but for these: queries and keys are rotated, as the window needs them to be;
    the output gate is one number per head; and the forget gates' projection has rank d_model / 64,
    so that the layer has hardly more parameters than others.

    Its initialiser takes the arguments of `Attention`.
    """

    def __init__(
        self,
        config: AttentionConfig,
        d_model: int,
        *,
        norm_eps: float = 1e-6,
        rngs: nnx.Rngs,
        **kwargs,
    ):
        super().__init__(config, d_model, norm_eps=norm_eps, rngs=rngs, **kwargs)
        rank = max(d_model // 64, 1)
        self.forget_inner = float32_linear(d_model, rank, rngs=rngs)
        self.forget_outer = float32_linear(rank, config.num_kv_heads * config.head_dim, rngs=rngs)
        self.gates = float32_linear(d_model, config.num_heads, rngs=rngs)
        self.linear_norm = make_norm("rmsnorm", config.head_dim, norm_eps, rngs=rngs)

    def mix(self, x, query, key, value, segment_ids, sharding, layer):
        """Returns attention output `[B, T, N, H]` and None."""
        del sharding, layer
        window = window_attention(
            query,
            key,
            value,
            sliding_window=self.config.sliding_window,
            segment_ids=segment_ids,
        )
        start, _ = document_bounds(segment_ids, *x.shape[:2])
        state = jnp.zeros((len(x), *key.shape[2:], key.shape[3]))
        linear, _ = gated_linear_attention(
            query, key, value, self._log_decay(x), start=start, state=state
        )
        return window + self._gated(x, linear), None

    def mix_next(self, x, query, key, value, cache, positions, num_tokens, layer):
        """Returns the extended cache and attention output `[B, C, N, H]`."""
        del positions, layer
        window_cache, window = extend_window_cache(cache.window, query, key, value, num_tokens)
        appended = (jnp.arange(x.shape[1]) < num_tokens[:, None])[..., None, None]
        key, value, log_decay = (
            jnp.where(appended, array, 0) for array in (key, value, self._log_decay(x))
        )
        # The document began before.
        start = jnp.full(x.shape[:2], -1, jnp.int32)
        linear, state = gated_linear_attention(
            query, key, value, log_decay, start=start, state=cache.state
        )
        return GatedLinearCache(window_cache, state), window + self._gated(x, linear)

    def init_cache(self, batch_size, *, max_length=None, support_size=None) -> GatedLinearCache:
        """Makes an empty cache of constant size."""
        del max_length, support_size
        return init_gated_linear_cache(batch_size, self.config, self.dtype)

    def _log_decay(self, x):
        """Logarithms of the forget gates, float32 `[B, T, K, H]`."""
        logits = self._heads(self.forget_outer(self.forget_inner(x)))
        return jax.nn.log_sigmoid(logits) / _TEMPERATURE

    def _gated(self, x, linear):
        gate = jax.nn.sigmoid(self.gates(x))[..., None]
        return (self.linear_norm(linear) * gate).astype(self.dtype)


def gated_linear_attention(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B T K H"],
    value: Float[Array, "B T K H"],
    log_decay: Float32[Array, "B T K H"],
    *,
    start: Int[Array, "B T"],
    state: Float32[Array, "B K H H"],
) -> tuple[Float32[Array, "B T N H"], Float32[Array, "B K H H"]]:
    """Linear attention with a forget gate for every key channel, in the chunkwise form.

    Time and memory are linear in T. Nothing is divided by a product of gates, so that gates may be
    as small as they like.

    Args:
      query: Queries.
      key: Keys; zero, with `log_decay` zero, for a token that is to leave no trace.
      value: Values.
      log_decay: Logarithms of the forget gates, at most 0.
      start: First row of every row's document; -1 for the document that `state` is of.
      state: What came before: a matrix of key and value channels for every KV head.

    Returns:
      The output, and the state after the last row.
    """
    length, num_kv_heads, head_dim = key.shape[1:]
    groups = query.shape[2] // num_kv_heads
    size = min(_BLOCK, 1 << (length - 1).bit_length())

    def attend(state, query, key, value, log_decay, start, rows):
        query = query.reshape(*key.shape[:4], groups, head_dim) * head_dim**-0.5
        since = jnp.cumsum(log_decay, axis=2)
        first, last = rows[:, :, :1], start[:, :, -1:]
        # What a block adds to the state, and what it leaves of it.
        adds = (rows >= last)[..., None, None]
        kept = key * jnp.where(adds, jnp.exp(_sums_after(log_decay, 2)), 0.0)
        added = einsum_f32("bsckh,bsckv->bskhv", kept, value)
        leaves = (last < first)[..., None]
        left = jnp.where(leaves, jnp.exp(since[:, :, -1]), 0.0)[..., None]
        before, state = add_to_states(left, added, state)
        reaches = (start < first)[..., None, None]
        reading = query * jnp.where(reaches, jnp.exp(since), 0.0)[..., None, :]
        past = einsum_f32("bsckgh,bskhv->bsckgv", reading, before)
        out = past + _within_blocks(query, key, value, log_decay, start, rows)
        return state, out.reshape(*out.shape[:3], -1, head_dim)

    arrays = [x.astype(jnp.float32) for x in (query, key, value, log_decay)]
    # Of a query, and a block's share of its state.
    floats = num_kv_heads * head_dim * max(groups, head_dim // size)
    return scan_blocks(attend, state, arrays, start, size, floats)


def _within_blocks(query, key, value, log_decay, start, rows):
    """What queries read of the keys of their block, up to their own, `[B, blocks, size, K, G, H]`.

    Blocks are halved again and again. Queries in the second half read the keys in the first one by
    a product of matrices: what is left of a key at the border, and what is left from there to the
    query, are both at most 1.
    """
    size = key.shape[2]
    out = einsum_f32("bsckgh,bsckh->bsckg", query, key)[..., None] * value[:, :, :, :, None]
    half = 1
    while half < size:

        def halves(x, half=half):
            x = x.reshape(*x.shape[:2], -1, 2, half, *x.shape[3:])
            return x[:, :, :, 0], x[:, :, :, 1]

        (early_decay, late_decay), (early_rows, _) = halves(log_decay), halves(rows)
        kept = halves(key)[0] * jnp.exp(_sums_after(early_decay, 3))
        reading = halves(query)[1] * jnp.exp(jnp.cumsum(late_decay, axis=3))[..., None, :]
        weights = einsum_f32("bsnckgh,bsnjkh->bsnkgcj", reading, kept)
        seen = early_rows[..., None, :] >= halves(start)[1][..., None]
        weights = jnp.where(seen[:, :, :, None, None], weights, 0.0)
        read = einsum_f32("bsnkgcj,bsnjkv->bsnckgv", weights, halves(value)[0])
        early, late = halves(out)
        out = jnp.stack([early, late + read], axis=3).reshape(out.shape)
        half *= 2
    return out


def _sums_after(x: Float32[Array, "..."], axis: int) -> Float32[Array, "..."]:
    """Sum of what comes after each element. As a difference of sums it would lose digits."""
    later = jax.lax.slice_in_dim(x, 1, None, axis=axis)
    none = jnp.zeros_like(jax.lax.slice_in_dim(x, 0, 1, axis=axis))
    return jnp.concatenate([jax.lax.cumsum(later, axis=axis, reverse=True), none], axis=axis)
