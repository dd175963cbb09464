"""Is the scorer alive? What the gates of a SparseK layer do on real text.

All sums over queries turn into sums over keys: tau and the cutoff only rise within a document, so a
key is saturated (gate 1), selected, and in the gates' support during one run of queries each, which
starts where the key enters the pool. Three bisections find where the runs end; no [T, T] array.
"""

from __future__ import annotations

import collections
import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float32, Float64, Int

from sparsek_jax.nn import AttentionConfig
from sparsek_jax.ops import causal_selection
from sparsek_jax.ops.selection import document_bounds, first_query
from sparsek_jax.ops.tracing import computed_once

# Below this spread of its scores a head tells keys apart by position or rounding, not by content.
CONSTANT_STD = 1e-3
# Gates of exactly 1 or 0 pass no gradient to the scorer: with less than this share of the support
# in between, it has all but stopped learning.
SATURATED_INTERIOR = 0.01
# With less of the gates' mass kept, the top-k drops more than it keeps.
DIFFUSE_KEPT = 0.5


@dataclasses.dataclass(frozen=True)
class LayerGates:
    """Gates of one layer, per score head, over the queries whose pool holds more than k keys.

    The gates are the soft ones, `sparsek(scores of the pool, k)`, under either gating.

    Attributes:
      layer: Index in the decoder.
      queries: Queries averaged over, per head.
      kept_mass: Mean over queries of the selected keys' gates / k, `[K]`. The rest of the mass k
        lies on keys that the top-k drops.
      support: Mean number of pool keys with a gate above 0, `[K]`.
      saturation: Share of the selected keys whose gate is 1, `[K]`.
      interior: Share of the support whose gate lies in (0, 1), the keys that pass a gradient to the
        scorer, `[K]`.
      score_std: Standard deviation of the scores within documents, `[K]`, without the line in the
        position that fits them best: that is the slope's. Sinks do not count.
      verdicts: For each head "unused" (no pool exceeds k), "broken" (scores not finite),
        "constant", "saturated", "diffuse" or "alive".
    """

    layer: int
    queries: int
    kept_mass: Float64[np.ndarray, " K"]
    support: Float64[np.ndarray, " K"]
    saturation: Float64[np.ndarray, " K"]
    interior: Float64[np.ndarray, " K"]
    score_std: Float64[np.ndarray, " K"]
    verdicts: tuple[str, ...]


MEANINGS = {
    "alive": "scores differ between keys, and the gates follow them",
    "diffuse": f"alive, but the top-k keeps less than {DIFFUSE_KEPT:.0%} of the gates' mass",
    "saturated": "nearly every gate is 0 or 1: hardly any gradient reaches the scorer",
    "constant": "scores are nearly equal: position decides what is selected, not content",
    "broken": "scores are not finite",
    "unused": "no query has more than k keys to choose from; longer rows or a smaller k would tell",
}


def gate_sums(
    scores: Float32[Array, "B T K"],
    valid: Bool[Array, "B T"],
    *,
    config: AttentionConfig,
    segment_ids: Int[Array, "B T"] | None = None,
) -> dict[str, Float32[Array, " K"]]:
    """Sums the gates of a batch; time O(T log T), memory O(T).

    Args:
      scores: Of every key, `[B, T, K]`.
      valid: Tokens that count: not padding.
      config: `num_selected`, `sliding_window` and `num_sinks` are used.
      segment_ids: Of packed documents.

    Returns:
      Sums over queries whose pool exceeds k, for `GateTally.add`.
    """
    batch, length, _ = scores.shape
    window = config.sliding_window
    scores = computed_once(scores)
    selection = causal_selection(
        scores,
        num_selected=config.num_selected,
        sliding_window=window,
        segment_ids=segment_ids,
    )
    start, end = document_bounds(segment_ids, batch, length)
    position = jnp.arange(length, dtype=jnp.int32)
    stop = jnp.broadcast_to(end[:, :, None], scores.shape)
    enter = jnp.minimum((position + window)[:, None], stop)

    def at(x, index):
        return jnp.take_along_axis(x, jnp.minimum(index, length - 1), axis=1)

    def run_end(holds):
        """First query from `enter` to the document's end at which `holds` is over."""
        return first_query(enter, stop, lambda query: ~holds(query), length=length)

    def is_selected(query):
        cutoff = at(selection.cutoff_score, query)
        earlier = position[:, None] <= at(selection.cutoff_index, query)
        return (scores > cutoff) | ((scores == cutoff) & earlier)

    tau = selection.tau
    in_support = run_end(lambda query: scores - at(tau, query) > 0)
    selected = jnp.minimum(run_end(is_selected), in_support)
    saturated = jnp.minimum(run_end(lambda query: scores - at(tau, query) >= 1), selected)

    counted = valid[:, :, None] & jnp.isfinite(tau)
    queries = _prefix_sum(counted.astype(jnp.int32))
    tau_sum = _prefix_sum(jnp.where(counted, tau, 0.0))

    def between(prefix, begin, stop):
        return jnp.take_along_axis(prefix, stop, 1) - jnp.take_along_axis(prefix, begin, 1)

    ones = between(queries, enter, saturated)
    partial = between(queries, saturated, selected)
    partial_mass = scores * partial - between(tau_sum, saturated, selected)

    def total(x):
        return jnp.sum(x.astype(jnp.float32), axis=(0, 1))

    scored = valid & (position - start >= config.num_sinks)
    scored_3d = scored[:, :, None]

    def centred(x):
        return jnp.where(scored_3d, x - _document_mean(x, scored, start), 0.0)

    deviation = centred(scores)
    place = centred((position - start)[:, :, None].astype(jnp.float32))
    return {
        "queries": total(counted),
        "kept_mass": total(ones) + total(partial_mass),
        "support": total(between(queries, enter, in_support)),
        "saturated": total(ones),
        "tokens": total(jnp.broadcast_to(scored_3d, scores.shape)),
        "squared_deviation": total(deviation**2),
        "squared_place": total(jnp.broadcast_to(place**2, scores.shape)),
        "place_times_deviation": total(place * deviation),
    }


