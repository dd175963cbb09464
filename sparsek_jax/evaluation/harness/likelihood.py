"""How likely a model finds given continuations, and whether it would have written them.

In contrast to `tasks.scoring`, continuations may be as long as documents, and texts have any
lengths: these share a few programs, and logits exist for a limited number of tokens at a time.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Float32, Int32

from sparsek_jax.evaluation.evaluate import row_sharding
from sparsek_jax.evaluation.harness.batching import batches, padded_width
from sparsek_jax.generation.engine import NonFiniteLogitsError
from sparsek_jax.nn import Decoder
from sparsek_jax.nn.decoder import output_logits


@dataclasses.dataclass(frozen=True)
class Continuation:
    """Tokens that follow others.

    Attributes:
      context: What the model reads first; at least one token.
      tokens: What is scored; at least one token.

    Raises:
      ValueError: There are no tokens.
    """

    context: Sequence[int]
    tokens: Sequence[int]

    def __post_init__(self):
        for name in ("context", "tokens"):
            if not len(getattr(self, name)):
                raise ValueError(f"{name} is empty; expected at least one token")

    @property
    def inputs(self) -> list[int]:
        """What the model reads: all but the last token."""
        return [*self.context, *self.tokens[:-1]]

    @property
    def num_inputs(self) -> int:
        """Tokens that the model reads."""
        return len(self.context) + len(self.tokens) - 1

    def truncated(self, max_length: int) -> Continuation:
        """Returns the same without the first tokens of the context, so that `max_length` are read.

        Raises:
          ValueError: So few would leave no context.
        """
        excess = self.num_inputs - max_length
        if excess <= 0:
            return self
        if excess >= len(self.context):
            raise ValueError(
                f"max_length={max_length}; expected at least {len(self.tokens)}, the tokens of a "
                "continuation"
            )
        return dataclasses.replace(self, context=self.context[excess:])


@dataclasses.dataclass(frozen=True)
class Likelihood:
    """What a model thinks of a continuation.

    Attributes:
      nats: Logarithm of its probability, so at most zero.
      is_greedy: Whether each of its tokens is the likeliest after those before.
    """

    nats: float
    is_greedy: bool


class ContinuationScorer:
    """A model that scores continuations; holds what was compiled."""

    def __init__(self, model: Decoder, *, batch_size: int, logits_chunk: int = 1024):
        """Compiles nothing yet.

        Args:
          model: The language model, on one device.
          batch_size: Rows of a forward pass, spread over as many local devices as divide it.
          logits_chunk: Tokens of a batch whose logits exist at a time.
        """
        self._batch_size = batch_size
        self._dtype = model.config.dtype
        self._chunk = max(1, logits_chunk // batch_size)
        self._rows = row_sharding(batch_size)
        graphdef, params = nnx.split(model)
        self._params = jax.device_put(params, NamedSharding(self._rows.mesh, PartitionSpec()))
        self._measure = jax.jit(
            functools.partial(_measure, graphdef, rows=self._rows, chunk=self._chunk)
        )

    @property
    def num_programs(self) -> int:
        """How many were compiled so far."""
        return self._measure._cache_size()

    def score(self, continuations: Sequence[Continuation]) -> Iterator[tuple[int, Likelihood]]:
        """Scores continuations in batches of similar lengths.

        Texts that differ in their last token only, as the letters of a choice, are read once.

        Yields:
          The index of every continuation and its likelihood, those of long texts first.

        Raises:
          NonFiniteLogitsError: Logits are not finite.
        """
        groups: dict[tuple[int, ...], list[int]] = {}
        for i, continuation in enumerate(continuations):
            begin = len(continuation.context)
            groups.setdefault((begin, *continuation.inputs), []).append(i)
        members = list(groups.values())
        lengths = [continuations[group[0]].num_inputs for group in members]
        # At least 8 are nearly always enough for all calls, and cost nothing beside the rest.
        columns = 1 << max(3, (max(map(len, members), default=1) - 1).bit_length())
        for batch in batches(lengths, self._batch_size):
            arrays = self._arrays([[continuations[i] for i in members[j]] for j in batch], columns)
            nats, right, last_nats, last_right = jax.device_get(
                self._measure(self._params, *jax.device_put(arrays, self._rows))
            )
            nats = nats.sum(axis=1, dtype=np.float64)[:, None] + last_nats
            right = right.all(axis=1)[:, None] & last_right
            for row, j in enumerate(batch):
                for column, i in enumerate(members[j]):
                    if not np.isfinite(nats[row, column]):
                        raise NonFiniteLogitsError(
                            "the logits of a continuation are NaN or infinite; expected finite "
                            "ones, so the model's weights are damaged or its dtype, "
                            f"{self._dtype}, overflows"
                        )
                    yield i, Likelihood(float(nats[row, column]), bool(right[row, column]))

    def _arrays(
        self, batch: Sequence[Sequence[Continuation]], columns: int
    ) -> tuple[np.ndarray, ...]:
        """What is read `[B, T]`, where scores begin and texts end `[B]`, last tokens `[B, N]`."""
        width = padded_width(max(group[0].num_inputs for group in batch))
        # Padding is behind, out of sight of what comes before; the rows that lack are padding, too.
        tokens = np.zeros((self._batch_size, width), np.int32)
        begins, ends = np.ones((2, self._batch_size), np.int32)
        lasts = np.zeros((self._batch_size, columns), np.int32)
        for row, group in enumerate(batch):
            begins[row], ends[row] = len(group[0].context), group[0].num_inputs
            tokens[row, : ends[row]] = group[0].inputs
            lasts[row, : len(group)] = [continuation.tokens[-1] for continuation in group]
        return tokens, begins, ends, lasts


def _measure(
    graphdef: nnx.GraphDef,
    params: nnx.State,
    tokens: Int32[Array, "B T"],
    begins: Int32[Array, " B"],
    ends: Int32[Array, " B"],
    lasts: Int32[Array, "B N"],
    *,
    rows: NamedSharding,
    chunk: int,
) -> tuple[Float32[Array, "B n"], Bool[Array, "B n"], Float32[Array, "B N"], Bool[Array, "B N"]]:
    """Nats of every chunk of what is scored, and whether all its tokens are the likeliest.

    Then the same of every last token by itself.
    """
    model = nnx.merge(graphdef, params)
    batch, width = tokens.shape
    hidden = model.hidden(tokens, sharding=rows)
    table = model.output_table

    def predict(at, targets):
        """Nats of targets after the tokens at positions, and whether they are the likeliest."""
        logits = output_logits(table, jnp.take_along_axis(hidden, at[:, :, None], axis=1))
        nats = jnp.take_along_axis(jax.nn.log_softmax(logits), targets, axis=2)
        return nats, jnp.argmax(logits, axis=-1, keepdims=True) == targets

    def measure_chunk(i, results):
        nats, right = results
        at = begins[:, None] + i * chunk + jnp.arange(chunk)
        real = at < ends[:, None]
        at = jnp.minimum(at, width - 1)
        targets = jnp.take_along_axis(tokens, at, axis=1)
        log_p, likeliest = (x[:, :, 0] for x in predict(at - 1, targets[:, :, None]))
        nats = nats.at[:, i].set(jnp.sum(jnp.where(real, log_p, 0), axis=1))
        return nats, right.at[:, i].set(jnp.all(likeliest | ~real, axis=1))

    most_chunks = -(-width // chunk)
    start = jnp.zeros((batch, most_chunks)), jnp.ones((batch, most_chunks), bool)
    # Most continuations are far shorter than their contexts: then few of the chunks are needed.
    used_chunks = -(-jnp.max(ends - begins) // chunk)
    chunks = jax.lax.fori_loop(0, used_chunks, measure_chunk, start)
    last_nats, last_right = predict(ends[:, None] - 1, lasts[:, None])
    return *chunks, last_nats[:, 0], last_right[:, 0]
