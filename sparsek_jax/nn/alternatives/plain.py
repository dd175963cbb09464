"""Dense attention and a sliding window: what selection can gain at most, has to gain at least."""

import jax.numpy as jnp

from sparsek_jax.nn.attention import Attention
from sparsek_jax.nn.cache import (
    DenseCache,
    WindowCache,
    extend_dense_cache,
    extend_window_cache,
    init_dense_cache,
    init_window_cache,
)
from sparsek_jax.nn.causal import dense_attention, window_attention
from sparsek_jax.nn.memory import LayerMemory
from sparsek_jax.ops.memory import attend_after, init_memory


class DenseAttention(Attention):
    """Attention over the whole document."""

    needs_room = True

    def mix(self, x, query, key, value, segment_ids, sharding, layer):
        """Returns attention output `[B, T, N, H]` and None."""
        del x, sharding, layer
        return dense_attention(query, key, value, segment_ids=segment_ids), None

    def mix_next(self, x, query, key, value, cache, positions, num_tokens, layer):
        """Returns the extended cache and attention output `[B, C, N, H]`, NaN beyond its room."""
        del x, positions, layer
        return extend_dense_cache(cache, query, key, value, num_tokens)

    def init_cache(self, batch_size, *, max_length=None, support_size=None) -> DenseCache:
        """Makes an empty cache with room for `max_length` tokens."""
        del support_size
        return init_dense_cache(batch_size, max_length, self.config, self.dtype)


class WindowAttention(Attention):
    """Attention over a sliding window."""

    has_memory = True

    def mix(self, x, query, key, value, segment_ids, sharding, layer):
        """Returns attention output `[B, T, N, H]` and None."""
        del x, sharding, layer
        return self._attend(query, key, value, None, segment_ids), None

    def mix_after(self, memory, x, query, key, value, positions, segment_ids, sharding, layer):
        """Returns the next memory, attention output `[B, T, N, H]` and None."""
        del x, sharding, layer
        scores = jnp.zeros((*query.shape[:2], 1), jnp.float32)
        keys, out = attend_after(
            memory.keys,
            self._attend,
            query,
            key,
            value,
            scores,
            positions=positions,
            segment_ids=segment_ids,
        )
        return LayerMemory(keys, None), out, None

    def _attend(self, query, key, value, scores, segment_ids):
        del scores
        return window_attention(
            query,
            key,
            value,
            sliding_window=self.config.sliding_window,
            segment_ids=segment_ids,
        )

    def init_memory(self, batch_size, *, support_size=None) -> LayerMemory:
        """Makes an empty memory of a window."""
        del support_size
        memory = init_memory(
            batch_size,
            num_kv_heads=self.config.num_kv_heads,
            head_dim=self.config.head_dim,
            num_selected=0,
            sliding_window=self.config.sliding_window,
            num_scores=1,
            support_size=0,
            dtype=self.dtype,
        )
        return LayerMemory(memory, None)

    def mix_next(self, x, query, key, value, cache, positions, num_tokens, layer):
        """Returns the extended cache and attention output `[B, C, N, H]`."""
        del x, positions, layer
        return extend_window_cache(cache, query, key, value, num_tokens)

    def init_cache(self, batch_size, *, max_length=None, support_size=None) -> WindowCache:
        """Makes an empty cache of constant size."""
        del max_length, support_size
        return init_window_cache(batch_size, self.config, self.dtype)
