"""A decoder that writes: prompts in chunks into the cache, then tokens in blocks out of it.

Three programs are compiled for a batch size, one for each of the two sizes of chunks and one for
blocks of any number of tokens. They serve texts of every length. Layers that remember all
tokens, as those of dense attention, need room that is known in advance; another amount of room
takes other programs.
"""

from __future__ import annotations

import array
import dataclasses
import functools
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Float, Int32

from sparsek_jax.data import Tokenizer
from sparsek_jax.generation.sampling import Sampling, choose_tokens, token_keys
from sparsek_jax.generation.statistics import Statistics
from sparsek_jax.generation.text import TextStream
from sparsek_jax.nn import Decoder
from sparsek_jax.nn.alternatives import LAYERS
from sparsek_jax.nn.cache import DecoderCache

# Room for all tokens is made in steps, so that texts of similar length share programs.
_ROOM_STEP = 256
# Tokens before a text that its first token is decoded with.
_NUM_CONTEXT = 8


class NonFiniteLogitsError(ValueError):
    """The model gave NaN or infinite logits, from which no token can be chosen."""


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["cache", "hidden"], meta_fields=[]
)
@dataclasses.dataclass(frozen=True)
class State:
    """What the next token is computed from.

    Attributes:
      cache: The tokens so far.
      hidden: Hidden state of every row's newest token.
    """

    cache: DecoderCache
    hidden: Float[Array, "B D"]


@dataclasses.dataclass(frozen=True)
class Snapshot:
    """A session's rows at one time.

    Attributes:
      state: A copy of the device's part.
      lengths: Tokens of every row.
    """

    state: State
    lengths: np.ndarray


Reason = Literal["eos", "stop", "length", "cancelled"]


@dataclasses.dataclass(frozen=True)
class Completion:
    """What was written after one row's text.

    Attributes:
      text: Without the end-of-document token or the stop string.
      num_tokens: Tokens chosen, including the one that ended the text.
      reason: What ended it: the end of the document ("eos"), a stop string, the number of tokens
        ("length"), or the caller ("cancelled").
    """

    text: str
    num_tokens: int
    reason: Reason


