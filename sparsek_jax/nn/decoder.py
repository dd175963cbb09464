"""A decoder-only language model with any mix of attention kinds."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Float32, Int

from sparsek_jax.nn.alternatives import LAYERS
from sparsek_jax.nn.cache import DecoderCache, LayerCache, check_room
from sparsek_jax.nn.checks import check_integers
from sparsek_jax.nn.config import DecoderConfig
from sparsek_jax.nn.memory import DecoderMemory, LayerMemory
from sparsek_jax.nn.norms import make_norm
from sparsek_jax.nn.rotary import document_positions
from sparsek_jax.ops.cache import checked_num_tokens
from sparsek_jax.ops.products import einsum_f32


class MLP(nnx.Module):
    """SwiGLU (Shazeer 2020, arXiv 2002.05202) or GELU."""

    def __init__(self, config: DecoderConfig, *, out_init: nnx.Initializer, rngs: nnx.Rngs):
        def linear(inputs, outputs, init):
            return nnx.Linear(
                inputs,
                outputs,
                use_bias=config.mlp_bias,
                dtype=jnp.dtype(config.dtype),
                param_dtype=jnp.float32,
                kernel_init=init,
                rngs=rngs,
            )

        init = nnx.initializers.lecun_normal()
        gated = config.activation == "swiglu"
        self.gate = linear(config.d_model, config.mlp_dim, init) if gated else None
        self.up = linear(config.d_model, config.mlp_dim, init)
        self.down = linear(config.mlp_dim, config.d_model, out_init)

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """Transforms every position by itself."""
        if self.gate is None:
            return self.down(jax.nn.gelu(self.up(x), approximate=False))
        return self.down(jax.nn.silu(self.gate(x)) * self.up(x))


class Block(nnx.Module):
    """Pre-norm attention and MLP, each added to the residual stream."""

    def __init__(self, config: DecoderConfig, kind: str, *, rngs: nnx.Rngs):
        # The residual stream sums 2 x num_layers outputs; each starts with its share of variance.
        out_init = nnx.initializers.variance_scaling(
            1 / (2 * config.num_layers), "fan_in", "truncated_normal"
        )
        self.parallel_residual = config.parallel_residual
        norm = functools.partial(make_norm, config.norm, config.d_model, config.norm_eps, rngs=rngs)
        self.attention_norm = norm()
        self.attention = LAYERS[kind](
            config.attention,
            config.d_model,
            out_init=out_init,
            norm_eps=config.norm_eps,
            dtype=jnp.dtype(config.dtype),
            rngs=rngs,
        )
        self.mlp_norm = norm()
        self.mlp = MLP(config, out_init=out_init, rngs=rngs)

    def __call__(
        self,
        x: Float[Array, "B T D"],
        memory: LayerMemory | None = None,
        *,
        positions: Int[Array, "B T"],
        segment_ids: Int[Array, "B T"] | None,
        sharding: jax.sharding.NamedSharding | None,
        layer: int | Int[Array, ""],
    ) -> tuple[Float[Array, "B T D"], Float[Array, "B T K"] | None, LayerMemory | None]:
        """Returns the new residual stream, the scores if any are learned, and the next memory."""
        normalised = self.attention_norm(x).astype(x.dtype)
        options = {"positions": positions, "segment_ids": segment_ids}
        options |= {"sharding": sharding, "layer": layer}
        if memory is None:
            attended, scores = self.attention(normalised, **options, return_scores=True)
        else:
            memory, attended, scores = self.attention.resume(normalised, memory, **options)
        return self._residual(x, attended), scores, memory

    def extend(
        self,
        x: Float[Array, "B C D"],
        cache: LayerCache,
        num_tokens: Int[Array, " B"],
        layer: int | Int[Array, ""],
    ) -> tuple[LayerCache, Float[Array, "B C D"]]:
        """Returns the attention's cache with these tokens appended, and the residual stream."""
        normalised = self.attention_norm(x).astype(x.dtype)
        cache, attended = self.attention.extend(normalised, cache, num_tokens, layer=layer)
        return cache, self._residual(x, attended)

    def _residual(self, x, attended):
        mlp_input = x if self.parallel_residual else x + attended
        update = self.mlp(self.mlp_norm(mlp_input).astype(x.dtype))
        return x + attended + update


