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
    def num_inputs(self) -> int:
        """Tokens that the model reads: all but the last."""
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
    """A model that scores continuations; holds what was compiled, one program for each width."""

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

        Yields:
          The index of every continuation and its likelihood, those of long texts first.

        Raises:
          NonFiniteLogitsError: Logits are not finite.
        """
        lengths = [continuation.num_inputs for continuation in continuations]
        for batch in batches(lengths, self._batch_size):
            arrays = self._arrays([continuations[i] for i in batch])
            nats, right = jax.device_get(
                self._measure(self._params, *jax.device_put(arrays, self._rows))
            )
            nats = nats.sum(axis=1, dtype=np.float64)
            for i, row_nats, row_right in zip(batch, nats, right, strict=False):
                if not np.isfinite(row_nats):
                    raise NonFiniteLogitsError(
                        "the logits of a continuation are NaN or infinite; expected finite ones, "
                        f"so the model's weights are damaged or its dtype, {self._dtype}, overflows"
                    )
                yield i, Likelihood(float(row_nats), bool(row_right.all()))

    def _arrays(self, batch: Sequence[Continuation]) -> tuple[np.ndarray, ...]:
        """Tokens `[B, T + 1]`; where what is scored begins, and how much that is, `[B]`."""
        width = padded_width(max(continuation.num_inputs for continuation in batch))
        # Padding is behind, out of sight of what comes before; the rows that lack are padding, too.
        tokens = np.zeros((self._batch_size, width + 1), np.int32)
        begins = np.ones(self._batch_size, np.int32)
        counts = np.zeros(self._batch_size, np.int32)
        for row, continuation in enumerate(batch):
            begin, count = len(continuation.context), len(continuation.tokens)
            tokens[row, :begin] = continuation.context
            tokens[row, begin : begin + count] = continuation.tokens
            begins[row], counts[row] = begin, count
        return tokens, begins, counts


def _measure(
    graphdef: nnx.GraphDef,
    params: nnx.State,
    tokens: Int32[Array, "B T+1"],
    begins: Int32[Array, " B"],
    counts: Int32[Array, " B"],
    *,
    rows: NamedSharding,
    chunk: int,
) -> tuple[Float32[Array, "B n"], Bool[Array, "B n"]]:
    """Nats of every chunk of what is scored, and whether all its tokens are the likeliest."""
    model = nnx.merge(graphdef, params)
    batch, width = tokens.shape[0], tokens.shape[1] - 1
    hidden = model.hidden(tokens[:, :-1], sharding=rows)
    table = model.output_table

    def measure_chunk(i, results):
        nats, right = results
        offsets = i * chunk + jnp.arange(chunk)
        at = jnp.minimum(begins[:, None] + offsets, width)
        real = offsets < counts[:, None]
        logits = output_logits(table, jnp.take_along_axis(hidden, at[:, :, None] - 1, axis=1))
        targets = jnp.take_along_axis(tokens, at, axis=1)
        log_p = jnp.take_along_axis(jax.nn.log_softmax(logits), targets[:, :, None], axis=2)
        nats = nats.at[:, i].set(jnp.sum(jnp.where(real, log_p[:, :, 0], 0), axis=1))
        likeliest = jnp.argmax(logits, axis=-1) == targets
        return nats, right.at[:, i].set(jnp.all(likeliest | ~real, axis=1))

    most_chunks = -(-width // chunk)
    start = jnp.zeros((batch, most_chunks)), jnp.ones((batch, most_chunks), bool)
    # Most continuations are far shorter than their contexts: then few of the chunks are needed.
    return jax.lax.fori_loop(0, -(-jnp.max(counts) // chunk), measure_chunk, start)