class Engine:
    """A decoder and its tokenizer, ready to write; holds what was compiled.

    The model may lie on one device or, with its parameters sharded, on a mesh. There the cache and
    all that is small is replicated.
    """

    def __init__(
        self,
        model: Decoder,
        tokenizer: Tokenizer,
        *,
        chunk_sizes: tuple[int, int] = (64, 1024),
        block_size: int = 32,
    ):
        """Compiles nothing yet.

        Args:
          model: The language model.
          tokenizer: The one it was trained with.
          chunk_sizes: Tokens of each row that are appended at a time: where that is enough for the
            whole text, and otherwise. A text takes chunks of one size, since filling up the last
            one is nothing beside compiling for another.
          block_size: Most tokens of each row that are chosen before text is looked at.
        """
        graphdef, self._params = nnx.split(model)
        self.model_config, self.tokenizer = model.config, tokenizer
        self._small, self._large = chunk_sizes
        self.block_size = block_size
        sharding = jax.tree.leaves(self._params)[0].sharding
        if isinstance(sharding, NamedSharding):
            sharding = NamedSharding(sharding.mesh, PartitionSpec())
        jit = functools.partial(jax.jit, out_shardings=sharding)
        self._init = jit(
            functools.partial(_init, graphdef), static_argnames=("batch_size", "max_length")
        )
        self._copy = jit(lambda state: jax.tree.map(jnp.copy, state))
        self._prefill = jit(functools.partial(_prefill, graphdef), donate_argnames="state")
        self._decode = jit(
            functools.partial(
                _decode,
                graphdef,
                vocab_size=tokenizer.vocab_size,
                eos_id=tokenizer.eos_id,
                block_size=block_size,
            ),
            donate_argnames="state",
        )
        self._compiled = {}

    @property
    def needs_room(self) -> bool:
        """Whether there are layers that remember all tokens, whose cache grows with the text."""
        config = self.model_config
        kinds = {config.attention.layer_kind(i) for i in range(config.num_layers)}
        return any(LAYERS[kind].needs_room for kind in kinds)

    def start(self, prompts: Sequence[str], *, max_tokens: int) -> Session:
        """Begins a document with each prompt.

        Args:
          prompts: Text, one for each row; may be empty.
          max_tokens: For how many more tokens to make room, where that is needed.

        Returns:
          The session, with the prompts appended.

        Raises:
          ValueError: There are no prompts.
        """
        return self.start_tokens(
            [self._document(prompt) for prompt in prompts], max_tokens=max_tokens
        )

    def start_tokens(self, ids: Sequence[Sequence[int]], *, max_tokens: int) -> Session:
        """Begins with tokens, as `start` does with text.

        Args:
          ids: Of each row, bos included.
          max_tokens: As of `start`.

        Returns:
          The session, with the tokens appended.

        Raises:
          ValueError: There are no rows.
        """
        if not ids:
            raise ValueError("prompts is empty; expected at least one")
        room = max(map(len, ids)) + max_tokens
        max_length = -(-room // _ROOM_STEP) * _ROOM_STEP if self.needs_room else None
        session = Session(self, len(ids), max_length=max_length)
        session.append_tokens(ids)
        return session

    def generate(
        self,
        prompts: Sequence[str],
        *,
        max_tokens: int,
        sampling: Sampling | None = None,
        stop: Sequence[str] = (),
    ) -> list[Completion]:
        """Continues every prompt as if it began a document; see `Session.stream`."""
        session = self.start(prompts, max_tokens=max_tokens)
        for _ in session.stream(max_tokens=max_tokens, sampling=sampling, stop=stop):
            pass
        return session.completions

    def _document(self, text: str) -> list[int]:
        return [self.tokenizer.bos_id, *self.tokenizer.encode(text).tolist()]

    def _program(self, function, state, *arguments, statistics: Statistics):
        """The compiled function for arguments of these shapes."""
        arguments = (self._params, state, *arguments)
        shapes = jax.tree.map(lambda x: (np.shape(x), x.dtype), arguments[1:])
        key = (function, jax.tree.structure(arguments[1:]), *jax.tree.leaves(shapes))
        if key not in self._compiled:
            start = time.perf_counter()
            self._compiled[key] = function.lower(*arguments).compile()
            statistics.compile_seconds += time.perf_counter() - start
        return functools.partial(self._compiled[key], self._params)


class Session:
    """Texts that are written together: one row of a batch each.

    Attributes:
      completions: Of the last `stream`, by row.
      tokens: Ids that every row holds. For those who ask; the model does not need them.
      statistics: Of everything so far.
    """

    def __init__(self, engine: Engine, batch_size: int, *, max_length: int | None = None):
        """Begins with empty rows.

        Args:
          engine: The model.
          batch_size: Rows.
          max_length: Most tokens of a row; needed if `engine.needs_room`.

        Raises:
          ValueError: `max_length` is missing.
        """
        self._engine = engine
        self._max_length = max_length
        self.completions: list[Completion] = []
        self.statistics = Statistics()
        start = time.perf_counter()
        self._state = engine._init(engine._params, batch_size=batch_size, max_length=max_length)
        jax.block_until_ready(self._state)
        self.statistics.compile_seconds += time.perf_counter() - start
        self.statistics.cache_bytes = sum(x.nbytes for x in jax.tree.leaves(self._state.cache))
        self._lengths = np.zeros(batch_size, np.int64)
        self.tokens = [array.array("i") for _ in range(batch_size)]

    @property
    def room(self) -> int | None:
        """Tokens that still fit into every row; None if there is no limit."""
        return None if self._max_length is None else self._max_length - int(self._lengths.max())

    @property
    def num_lost(self) -> int:
        """Scores of dropped keys that had no room in the cache; gates are exact as long as zero."""
        return int(self._state.cache.num_lost.sum())

    def append(self, texts: Sequence[str]) -> None:
        """Appends text to every row; an empty row begins a document first.

        Raises:
          ValueError: A row has no room for it.
        """
        engine = self._engine
        self.append_tokens(
            [
                engine._document(text) if length == 0 else engine.tokenizer.encode(text).tolist()
                for text, length in zip(texts, self._lengths, strict=True)
            ]
        )

    def append_tokens(self, ids: Sequence[Sequence[int]]) -> None:
        """Appends token ids to every row.

        Raises:
          ValueError: A row has no room for them.
        """
        sizes = np.array([len(row) for row in ids])
        self._check_room(sizes)
        engine, statistics = self._engine, self.statistics
        compile_seconds = statistics.compile_seconds
        start = time.perf_counter()
        longest = int(sizes.max())
        size = engine._small if longest <= engine._small else engine._large
        for begin in range(0, longest, size):
            tokens = np.zeros((len(ids), size), np.int32)
            for row, row_ids in enumerate(ids):
                part = row_ids[begin : begin + size]
                tokens[row, : len(part)] = part
            counts = np.clip(sizes - begin, 0, size).astype(np.int32)
            arguments = (self._state, tokens, counts)
            program = engine._program(engine._prefill, *arguments, statistics=statistics)
            self._state = program(*arguments)
        jax.block_until_ready(self._state)
        statistics.prefill_seconds += time.perf_counter() - start
        statistics.prefill_seconds -= statistics.compile_seconds - compile_seconds
        statistics.prefill_tokens += int(sizes.sum())
        self._grow(ids)

    def stream(
        self,
        *,
        max_tokens: int,
        sampling: Sampling | None = None,
        stop: Sequence[str] = (),
        block_seconds: float | None = None,
        cancelled: Callable[[], bool] = lambda: False,
    ) -> Iterator[tuple[int, str]]:
        """Writes on in every row.

        A row's tokens depend on its own text, its index, its length and the seed. The rows are
        left with all that was chosen for them but the end-of-document token, so that more can be
        appended or written; after a stop string, with more than is shown.

        Args:
          max_tokens: Most tokens to choose in each row, at least 1.
          sampling: How; by default with temperature 1.
          stop: Strings before which a text ends.
          block_seconds: After how long to show something, roughly; None does not look at the clock.
          cancelled: Asked between blocks; True ends all rows.

        Yields:
          Row and text, as soon as the text is certain. `completions` has all of it at the end.

        Raises:
          ValueError: An argument is out of range, or a row has no room or no text yet.
          NonFiniteLogitsError: Logits are not finite.
        """
        if max_tokens < 1:
            raise ValueError(f"max_tokens={max_tokens!r}; expected at least 1")
        if not all(stop):
            raise ValueError(f"stop={list(stop)!r}; expected strings that are not empty")
        if not self._lengths.all():
            raise ValueError("a row has no tokens; expected something to be appended first")
        self._check_room(max_tokens)
        tokenizer = self._engine.tokenizer
        texts = [
            TextStream(tokenizer, stop=stop, context=row[-_NUM_CONTEXT:]) for row in self.tokens
        ]
        left = np.full(len(texts), max_tokens, np.int32)
        reasons: list[Reason | None] = [None] * len(texts)
        settings = (sampling or Sampling()).arrays()
        block = self._engine.block_size if block_seconds is None else 1
        while left.any() and not cancelled():
            chosen, finite, seconds = self._decode_block(left, block, settings)
            if block_seconds is not None:
                block = int(block_seconds * max(map(len, chosen)) / seconds)
                block = min(max(block, 1), self._engine.block_size)
            for row, ids in enumerate(chosen):
                if left[row] == 0:
                    continue
                left[row] -= len(ids)
                ended = tokenizer.eos_id in ids[-1:]
                piece = texts[row].push(ids[:-1] if ended else ids)
                if texts[row].stopped:
                    reasons[row] = "stop"
                elif ended:
                    reasons[row] = "eos"
                elif left[row] == 0:
                    reasons[row] = "length"
                if reasons[row]:
                    left[row] = 0
                    piece += texts[row].flush()
                if piece:
                    yield row, piece
            # Behind a stop string they are not needed.
            for row in np.flatnonzero(~finite & (left > 0)):
                raise NonFiniteLogitsError(
                    f"the logits behind token {self._lengths[row]} of row {row} are NaN or "
                    "infinite; expected finite ones, so the model's weights are damaged or its "
                    f"dtype, {self._engine.model_config.dtype}, overflows"
                )
        for row, reason in enumerate(reasons):
            if reason is None and (piece := texts[row].flush()):
                yield row, piece
        self.completions = [
            Completion(text.text, text.num_tokens + (reason == "eos"), reason or "cancelled")
            for text, reason in zip(texts, reasons, strict=True)
        ]

    def snapshot(self) -> Snapshot:
        """Returns a copy of the rows as they are now."""
        state = self._engine._copy(self._state)
        return Snapshot(state, self._lengths)

    def restore(self, snapshot: Snapshot) -> None:
        """Returns to a snapshot of this session, which must not be used again."""
        self._state = snapshot.state
        self._lengths = snapshot.lengths
        for row, length in zip(self.tokens, self._lengths, strict=True):
            del row[length:]
        self.statistics.held_tokens = int(self._lengths.sum())

    def _decode_block(self, left, size, settings):
        """Chooses up to `size` tokens for the rows that have some left; all ids, by row."""
        engine, statistics = self._engine, self.statistics
        arguments = (self._state, left, np.int32(size), settings)
        program = engine._program(engine._decode, *arguments, statistics=statistics)
        start = time.perf_counter()
        self._state, tokens, finite = program(*arguments)
        tokens, finite = jax.device_get((tokens, finite))
        seconds = time.perf_counter() - start
        chosen = [row[row >= 0].tolist() for row in tokens]
        statistics.decode_seconds += seconds
        statistics.decode_tokens += sum(map(len, chosen))
        self._grow([[i for i in row if i != engine.tokenizer.eos_id] for row in chosen])
        return chosen, finite, seconds

    def _grow(self, ids):
        self._lengths = self._lengths + [len(row) for row in ids]
        for row, new in zip(self.tokens, ids, strict=True):
            row.extend(new)
        self.statistics.held_tokens = int(self._lengths.sum())

    def _check_room(self, sizes):
        if self._max_length is None:
            return
        needed = int((self._lengths + sizes).max())
        if needed > self._max_length:
            raise ValueError(
                f"max_length={self._max_length} tokens is the room for all tokens; expected "
                f"at least {needed}"
            )


def _init(graphdef, params, *, batch_size, max_length):
    model = nnx.merge(graphdef, params)
    hidden = jnp.zeros((batch_size, model.config.d_model), model.config.dtype)
    return State(model.init_cache(batch_size, max_length=max_length), hidden)


def _prefill(
    graphdef: nnx.GraphDef,
    params: nnx.State,
    state: State,
    tokens: Int32[Array, "B C"],
    num_tokens: Int32[Array, " B"],
) -> State:
    """Appends the first `num_tokens` tokens of every row."""
    return _append(nnx.merge(graphdef, params), state, tokens, num_tokens)


def _append(model: Decoder, state: State, tokens, num_tokens) -> State:
    cache, hidden = model.extend(tokens, state.cache, num_tokens=num_tokens)
    last = jnp.maximum(num_tokens - 1, 0)[:, None, None]
    newest = jnp.take_along_axis(hidden, last, axis=1)[:, 0]
    return State(cache, jnp.where((num_tokens > 0)[:, None], newest, state.hidden))


def _decode(
    graphdef: nnx.GraphDef,
    params: nnx.State,
    state: State,
    left: Int32[Array, " B"],
    size: Int32[Array, ""],
    settings: dict[str, Array | None],
    *,
    vocab_size: int,
    eos_id: int,
    block_size: int,
) -> tuple[State, Int32[Array, "B block"], Bool[Array, " B"]]:
    """Chooses up to `size` tokens in every row, at most `left`, and appends all but eos.

    Returns:
      The new state; the tokens, then -1; and whether a row's logits were finite. A row ends when
      they are not.
    """
    model = nnx.merge(graphdef, params).unstacked()
    batch = len(left)
    rows = jnp.arange(batch)
    sampling = {name: value for name, value in settings.items() if name != "seed"}

    def unfinished(carry):
        step, _, _, left, _ = carry
        return (step < size) & jnp.any(left > 0)

    def choose_and_append(carry):
        step, state, tokens, left, finite = carry
        # A model may have more rows than the tokenizer has ids; those were never trained.
        logits = model.logits(state.hidden)[:, :vocab_size]
        finite &= jnp.isfinite(logits).all(axis=-1) | (left == 0)
        chooses = (left > 0) & finite
        keys = token_keys(settings["seed"], state.cache.length)
        token = choose_tokens(jnp.where(chooses[:, None], logits, 0), keys, **sampling)
        tokens = tokens.at[rows, step].set(jnp.where(chooses, token, -1))
        appends = chooses & (token != eos_id)
        state = _append(model, state, token[:, None], appends.astype(jnp.int32))
        return step + 1, state, tokens, jnp.where(appends, left - 1, 0), finite

    tokens = jnp.full((batch, block_size), -1, jnp.int32)
    start = (jnp.int32(0), state, tokens, left, jnp.ones(batch, bool))
    _, state, tokens, _, finite = jax.lax.while_loop(unfinished, choose_and_append, start)
    return state, tokens, finite