class Decoder(nnx.Module):
    """Embedding, blocks, final norm and output projection.

    Layer i is `layers[i]`. With `scan_layers`, `layers[j]` holds the stacked parameters of the
    layers j, j + p, j + 2p, ... where p is the length of the attention pattern, or 1.
    """

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs):
        """Initialises the model with the `params` stream of `rngs`."""
        self.config = config
        init = nnx.initializers.normal(0.02)
        shape = (config.vocab_size, config.d_model)
        self.embedding = nnx.Param(init(rngs.params(), shape, jnp.float32))

        def block(kind):
            return lambda rngs: Block(config, kind, rngs=rngs)

        if config.scan_layers:
            repeats = config.num_layers // config.period

            def stacked(kind):
                return nnx.vmap(block(kind))(rngs.split(repeats))

            kinds = [config.attention.layer_kind(i) for i in range(config.period)]
            self.layers = nnx.List([stacked(kind) for kind in kinds])
        else:
            kinds = [config.attention.layer_kind(i) for i in range(config.num_layers)]
            self.layers = nnx.List([block(kind)(rngs) for kind in kinds])
        self.final_norm = make_norm(config.norm, config.d_model, config.norm_eps, rngs=rngs)
        self.output = (
            None if config.tie_embeddings else nnx.Param(init(rngs.params(), shape, jnp.float32))
        )

    def __call__(
        self,
        tokens: Int[Array, "B T"],
        *,
        positions: Int[Array, "B T"] | None = None,
        segment_ids: Int[Array, "B T"] | None = None,
    ) -> Float32[Array, "B T V"]:
        """Logits of the next token at every position; arguments as `hidden`."""
        return self.logits(self.hidden(tokens, positions=positions, segment_ids=segment_ids))

    def logits(self, hidden: Float[Array, "... D"]) -> Float32[Array, "... V"]:
        """Output projection of hidden states, accumulated in float32."""
        return output_logits(self.output_table, hidden)

    @property
    def output_table(self) -> Float32[Array, "V D"]:
        """The output projection."""
        return (self.embedding if self.output is None else self.output)[...]

    def hidden(
        self,
        tokens: Int[Array, "B T"],
        *,
        positions: Int[Array, "B T"] | None = None,
        segment_ids: Int[Array, "B T"] | None = None,
        sharding: jax.sharding.NamedSharding | None = None,
        return_scores: bool = False,
    ) -> Float[Array, "B T D"] | tuple[Float[Array, "B T D"], dict[int, Float32[Array, "B T K"]]]:
        """Hidden states after the final norm.

        Args:
          tokens: Token ids, `[B, T]`.
          positions: Positions for the rotary embedding; by default they count from 0 in every
            document.
          segment_ids: Ids of packed documents (maximal runs of equal ids); None: one a row.
          sharding: Of the residual stream, rows over some axes of a mesh, before and after every
            block; SparseK's heads are split over the other axes. None leaves it to the compiler,
            which may gather a batch where it should gather weights, and cannot split GPU kernels.
          return_scores: Also return the scores of every SparseK layer by its index.

        Returns:
          `[B, T, d_model]` in the config's dtype; with `return_scores` also the dict of float32
          `[B, T, K or 1]`.

        Raises:
          ValueError: An argument has the wrong shape or dtype.
        """
        check_integers("tokens", tokens, None)
        if segment_ids is not None:
            check_integers("segment_ids", segment_ids, tokens.shape)
        if positions is None:
            positions = document_positions(segment_ids, *tokens.shape)
        memory = (None,) * self.config.num_layers
        _, x, scores = self._through_layers(memory, tokens, positions, segment_ids, sharding)
        return (x, scores) if return_scores else x

    def init_memory(self, batch_size: int, *, support_size: int | None = None) -> DecoderMemory:
        """Makes an empty memory, to read documents in rows with `resume`.

        Args:
          batch_size: B.
          support_size: How many scores of dropped keys SparseK layers remember per score head; by
            default as many as a cache.

        Raises:
          NotImplementedError: A layer's kind of attention has no memory.
        """
        return tuple(
            self.layers[i % len(self.layers)].attention.init_memory(
                batch_size, support_size=support_size
            )
            for i in range(self.config.num_layers)
        )

    def resume(
        self,
        tokens: Int[Array, "B T"],
        memory: DecoderMemory,
        *,
        positions: Int[Array, "B T"],
        segment_ids: Int[Array, "B T"],
        sharding: jax.sharding.NamedSharding | None = None,
    ) -> tuple[DecoderMemory, Float[Array, "B T D"], dict[int, Float32[Array, "B T K"]]]:
        """Hidden states of rows of documents that go on from the rows before.

        They are those of whole documents, up to rounding, as long as SparseK's supports suffice.

        Args:
          tokens: Token ids, `[B, T]`.
          memory: Of the rows before.
          positions: In the documents. Where a row begins with the position that its memory ends at,
            its first document is the last one of the row before.
          segment_ids: Ids of packed documents (maximal runs of equal ids).
          sharding: As in `hidden`.

        Returns:
          The memory of every row's last document, and what `hidden` returns with `return_scores`.

        Raises:
          ValueError: An argument has the wrong shape or dtype.
        """
        check_integers("tokens", tokens, None)
        check_integers("segment_ids", segment_ids, tokens.shape)
        return self._through_layers(memory, tokens, positions, segment_ids, sharding)

    def _through_layers(self, memory, tokens, positions, segment_ids, sharding):
        """The next memory (a tuple of None where there is none), hidden states, and scores."""
        check_integers("positions", positions, tokens.shape)
        x = self._embed(tokens)
        if sharding is not None:
            x = jax.lax.with_sharding_constraint(x, sharding)
        splits = [nnx.split(layer) for layer in self.layers]
        blocks = [
            _rematerialised(
                functools.partial(
                    _apply,
                    graphdef,
                    positions=positions,
                    segment_ids=segment_ids,
                    sharding=sharding,
                ),
                self.config,
            )
            for graphdef, _ in splits
        ]
        states = [state for _, state in splits]
        scores = {}
        if self.config.scan_layers:

            def repetition(x, inputs):
                states, memories, first = inputs
                scores, after = [], []
                zipped = zip(blocks, states, memories, strict=True)
                for offset, (block, state, before) in enumerate(zipped):
                    x, block_scores, block_memory = block(state, x, before, layer=first + offset)
                    scores.append(block_scores)
                    after.append(block_memory)
                return x, (scores, after)

            period = len(blocks)
            memories = [_stacked(memory[offset::period]) for offset in range(period)]
            inputs = (states, memories, self._first_layers())
            x, (stacked, memories) = jax.lax.scan(repetition, x, inputs)
            for offset, block_scores in enumerate(stacked):
                if block_scores is not None:
                    indices = range(offset, self.config.num_layers, period)
                    scores |= dict(zip(indices, block_scores, strict=True))
            memory = _unstacked(memories, self.config.num_layers)
        else:
            memories = []
            zipped = zip(blocks, states, memory, strict=True)
            for i, (block, state, before) in enumerate(zipped):
                x, block_scores, block_memory = block(state, x, before, layer=i)
                memories.append(block_memory)
                if block_scores is not None:
                    scores[i] = block_scores
            memory = tuple(memories)
        x = self.final_norm(x).astype(self.config.dtype)
        return memory, x, dict(sorted(scores.items()))

    def _embed(self, tokens):
        # `take` makes an id outside the vocabulary NaN; an index would be clamped.
        return jnp.take(self.embedding[...], tokens, axis=0).astype(self.config.dtype)

    def init_cache(
        self, batch_size: int, *, max_length: int | None = None, support_size: int | None = None
    ) -> DecoderCache:
        """Makes an empty cache, to generate with.

        Args:
          batch_size: B.
          max_length: Most tokens of layers that need room for all, as those with dense attention.
            Needed if there are any; all other layers remember a constant number for as long as it
            takes.
          support_size: As in `sparsek_jax.init_cache`, for SparseK layers with soft gates.

        Raises:
          TypeError: An argument is not an int.
          ValueError: An argument is out of range or missing.
        """
        return DecoderCache(
            tuple(
                self.layers[i % len(self.layers)].attention.init_cache(
                    batch_size, max_length=max_length, support_size=support_size
                )
                for i in range(self.config.num_layers)
            )
        )

    def extend(
        self,
        tokens: Int[Array, "B C"],
        cache: DecoderCache,
        *,
        num_tokens: Int[Array, " B"] | None = None,
    ) -> tuple[DecoderCache, Float[Array, "B C D"]]:
        """Appends the next C tokens of every member of the batch.

        However a text is cut into calls, the hidden states are those of one call of `hidden` with
        all of it, up to rounding. (Where SparseK's support has lost scores, approximately.)

        Args:
          tokens: Token ids, `[B, C]`, C at least 1.
          cache: What came before. A jit that replaces it should donate it.
          num_tokens: How many of the C tokens each member appends, the first ones; 0 to C, all by
            default. What stands behind them must be ids all the same.

        Returns:
          The new cache, and the hidden states after the final norm, `[B, C, d_model]` in the
          config's dtype. They are meaningless for tokens that were not appended, and NaN where a
          layer that needs room has run out of room while tracing hid the lengths.

        Raises:
          TypeError: `num_tokens` does not hold integers.
          ValueError: An argument has the wrong shape, dtype or value, or the cache has no room.
        """
        check_integers("tokens", tokens, None)
        batch, size = tokens.shape
        if size == 0:
            raise ValueError(f"tokens has shape {tokens.shape}; expected C of at least 1")
        (rows,) = cache.length.shape
        if batch != rows:
            raise ValueError(f"tokens has shape {tokens.shape}; expected the cache's {rows} rows")
        num_tokens = checked_num_tokens(num_tokens, batch, size)
        check_room(cache, num_tokens)
        x = self._embed(tokens)
        if self.config.scan_layers and size > 1:
            layers, x = self._scan_with_caches(x, cache.layers, num_tokens)
        else:
            # One token at a time the caches would be copied whole to be stacked.
            layers = []
            for i, layer_cache in enumerate(cache.layers):
                layer_cache, x = self._layer(i).extend(x, layer_cache, num_tokens, i)
                layers.append(layer_cache)
        return DecoderCache(tuple(layers)), self.final_norm(x).astype(self.config.dtype)

    def unstacked(self) -> "Decoder":
        """The same model with the parameters of every layer by themselves.

        A loop over tokens is best compiled for such a model, made outside of the loop: otherwise
        every token copies all parameters out of their stacks.
        """
        config = dataclasses.replace(self.config, scan_layers=False)
        model = nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0)))
        model.layers = nnx.List([self._layer(i) for i in range(config.num_layers)])
        model.embedding, model.output = self.embedding, self.output
        model.final_norm = self.final_norm
        return model

    def _layer(self, index):
        if not self.config.scan_layers:
            return self.layers[index]
        repeat, offset = divmod(index, len(self.layers))
        graphdef, state = nnx.split(self.layers[offset])
        return nnx.merge(graphdef, jax.tree.map(lambda x: x[repeat], state))

    def _first_layers(self):
        """Of every repetition of the pattern, the index of its first layer."""
        return jnp.arange(0, self.config.num_layers, len(self.layers))

    def _scan_with_caches(self, x, caches, num_tokens):
        period = len(self.layers)
        splits = [nnx.split(layer) for layer in self.layers]

        def repetition(x, inputs):
            stacked, first = inputs
            extended = []
            for offset, (block, _) in enumerate(splits):
                state, cache = stacked[offset]
                cache, x = nnx.merge(block, state).extend(x, cache, num_tokens, first + offset)
                extended.append(cache)
            return x, extended

        stacked = [
            (state, _stacked(caches[offset::period])) for offset, (_, state) in enumerate(splits)
        ]
        x, extended = jax.lax.scan(repetition, x, (stacked, self._first_layers()))
        return _unstacked(extended, len(caches)), x


