"""Attention layers: projections and rotary embedding around a way to mix values, and SparseK."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Float32, Int

from sparsek_jax.nn.cache import LayerCache, ScoredCache
from sparsek_jax.nn.checks import check_integers
from sparsek_jax.nn.config import AttentionConfig
from sparsek_jax.nn.memory import LayerMemory
from sparsek_jax.nn.norms import TimestepState, make_norm
from sparsek_jax.nn.rotary import (
    apply_rotary,
    document_positions,
    rotary_frequencies,
)
from sparsek_jax.nn.scorer import ScoringNetwork
from sparsek_jax.nn.sharding import split_over_rows_and_heads
from sparsek_jax.ops import SparseKCache, extend_cache, init_cache, sparsek_attention
from sparsek_jax.ops.cache import default_support_size
from sparsek_jax.ops.checks import check_array, check_int
from sparsek_jax.ops.gating import Gating
from sparsek_jax.ops.memory import attend_after, goes_on, init_memory


def float32_linear(inputs: int, outputs: int, *, rngs: nnx.Rngs, **kwargs) -> nnx.Linear:
    """Makes a projection without bias that is computed in full float32, as small ones can be.

    Args:
      inputs: Channels of its input.
      outputs: Channels of its output.
      rngs: Source of the initial weights.
      **kwargs: Of `nnx.Linear`.
    """
    return nnx.Linear(
        inputs,
        outputs,
        use_bias=False,
        dtype=jnp.float32,
        precision=jax.lax.Precision.HIGHEST,
        rngs=rngs,
        **kwargs,
    )


class Attention(nnx.Module):
    """Query, key, value and output projections around `mix`, which the kinds define.

    All kinds have the same parameters under the same names; some have others in addition.

    Attributes:
      needs_room: Whether generation remembers all tokens, for which there must be room.
      has_memory: Whether a row can go on from the row before, by `resume`.
    """

    needs_room = False
    has_memory = False

    def __init__(
        self,
        config: AttentionConfig,
        d_model: int,
        *,
        out_init: nnx.Initializer | None = None,
        norm_eps: float = 1e-6,
        dtype: jnp.dtype = jnp.float32,
        rngs: nnx.Rngs,
    ):
        """Initialises the layer.

        Args:
          config: Heads, selection and options.
          d_model: Width of input and output.
          out_init: Initialiser of the output projection's kernel.
          norm_eps: Epsilon of the QK norm.
          dtype: Of the activations; parameters are float32.
          rngs: Source of the initial weights.

        Raises:
          TypeError: `d_model` is not an int.
          ValueError: It is out of range.
        """
        check_int("d_model", d_model, 1)
        self.config = config
        self.dtype = dtype
        query_dim = config.num_heads * config.head_dim
        kv_dim = config.num_kv_heads * config.head_dim
        init = nnx.initializers.lecun_normal()

        def linear(inputs, outputs, bias, kernel_init=init):
            return nnx.Linear(
                inputs,
                outputs,
                use_bias=bias,
                dtype=dtype,
                param_dtype=jnp.float32,
                kernel_init=kernel_init,
                rngs=rngs,
            )

        self.query = linear(d_model, query_dim, config.qkv_bias)
        self.key = linear(d_model, kv_dim, config.qkv_bias)
        self.value = linear(d_model, kv_dim, config.qkv_bias)
        self.out = linear(query_dim, d_model, config.out_bias, out_init or init)

        def head_norm():
            if not config.qk_norm:
                return None
            return make_norm("rmsnorm", config.head_dim, norm_eps, rngs=rngs)

        self.query_norm, self.key_norm = head_norm(), head_norm()

    def __call__(
        self,
        x: Float[Array, "B T D"],
        *,
        positions: Int[Array, "B T"] | None = None,
        segment_ids: Int[Array, "B T"] | None = None,
        sharding: jax.sharding.NamedSharding | None = None,
        layer: int | Int[Array, ""] = 0,
        return_scores: bool = False,
    ) -> Float[Array, "B T D"] | tuple[Float[Array, "B T D"], Float[Array, "B T K"] | None]:
        """Attends causally within documents.

        Args:
          x: Normalised hidden state, `[B, T, d_model]`.
          positions: Positions for the rotary embedding; by default they count from 0 in every
            document.
          segment_ids: Ids of packed documents (maximal runs of equal ids); None: one a row.
          sharding: Of x, as in `Decoder.hidden`.
          layer: Index in the decoder, on which random selection depends.
          return_scores: Also return the keys' learned scores.

        Returns:
          The output `[B, T, d_model]`; with `return_scores` also the keys' scores, float32
          `[B, T, K or 1]`, None for a kind without.

        Raises:
          TypeError: x is no floating-point array.
          ValueError: An argument has the wrong shape, or another one the wrong dtype.
        """
        self._check(x, positions, segment_ids)
        if positions is None:
            positions = document_positions(segment_ids, *x.shape[:2])
        query, key, value = self._project(x, positions)
        if x.size == 0:
            mixed, scores = self.mix_nothing(query)
        else:
            mixed, scores = self.mix(x, query, key, value, segment_ids, sharding, layer)
        out = self._merge(mixed)
        return (out, scores) if return_scores else out

    def resume(
        self,
        x: Float[Array, "B T D"],
        memory: LayerMemory,
        *,
        positions: Int[Array, "B T"],
        segment_ids: Int[Array, "B T"],
        sharding: jax.sharding.NamedSharding | None = None,
        layer: int | Int[Array, ""] = 0,
    ) -> tuple[LayerMemory, Float[Array, "B T D"], Float[Array, "B T K"] | None]:
        """Attends as a call does, from the first document of a row also to the rows before.

        Args:
          x: Normalised hidden state, `[B, T, d_model]`.
          memory: Of the rows before, as `init_memory` makes it.
          positions: The tokens' positions in their documents; where that of a row's first token is
            not 0 and the memory ends there, the row goes on from it.
          segment_ids: Ids of packed documents.
          sharding: As for a call.
          layer: As for a call.

        Returns:
          The memory of the last document of every row, the output, and the scores of the row's keys
          or None.

        Raises:
          TypeError: As for a call.
          ValueError: As for a call.
        """
        self._check(x, positions, segment_ids)
        heads = self._project(x, positions)
        if x.size == 0:
            mixed, scores = self.mix_nothing(heads[0])
        else:
            memory, mixed, scores = self.mix_after(
                memory, x, *heads, positions, segment_ids, sharding, layer
            )
        return memory, self._merge(mixed), scores

    def extend(
        self,
        x: Float[Array, "B C D"],
        cache: LayerCache,
        num_tokens: Int[Array, " B"],
        *,
        layer: int | Int[Array, ""] = 0,
    ) -> tuple[LayerCache, Float[Array, "B C D"]]:
        """Appends the next tokens of a document to what is remembered of it, and attends from them.

        Args:
          x: Normalised hidden state, `[B, C, d_model]`.
          cache: Of this layer, as `init_cache` makes it.
          num_tokens: How many of the C tokens each member of the batch appends, the first ones.
          layer: As for a call.

        Returns:
          The new cache and the output, meaningless for tokens that were not appended.

        Raises:
          TypeError: As for a call.
          ValueError: As for a call.
        """
        self._check(x)
        positions = cache.length[:, None] + jnp.arange(x.shape[1], dtype=jnp.int32)
        heads = self._project(x, positions)
        if x.size == 0:
            mixed, _ = self.mix_nothing(heads[0])
        else:
            cache, mixed = self.mix_next(x, *heads, cache, positions, num_tokens, layer)
        return cache, self._merge(mixed)

    def _check(self, x, positions=None, segment_ids=None):
        """Raises the errors of a call."""
        check_array("x", x, jnp.floating)
        d_model = self.query.in_features
        if x.ndim != 3 or x.shape[2] != d_model:
            raise ValueError(f"x has shape {x.shape}; expected [B, T, d_model={d_model}]")
        for name, array in (("positions", positions), ("segment_ids", segment_ids)):
            if array is not None:
                check_integers(name, array, x.shape[:2])

    def _project(self, x, positions):
        """Query, key and value heads, queries and keys rotated."""
        query, key, value = (self._heads(layer(x)) for layer in (self.query, self.key, self.value))
        if self.config.qk_norm:
            query, key = self.query_norm(query), self.key_norm(key)
        frequencies = rotary_frequencies(self.config)
        query, key = (
            apply_rotary(heads, positions, frequencies=frequencies).astype(self.dtype)
            for heads in (query, key)
        )
        return query, key, value

    def _heads(self, x):
        return x.reshape(*x.shape[:2], x.shape[2] // self.config.head_dim, self.config.head_dim)

    def _merge(self, mixed):
        return self.out(mixed.reshape(*mixed.shape[:2], self.out.in_features))

    def mix_nothing(
        self, query: Float[Array, "B T N H"]
    ) -> tuple[Float[Array, "B T N H"], Float32[Array, "B T K"] | None]:
        """Returns what `mix` does of no tokens, which kinds cannot cut into chunks or blocks."""
        return query, None

    def mix(
        self,
        x: Float[Array, "B T D"],
        query: Float[Array, "B T N H"],
        key: Float[Array, "B T K H"],
        value: Float[Array, "B T K H"],
        segment_ids: Int[Array, "B T"] | None,
        sharding: jax.sharding.NamedSharding | None,
        layer: int | Int[Array, ""],
    ) -> tuple[Float[Array, "B T N H"], Float[Array, "B T K"] | None]:
        """Returns attention output `[B, T, N, H]` and learned scores or None."""
        raise NotImplementedError

    def mix_after(
        self,
        memory: LayerMemory,
        x: Float[Array, "B T D"],
        query: Float[Array, "B T N H"],
        key: Float[Array, "B T K H"],
        value: Float[Array, "B T K H"],
        positions: Int[Array, "B T"],
        segment_ids: Int[Array, "B T"],
        sharding: jax.sharding.NamedSharding | None,
        layer: int | Int[Array, ""],
    ) -> tuple[LayerMemory, Float[Array, "B T N H"], Float[Array, "B T K"] | None]:
        """Returns the next memory, attention output `[B, T, N, H]` and learned scores or None."""
        raise NotImplementedError

    def mix_next(
        self,
        x: Float[Array, "B C D"],
        query: Float[Array, "B C N H"],
        key: Float[Array, "B C K H"],
        value: Float[Array, "B C K H"],
        cache: LayerCache,
        positions: Int[Array, "B C"],
        num_tokens: Int[Array, " B"],
        layer: int | Int[Array, ""],
    ) -> tuple[LayerCache, Float[Array, "B C N H"]]:
        """Returns the extended cache and attention output `[B, C, N, H]`."""
        raise NotImplementedError

    def init_cache(
        self, batch_size: int, *, max_length: int | None = None, support_size: int | None = None
    ) -> LayerCache:
        """Makes an empty cache.

        Args:
          batch_size: B.
          max_length: Most tokens that can be remembered, of kinds that need room.
          support_size: As in `sparsek_jax.init_cache`, for SparseK with soft gates.
        """
        raise NotImplementedError

    def init_memory(self, batch_size: int, *, support_size: int | None = None) -> LayerMemory:
        """Makes an empty memory.

        Args:
          batch_size: B.
          support_size: As in `Decoder.init_memory`.
        """
        raise NotImplementedError


class SelectiveAttention(Attention):
    """Attention over a sliding window and the k keys of the highest scores, which kinds define.

    Attributes:
      gating: As in `sparsek_attention`.
      shared_scores: Whether all KV heads have one score per token.
    """

    has_memory = True
    gating: Gating
    shared_scores: bool

    def score(
        self,
        x: Float[Array, "B T D"],
        key: Float[Array, "B T K H"],
        segment_ids: Int[Array, "B T"] | None,
        layer: int | Int[Array, ""],
    ) -> Float32[Array, "B T K"]:
        """Returns scores `[B, T, K or 1]` of whole rows."""
        raise NotImplementedError

    def score_next(
        self,
        x: Float[Array, "B C D"],
        key: Float[Array, "B C K H"],
        norm: TimestepState | None,
        positions: Int[Array, "B C"],
        num_tokens: Int[Array, " B"],
        layer: int | Int[Array, ""],
    ) -> tuple[TimestepState | None, Float32[Array, "B C K"]]:
        """Returns the cache's `norm` and scores `[B, C, K or 1]` of the next tokens."""
        raise NotImplementedError

    def score_after(
        self,
        memory: LayerMemory,
        x: Float[Array, "B T D"],
        key: Float[Array, "B T K H"],
        positions: Int[Array, "B T"],
        segment_ids: Int[Array, "B T"],
        layer: int | Int[Array, ""],
    ) -> tuple[TimestepState | None, Float32[Array, "B T K"]]:
        """Returns the memory's next `norm` and scores `[B, T, K or 1]` of whole rows."""
        raise NotImplementedError

    def mix(self, x, query, key, value, segment_ids, sharding, layer):
        """Returns attention output `[B, T, N, H]` and scores `[B, T, K or 1]`."""
        scores = self.score(x, key, segment_ids, layer)
        attend = self._attend_on(sharding, scores.shape[2], key.shape[2])
        return attend(query, key, value, scores, segment_ids), scores

    def mix_after(self, memory, x, query, key, value, positions, segment_ids, sharding, layer):
        """Returns the next memory, attention output `[B, T, N, H]` and scores `[B, T, K or 1]`."""
        norm, scores = self.score_after(memory, x, key, positions, segment_ids, layer)
        keys, out = attend_after(
            memory.keys,
            self._attend_on(sharding, scores.shape[2], key.shape[2]),
            query,
            key,
            value,
            scores,
            positions=positions,
            segment_ids=segment_ids,
        )
        return LayerMemory(keys, norm), out, scores

    def _attend_on(self, sharding, num_scores, num_kv_heads):
        """`attend` on the devices of a sharding."""
        if sharding is None or sharding.num_devices == 1:
            return self.attend
        # The compiler cannot split a GPU kernel.
        return split_over_rows_and_heads(self.attend, sharding, num_scores, num_kv_heads)

    def attend(
        self,
        query: Float[Array, "B T N H"],
        key: Float[Array, "B T K H"],
        value: Float[Array, "B T K H"],
        scores: Float32[Array, "B T K"],
        segment_ids: Int[Array, "B T"] | None,
        **options: bool,
    ) -> Float[Array, "B T N H"]:
        """Returns what `sparsek_attention` does with these options, by scores `[B, T, K or 1]`."""
        return sparsek_attention(
            query,
            key,
            value,
            scores,
            num_selected=self.config.num_selected,
            sliding_window=self.config.sliding_window,
            gating=self.gating,
            segment_ids=segment_ids,
            implementation=self.config.implementation,
            **options,
        )

    def mix_next(self, x, query, key, value, cache, positions, num_tokens, layer):
        """Returns the extended cache and attention output `[B, C, N, H]`."""
        norm, scores = self.score_next(x, key, cache.norm, positions, num_tokens, layer)
        sparsek, out = self.attend_next(cache.sparsek, query, key, value, scores, num_tokens)
        return ScoredCache(sparsek, norm), out

    def attend_next(
        self,
        cache: SparseKCache,
        query: Float[Array, "B C N H"],
        key: Float[Array, "B C K H"],
        value: Float[Array, "B C K H"],
        scores: Float32[Array, "B C K"],
        num_tokens: Int[Array, " B"],
        **options: bool,
    ) -> tuple[SparseKCache, Float[Array, "B C N H"]]:
        """Returns what `extend_cache` does with these options, by scores `[B, C, K or 1]`."""
        return extend_cache(
            cache,
            query,
            key,
            value,
            scores,
            num_tokens=num_tokens,
            implementation=self.config.implementation,
            **options,
        )

    def init_cache(self, batch_size, *, max_length=None, support_size=None) -> ScoredCache:
        """Makes an empty cache of constant size."""
        del max_length
        sparsek = init_cache(
            batch_size,
            num_kv_heads=self.config.num_kv_heads,
            head_dim=self.config.head_dim,
            num_selected=self.config.num_selected,
            sliding_window=self.config.sliding_window,
            gating=self.gating,
            shared_scores=self.shared_scores,
            support_size=support_size,
            dtype=self.dtype,
        )
        return ScoredCache(sparsek, None)

    def init_memory(self, batch_size, *, support_size=None) -> LayerMemory:
        """Makes an empty memory; without learned scores it needs no support."""
        memory = init_memory(
            batch_size,
            num_kv_heads=self.config.num_kv_heads,
            head_dim=self.config.head_dim,
            num_selected=self.config.num_selected,
            sliding_window=self.config.sliding_window,
            num_scores=1 if self.shared_scores else self.config.num_kv_heads,
            support_size=support_size or 0,
            dtype=self.dtype,
        )
        return LayerMemory(memory, None)


