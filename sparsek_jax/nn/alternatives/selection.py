"""Selection by scores that nobody has to learn, with SparseK's operator and cache."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int, Key

from sparsek_jax.nn.attention import SelectiveAttention
from sparsek_jax.nn.cache import ScoredCache
from sparsek_jax.nn.memory import LayerMemory
from sparsek_jax.nn.rotary import document_positions
from sparsek_jax.nn.scorer import keep_sinks, keep_sinks_next


def layer_rng(layer: int | Int[Array, ""]) -> Key[Array, ""]:
    """Source of the random numbers that a layer always has."""
    # Named, as the default generator is the user's choice and could change between runs.
    return jax.random.fold_in(jax.random.key(0, impl="threefry2x32"), layer)


def uniform_numbers(
    layer: int | Int[Array, ""], *indices: Int[Array, "..."], num_heads: int
) -> Float32[Array, "... K"]:
    """Random numbers in [0, 1) that depend on layer, head and indices only.

    Args:
      layer: Index in the decoder.
      *indices: Arrays that broadcast together.
      num_heads: K.
    """
    rng = layer_rng(layer)

    def draw(*index):
        rng_of_index = functools.reduce(jax.random.fold_in, index, rng)
        return jax.random.uniform(rng_of_index, (num_heads,), jnp.float32)

    scalars = ",".join("()" for _ in indices)
    return jnp.vectorize(draw, signature=f"{scalars}->(k)")(*indices)


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

    def score_after(self, memory, x, key, positions, segment_ids, layer):
        """Returns None and scores `[B, T, K or 1]` of whole rows."""
        del memory, x, segment_ids
        scores = jax.lax.stop_gradient(self.importance(key, positions, layer))
        return None, keep_sinks_next(scores, positions, self.config.num_sinks)

    def mix(self, x, query, key, value, segment_ids, sharding, layer):
        """Returns attention output `[B, T, N, H]` and None."""
        out, _ = super().mix(x, query, key, value, segment_ids, sharding, layer)
        return out, None

    def mix_after(self, memory, x, query, key, value, positions, segment_ids, sharding, layer):
        """Returns the next memory, attention output `[B, T, N, H]` and None."""
        memory, out, _ = super().mix_after(
            memory, x, query, key, value, positions, segment_ids, sharding, layer
        )
        return memory, out, None

    def init_memory(self, batch_size, *, support_size=None) -> LayerMemory:
        """Makes an empty memory."""
        del support_size
        return super().init_memory(batch_size)

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
        return uniform_numbers(layer, positions, num_heads=key.shape[2])


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


class StridedAttention(UnlearnedSelection):
    """Attention over a sliding window and k older keys at equal distances.

    The "fixed" pattern of the Sparse Transformer (Child et al. 2019, arXiv 1904.10509), with a
    window instead of the query's own block: the last token of every block stands for it, for all
    later queries alike. There, blocks are of one size, about the root of the context. Here they
    have 1, 2, 4, ... tokens, the fewest with which no more than k are older than the window, so
    that there are k keys at any length; where k has room for more, the newest halves of blocks
    have their keys too. Blocks merge as the document grows: a key drops out for good, as SparseK's
    do.
    """

    shared_scores = True

    def importance(self, key, positions, layer):
        """Returns `[B, T, 1]`: the larger a block the key is the last of, and then the newer."""
        del key, layer
        number = positions[..., None] + 1
        size = number & -number
        # Exact in float32; of keys beyond so many tokens the older ones come first.
        newness = jnp.minimum(number, 2**23 - 1).astype(jnp.float32) / 2**23
        return size.astype(jnp.float32) * (1 + newness)