def output_logits(
    table: Float[Array, "V D"], hidden: Float[Array, "... D"]
) -> Float32[Array, "... V"]:
    """Products of hidden states with every row of the table, in hidden's precision."""
    return einsum_f32("...d,vd->...v", hidden, table.astype(hidden.dtype))


def _stacked(layers):
    """One tree for layers that are scanned over."""
    return jax.tree.map(lambda *x: jnp.stack(x), *layers)


def _unstacked(stacks, num_layers):
    """The trees of all layers, by layer, of a stack for each kind in the pattern."""
    period = len(stacks)
    return tuple(
        jax.tree.map(lambda x, i=i: x[i // period], stacks[i % period]) for i in range(num_layers)
    )


def _apply(graphdef, state, x, memory, *, layer, positions, segment_ids, sharding):
    block = nnx.merge(graphdef, state)
    x, scores, memory = block(
        x, memory, positions=positions, segment_ids=segment_ids, sharding=sharding, layer=layer
    )
    if sharding is not None:
        x = jax.lax.with_sharding_constraint(x, sharding)
    return x, scores, memory


def _rematerialised(function, config: DecoderConfig):
    if config.remat == "none":
        return function
    policies = jax.checkpoint_policies
    policy = {"full": None, "dots": policies.dots_with_no_batch_dims_saveable}[config.remat]
    # In a scan, forward and backward are separate loops that XLA cannot merge in any case.
    return jax.checkpoint(function, policy=policy, prevent_cse=not config.scan_layers)