class GateTally:
    """Sums of `gate_sums` over batches, in float64.

    Args:
      config: The attention that the sums are of.
    """

    def __init__(self, config: AttentionConfig):
        self._num_selected = config.num_selected
        self._sums = collections.defaultdict(lambda: collections.defaultdict(float))

    def add(self, sums: dict[int, dict[str, Float32[np.ndarray, " K"]]]) -> None:
        """Adds the sums of a batch by layer."""
        for layer, layer_sums in sums.items():
            for name, value in layer_sums.items():
                self._sums[layer][name] = self._sums[layer][name] + np.asarray(value, np.float64)

    def result(self) -> tuple[LayerGates, ...]:
        """Returns the averages, layers ascending."""
        return tuple(self._layer(layer, self._sums[layer]) for layer in sorted(self._sums))

    def _layer(self, layer, sums):
        k = self._num_selected
        with np.errstate(divide="ignore", invalid="ignore"):
            kept_mass = sums["kept_mass"] / (k * sums["queries"])
            support = sums["support"] / sums["queries"]
            saturation = sums["saturated"] / (k * sums["queries"])
            interior = 1 - sums["saturated"] / sums["support"]
            # Of the line: what it explains.
            trend = sums["place_times_deviation"] ** 2 / np.maximum(sums["squared_place"], 1)
            residual = np.maximum(sums["squared_deviation"] - trend, 0)
            score_std = np.sqrt(residual / sums["tokens"])
        heads = zip(sums["queries"], kept_mass, interior, score_std, strict=True)
        return LayerGates(
            layer=layer,
            queries=int(sums["queries"].max()),
            kept_mass=kept_mass,
            support=support,
            saturation=saturation,
            interior=interior,
            score_std=score_std,
            verdicts=tuple(_verdict(*head) for head in heads),
        )


def _verdict(queries: float, kept_mass: float, interior: float, score_std: float) -> str:
    if not math.isfinite(score_std):
        return "broken"
    if score_std < CONSTANT_STD:
        return "constant"
    if queries == 0:
        return "unused"
    if interior < SATURATED_INTERIOR:
        return "saturated"
    return "diffuse" if kept_mass < DIFFUSE_KEPT else "alive"


def _prefix_sum(x: Array) -> Array:
    return jnp.pad(jnp.cumsum(x, axis=1), ((0, 0), (1, 0), (0, 0)))


def _document_mean(
    x: Float32[Array, "B T K"], valid: Bool[Array, "B T"], start: Int[Array, "B T"]
) -> Float32[Array, "B T K"]:
    """Mean of x over the valid tokens of every position's document."""

    def row(x, valid, start):
        weight = valid[:, None].astype(x.dtype)
        sums = jax.ops.segment_sum(x * weight, start, num_segments=len(x))
        counts = jax.ops.segment_sum(weight, start, num_segments=len(x))
        return (sums / jnp.maximum(counts, 1.0))[start]

    return jax.vmap(row)(x, valid, start)
