"""SparseK attention beside linear attention to the keys that it has dropped."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Float32, Int

from sparsek_jax.nn.alternatives.chunkwise import add_to_states, scan_blocks
from sparsek_jax.nn.attention import SparseKAttention, float32_linear
from sparsek_jax.nn.cache import ScoredLinearCache
from sparsek_jax.nn.config import AttentionConfig
from sparsek_jax.nn.norms import make_norm
from sparsek_jax.ops.lifetimes import dropped_keys
from sparsek_jax.ops.products import einsum_f32
from sparsek_jax.ops.selection import document_bounds
from sparsek_jax.ops.tracing import varying_like

# Tokens of a block, of which all pairs are computed.
_BLOCK = 256


class SparseKLinearAttention(SparseKAttention):
    """SparseK attention, and linear attention to the keys that were dropped, through a gate.

    The dropped keys D of a query are those of its document that it does not attend to any more:
    they have left the window and are not selected. Linear attention (Katharopoulos et al. 2020,
    arXiv 2006.16236) takes a mean of their values, with `phi(x) = elu(x) + 1`:
    `o_t = sum_D phi(q_t).phi(k_j) v_j / sum_D phi(q_t).phi(k_j)`, zero where D is empty. The mean
    is normalised per query head (RMSNorm), multiplied by a gate of that head, the sigmoid of a
    projection of the hidden state, and added to SparseK's output.

    A dropped key never returns, so that each is added to a sum once, when it is dropped. Keys are
    not gated in the sum, and which they are passes no gradient: the scorer learns from SparseK's
    output alone. Queries and keys are rotated, as SparseK needs them to be.

    The paper combines SparseK with linear attention (arXiv 2406.16747); its exact form was not at
    hand, so that this is a reading of it.

    Its initialiser takes the arguments of `Attention`.
    """

    has_memory = False

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
        self.gates = float32_linear(d_model, config.num_heads, rngs=rngs)
        self.linear_norm = make_norm("rmsnorm", config.head_dim, norm_eps, rngs=rngs)

    def mix(self, x, query, key, value, segment_ids, sharding, layer):
        """Returns attention output `[B, T, N, H]` and scores `[B, T, K or 1]`."""
        (out, linear), scores = super().mix(x, query, key, value, segment_ids, sharding, layer)
        return out + self._gated(x, linear), scores

    def attend(self, query, key, value, scores, segment_ids):
        """Returns the outputs of SparseK and of linear attention, both `[B, T, N, H]`."""
        out, until = super().attend(query, key, value, scores, segment_ids, return_until=True)
        batch, length, num_kv_heads, head_dim = key.shape
        start, end = document_bounds(segment_ids, batch, length)
        index = dropped_keys(until, end)
        index = varying_like(jnp.broadcast_to(index, key.shape[:3]), key)
        key, value = (rows_or_zero(array, index) for array in (key, value))
        state = jnp.zeros((batch, num_kv_heads, head_dim, head_dim + 1))
        linear, _ = linear_attention(query, key, value, index < length, start=start, state=state)
        return out, linear

    def mix_next(self, x, query, key, value, cache, positions, num_tokens, layer):
        """Returns the extended cache and attention output `[B, C, N, H]`."""
        norm, scores = self.score_next(x, key, cache.norm, positions, num_tokens, layer)
        sparsek, out, dropped = self.attend_next(
            cache.sparsek, query, key, value, scores, num_tokens, return_dropped=True
        )
        # The document began before.
        start = jnp.full(x.shape[:2], -1, jnp.int32)
        linear, state = linear_attention(query, *dropped, start=start, state=cache.state)
        return ScoredLinearCache(sparsek, norm, state), out + self._gated(x, linear)

    def init_cache(self, batch_size, *, max_length=None, support_size=None) -> ScoredLinearCache:
        """Makes an empty cache of constant size."""
        cache = super().init_cache(batch_size, max_length=max_length, support_size=support_size)
        num_kv_heads, head_dim = self.config.num_kv_heads, self.config.head_dim
        state = jnp.zeros((batch_size, num_kv_heads, head_dim, head_dim + 1))
        return ScoredLinearCache(cache.sparsek, cache.norm, state)

    def _gated(self, x, linear):
        gate = jax.nn.sigmoid(self.gates(x))[..., None]
        return (self.linear_norm(linear) * gate).astype(self.dtype)


def linear_attention(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B T K H"],
    value: Float[Array, "B T K H"],
    exists: Bool[Array, "B T K"],
    *,
    start: Int[Array, "B T"],
    state: Float32[Array, "B K H H+1"],
) -> tuple[Float32[Array, "B T N H"], Float32[Array, "B K H H+1"]]:
    """Normalised causal linear attention in the chunkwise form, in time and memory linear in T.

    Args:
      query: Queries.
      key: In row t the key that query t and later ones of its document attend to.
      value: Its value.
      exists: Whether there is one; elsewhere keys and values are finite, and without effect.
      start: First row of every row's document; -1 for the document that `state` is of.
      state: What came before: for every KV head the sum of the outer products of key features and
        values, to which a column of ones is added.

    Returns:
      The output, zero where there is no key, and the state after the last row.
    """
    num_heads, head_dim = query.shape[2:]
    size = min(_BLOCK, key.shape[1])

    def attend(state, query, key, value, exists, start, rows):
        reading = _features(query).reshape(*key.shape[:4], -1, head_dim)
        written = jnp.where(exists[..., None], _features(key), 0.0)
        ones = jnp.ones((*value.shape[:4], 1))
        value = jnp.concatenate([value.astype(jnp.float32), ones], axis=-1)
        first, last = rows[:, :, :1], start[:, :, -1:]
        adds = jnp.where((rows >= last)[..., None, None], written, 0.0)
        added = einsum_f32("bsjkh,bsjkv->bskhv", adds, value)
        left = jnp.where(last < first, 1.0, 0.0)[..., None, None]
        before, state = add_to_states(left, added, state)
        reaches = (start < first)[..., None, None, None]
        past = einsum_f32("bsckgh,bskhv->bsckgv", jnp.where(reaches, reading, 0.0), before)
        weights = einsum_f32("bsckgh,bsjkh->bskgcj", reading, written)
        earlier = rows[:, :, None]
        seen = (earlier <= rows[..., None]) & (earlier >= start[..., None])
        weights = jnp.where(seen[:, :, None, None], weights, 0.0)
        sums = past + einsum_f32("bskgcj,bsjkv->bsckgv", weights, value)
        total = sums[..., -1:]
        # Without any key all sums are zero, and so is the output.
        out = sums[..., :-1] / jnp.where(total > 0, total, 1.0)
        return state, out.reshape(query.shape)

    arrays = (query, key, value, exists)
    return scan_blocks(attend, state, arrays, start, size, size * num_heads)


def _features(x):
    """elu(x) + 1 in float32, which keeps its digits where x is far below zero."""
    x = x.astype(jnp.float32)
    return jnp.where(x > 0, x + 1.0, jnp.exp(jnp.minimum(x, 0.0)))


def rows_or_zero(x: Float[Array, "B T K H"], row: Int[Array, "B T K"]) -> Float[Array, "B T K H"]:
    """`x[b, row[b, t, h], h]`, zeros where the row is T."""
    take = jax.vmap(lambda x, row: x.at[row].get(mode="fill", fill_value=0), 1, 1)
    return jax.vmap(take)(x, row)