class SparseKAttention(SelectiveAttention):
    """Attention over a sliding window and the k keys that a learned score selects.

    Its initialiser takes the arguments of `Attention`.
    """

    def __init__(self, config: AttentionConfig, d_model: int, *, rngs: nnx.Rngs, **kwargs):
        super().__init__(config, d_model, rngs=rngs, **kwargs)
        self.gating, self.shared_scores = config.gating, config.shared_scores
        self.scorer = ScoringNetwork(
            d_model,
            1 if config.shared_scores else config.num_kv_heads,
            timestep_norm=config.timestep_norm,
            score_scale=config.score_scale,
            slope=config.slope,
            learned_slope=config.learned_slope,
            num_sinks=config.num_sinks,
            rngs=rngs,
        )

    def mix_nothing(self, query):
        """Returns attention output and scores of no tokens."""
        num_scores = 1 if self.shared_scores else self.config.num_kv_heads
        return query, jnp.zeros((*query.shape[:2], num_scores), jnp.float32)

    def score(self, x, key, segment_ids, layer):
        """Returns scores `[B, T, K or 1]` of whole rows."""
        del key, layer
        return self.scorer(x, segment_ids)

    def score_next(self, x, key, norm, positions, num_tokens, layer):
        """Returns the norm's state and scores `[B, C, K or 1]` of the next tokens."""
        del key, layer
        return self.scorer.extend(x, norm, positions=positions, num_tokens=num_tokens)

    def score_after(self, memory, x, key, positions, segment_ids, layer):
        """Returns the norm's state and scores `[B, T, K or 1]` of whole rows."""
        del key, layer
        return self.scorer.resume(
            x,
            memory.norm,
            positions=positions,
            segment_ids=segment_ids,
            goes_on=goes_on(memory.keys, positions),
        )

    def init_memory(self, batch_size, *, support_size=None) -> LayerMemory:
        """Makes an empty memory, by default with as large a support as a cache has."""
        if support_size is None:
            support_size = default_support_size(self.config.num_selected)
        memory = super().init_memory(batch_size, support_size=support_size)
        norm = self.scorer.norm
        return memory if norm is None else LayerMemory(memory.keys, norm.init_state(batch_size))

    def init_cache(self, batch_size, *, max_length=None, support_size=None) -> ScoredCache:
        """Makes an empty cache of constant size."""
        cache = super().init_cache(batch_size, max_length=max_length, support_size=support_size)
        norm = self.scorer.norm
        return cache if norm is None else ScoredCache(cache.sparsek, norm.init_state(batch_size))
