"""What a model remembered of a text: from when to when each key and value was held, and where.

A key is attended to by one unbroken run of queries (ops/lifetimes.py), so two numbers per key and
head, the end of its run and its slot, tell everything. One forward pass finds them for all.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float32, Int32

from sparsek_jax.nn import Decoder, DecoderConfig
from sparsek_jax.nn.config import has_scorer
from sparsek_jax.ops import causal_selection

# Of the ages of what the slots hold.
QUANTILES = (0.0, 0.25, 0.5, 0.75, 1.0)
# Queries at which the ages are taken. More would not be told apart in a picture.
_MAX_MOMENTS = 128


@dataclasses.dataclass(frozen=True)
class Memory:
    """The memory of every SparseK layer L and score head S, for a text of T tokens.

    A score head is a KV head, unless all KV heads of a layer share their scores.

    Attributes:
      layers: Indices of the SparseK layers in the decoder.
      num_selected: k.
      sliding_window: w.
      shared_scores: Whether S = 1 stands for all KV heads.
      score: Of every key, `[L, S, T]`.
      until: First query that does not attend to a key any more; T if it is held at the end.
      slot: Place of a key among the k slots, while it is selected.
      displaced: Whether a query saw the key that left the window displace a selected one.
      rejected: Whether a query saw that key find no slot. Where neither holds, it took an empty
        one, or nothing left the window yet.
      moments: Queries M at which ages are told, evenly spaced.
      ages: Quantiles `QUANTILES` of the ages, query minus position, of what the slots hold.
    """

    layers: tuple[int, ...]
    num_selected: int
    sliding_window: int
    shared_scores: bool
    score: Float32[np.ndarray, "L S T"]
    until: Int32[np.ndarray, "L S T"]
    slot: Int32[np.ndarray, "L S T"]
    displaced: Bool[np.ndarray, "L S T"]
    rejected: Bool[np.ndarray, "L S T"]
    moments: Int32[np.ndarray, " M"]
    ages: Float32[np.ndarray, "L S M quantiles"]

    @property
    def length(self) -> int:
        """T."""
        return self.until.shape[-1]

    @property
    def survival(self) -> Int32[np.ndarray, "L S T"]:
        """How many queries of the text attended to every key, its own included."""
        return self.until - np.arange(self.length, dtype=np.int32)

    @property
    def held(self) -> Bool[np.ndarray, "L S T"]:
        """Whether the last query attended to a key, in the window or in a slot."""
        return self.until == self.length


def check_explainable(config: DecoderConfig) -> None:
    """Checks that a model selects.

    Raises:
      ValueError: It has no SparseK layer.
    """
    kinds = [config.attention.layer_kind(layer) for layer in range(config.num_layers)]
    if not any(map(has_scorer, kinds)):
        raise ValueError(
            f"the model has no SparseK layer, only {' and '.join(sorted(set(kinds)))} attention; "
            "expected one that selects what it remembers"
        )


def explain(model: Decoder, tokens: Sequence[int] | Int32[np.ndarray, " T"]) -> Memory:
    """Follows the memory through a text.

    The text is read again at once, in time about linear in T. What was held while it was generated
    token by token is the same up to rounding: of two keys whose scores differ in the last bit, the
    other may have been kept.

    Args:
      model: The language model.
      tokens: All that it has read, `[T]`: the prompt, with what begins a document, and what was
        generated.

    Returns:
      The memory.

    Raises:
      ValueError: The model has no SparseK layer, there is no token, or scores are not finite.
    """
    check_explainable(model.config)
    tokens = np.asarray(tokens, np.int32)
    if tokens.ndim != 1 or not tokens.size:
        raise ValueError(f"tokens has shape {tokens.shape}; expected [T] with T of at least 1")
    attention = model.config.attention
    k, window = attention.num_selected, attention.sliding_window
    graphdef, params = nnx.split(model)
    scores = _scores(graphdef, params, tokens[None])
    for layer, layer_scores in scores.items():
        if not jnp.isfinite(layer_scores).all():
            raise ValueError(f"scores of layer {layer} are not finite; expected a sound checkpoint")
    lifetimes = [
        causal_selection(x, num_selected=k, sliding_window=window).lifetimes
        for x in scores.values()
    ]

    def stacked(arrays):
        return np.stack([np.asarray(x)[0].T for x in arrays])

    until = stacked(x.until for x in lifetimes)
    displaced, rejected = _changes(until, k, window)
    moments = _moments(len(tokens), window)
    ages = [[_ages(head, moments, window) for head in layer] for layer in until]
    return Memory(
        layers=tuple(scores),
        num_selected=k,
        sliding_window=window,
        shared_scores=attention.shared_scores and attention.num_kv_heads > 1,
        score=stacked(scores.values()),
        until=until,
        slot=stacked(x.slot for x in lifetimes),
        displaced=displaced,
        rejected=rejected,
        moments=moments,
        ages=np.array(ages, np.float32),
    )


@functools.partial(jax.jit, static_argnums=0)
def _scores(
    graphdef: nnx.GraphDef, params: nnx.State, tokens: Int32[Array, "1 T"]
) -> dict[int, Float32[Array, "1 T S"]]:
    return nnx.merge(graphdef, params).hidden(tokens, return_scores=True)[1]


def _changes(
    until: Int32[np.ndarray, "L S T"], num_selected: int, window: int
) -> tuple[Bool[np.ndarray, "L S T"], Bool[np.ndarray, "L S T"]]:
    """Whether every query displaced a key, and whether it rejected the one that left its window."""
    length = until.shape[-1]
    displaced, rejected = np.zeros((2, *until.shape), bool)
    # While the slots fill up, nobody has to leave.
    queries = np.arange(min(window + num_selected, length), length)
    rejected[..., queries] = until[..., queries - window] == queries
    displaced[..., queries] = ~rejected[..., queries]
    return displaced, rejected


def _moments(length: int, window: int) -> Int32[np.ndarray, " M"]:
    count = min(max(length - window, 0), _MAX_MOMENTS)
    return np.linspace(window, length - 1, count).round().astype(np.int32)


def _ages(
    until: Int32[np.ndarray, " T"], moments: Int32[np.ndarray, " M"], window: int
) -> Float32[np.ndarray, "M quantiles"]:
    """Quantiles of the ages of the selected keys, of one head."""
    ages = np.empty((len(moments), len(QUANTILES)), np.float32)
    for row, query in enumerate(moments):
        # A pool is never empty from query w on, and neither is its selection.
        position = np.flatnonzero(until[: query - window + 1] > query)
        ages[row] = np.quantile(query - position, QUANTILES)
    return ages
