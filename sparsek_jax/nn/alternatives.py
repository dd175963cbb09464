"""What SparseK is compared with: layers of the same parameters without its scoring network.

Dense attention and a sliding window say what selection could gain at most and has to gain at least.
The others select, with SparseK's operator and cache, by scores that nobody has to learn: a scorer
is worth what it is better than these.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int

from sparsek_jax.nn.attention import Attention, SelectiveAttention, SparseKAttention
from sparsek_jax.nn.cache import (
    DenseCache,
    ScoredCache,
    WindowCache,
    extend_dense_cache,
    extend_window_cache,
    init_dense_cache,
    init_window_cache,
)
from sparsek_jax.nn.causal import dense_attention, window_attention
from sparsek_jax.nn.rotary import document_positions
from sparsek_jax.nn.scorer import keep_sinks, keep_sinks_next


class DenseAttention(Attention):
    """Attention over the whole document."""

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


class UnlearnedSelection(SelectiveAttention):
    """Attention over a sliding window and the k keys of the highest `importance`.

    The importance has no parameters and passes no gradient: keys are selected or not, without
    gates, whatever `config.gating` says of layers that learn to select.
    """

    gating = "straight_through"
    shared_scores = False

    def importance(
        self,
        key: Float[Array, "B T K H"],
        positions: Int[Array, "B T"],
        layer: int | Int[Array, ""],
    ) -> Float32[Array, "B T K"]:
        """Returns what the keys at these positions of their documents are worth."""
        raise NotImplementedError

    def score(self, x, key, segment_ids, layer):
        """Returns scores `[B, T, K or 1]` of whole rows."""
        positions = document_positions(segment_ids, *x.shape[:2])
        scores = jax.lax.stop_gradient(self.importance(key, positions, layer))
        return keep_sinks(scores, positions, self.config.num_sinks)

    def score_next(self, x, key, norm, positions, num_tokens, layer):
        """Returns None and scores `[B, C, K or 1]` of the next tokens."""
        del x, num_tokens
        scores = self.importance(key, positions, layer)
        return norm, keep_sinks_next(scores, positions, self.config.num_sinks)

    def mix(self, x, query, key, value, segment_ids, sharding, layer):
        """Returns attention output `[B, T, N, H]` and None."""
        out, _ = super().mix(x, query, key, value, segment_ids, sharding, layer)
        return out, None

    def init_cache(self, batch_size, *, max_length=None, support_size=None) -> ScoredCache:
        """Makes an empty cache of constant size."""
        del support_size
        return super().init_cache(batch_size, max_length=max_length)


class SinkAttention(UnlearnedSelection):
    """Attention over a sliding window and the first k tokens of the document.

    StreamingLLM (Xiao et al. 2023, arXiv 2309.17453), whose k is 4, the sinks. Keys keep the
    position they have in the text, where StreamingLLM counts positions within its cache to go
    beyond the context that the rotary embedding is made for.
    """

    shared_scores = True

    def importance(self, key, positions, layer):
        """Returns `[B, T, 1]`: the earlier, the more."""
        del key, layer
        return -positions[..., None].astype(jnp.float32)


class RandomAttention(UnlearnedSelection):
    """Attention over a sliding window and k random older keys.

    Every KV head of every layer has one uniform random number for each position of a document,
    always the same. So what is selected is a uniform sample of the pool from which keys only
    drop out, as SparseK's do: what selection is worth that knows nothing.
    """

    def importance(self, key, positions, layer):
        """Returns `[B, T, K]`, a function of layer, position and head only."""
        # Named, as the default generator is the user's choice and could change between runs.
        rng = jax.random.fold_in(jax.random.key(0, impl="threefry2x32"), layer)

        def draw(position):
            return jax.random.uniform(jax.random.fold_in(rng, position), key.shape[2:3])

        return jax.vmap(jax.vmap(draw))(positions)


class KeyNormAttention(UnlearnedSelection):
    """Attention over a sliding window and the k older keys of the lowest L2 norm.

    In trained decoders keys of low norm get much attention (Devoto et al. 2024, arXiv 2406.11430).
    In SmolLM2 they are nearly worth the first keys, and keys of high norm less than random ones
    (docs/pretrained.md). The norm is that of each KV head's key, which rotation does not change.
    """

    def importance(self, key, positions, layer):
        """Returns `[B, T, K]`: the shorter, the more."""
        del positions, layer
        return -jnp.linalg.norm(key.astype(jnp.float32), axis=-1)


LAYERS = {
    "sparsek": SparseKAttention,
    "dense": DenseAttention,
    "window": WindowAttention,
    "sinks": SinkAttention,
    "random": RandomAttention,
    "key_norm": KeyNormAttention,
}
