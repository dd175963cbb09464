"""Dense attention and a sliding window: what selection can gain at most, has to gain at least."""

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

    def mix(self, x, query, key, value, segment_ids, sharding, layer):
        """Returns attention output `[B, T, N, H]` and None."""
        del x, sharding, layer
        out = window_attention(
            query,
            key,
            value,
            sliding_window=self.config.sliding_window,
            segment_ids=segment_ids,
        )
        return out, None

    def mix_next(self, x, query, key, value, cache, positions, num_tokens, layer):
        """Returns the extended cache and attention output `[B, C, N, H]`."""
        del x, positions, layer
        return extend_window_cache(cache, query, key, value, num_tokens)

    def init_cache(self, batch_size, *, max_length=None, support_size=None) -> WindowCache:
        """Makes an empty cache of constant size."""
        del max_length, support_size
        return init_window_cache(batch_size, self.config, self.dtype)
