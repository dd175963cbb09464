"""What is computed of each (query, key) of a tile: mask, gate and cotangents."""

import math
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Float32, Int32, Shaped

from sparsek_jax.ops.gating import cotangents, gated_logits, gates_sum, is_soft, least_gate, times
from sparsek_jax.ops.mosaic_gpu.operands import Settings

LOG2E = math.log2(math.e)


class Gates(NamedTuple):
    """Of one tile.

    Attributes:
      attended: Whether the query attends to the key; None: all do.
      gate: m; None: one.
      interior: Whether the gate has a gradient; None: none has, or nobody asked.
    """

    attended: Bool[Array, "rows columns"] | None
    gate: Float[Array, "rows columns"] | None
    interior: Bool[Array, "rows columns"] | None


def tile_gates(
    settings: Settings,
    kind: str,
    query: tuple[Int32[Array, "rows columns"], Float[Array, "rows columns"]],
    key: tuple[
        Int32[Array, "rows columns"] | None,
        Float[Array, "rows columns"],
        Int32[Array, "rows columns"],
    ],
    *,
    with_interior: bool = False,
) -> Gates:
    """Mask and gates of a tile.

    Args:
      settings: Of the call.
      kind: "window": all of the tile lies in all windows. "list": keys of a list. "slab": keys of
        the slab, some of them in some windows.
      query: `(position, tau)` of the queries, already broadcast to the tile.
      key: `(position, score, until)` of the keys, likewise.
      with_interior: Whether to return it.
    """
    if kind == "window":
        return Gates(None, None, None)
    (query_position, tau), (key_position, score, until) = query, key
    attended = query_position < until
    distance = score - tau
    gate = jnp.minimum(distance, 1.0) if is_soft(settings.gating) else None
    if gates_sum(settings.gating):
        gate = jnp.maximum(gate, least_gate(settings.gating))
    # A NaN is interior, so that it shows in the scores' gradient.
    interior = ~((distance <= 0.0) | (distance >= 1.0)) if with_interior else None
    if kind == "slab":
        attended &= query_position >= key_position
        in_pool = query_position >= key_position + settings.window
        if gate is not None:
            gate = jnp.where(in_pool, gate, 1.0)
        if with_interior:
            interior &= in_pool
    if with_interior:
        interior &= attended
    return Gates(attended, gate, interior)


def masked(
    attended: Bool[Array, "rows columns"] | None, x: Shaped[Array, "rows columns"], other: float
) -> Shaped[Array, "rows columns"]:
    """`x` where attended, else `other`."""
    return x if attended is None else jnp.where(attended, x, other)


def tile_cotangents(
    settings: Settings,
    gates: Gates,
    logits: Float32[Array, "rows columns"],
    d_weight: Float32[Array, "rows columns"],
    lse: Float32[Array, "rows columns"],
    delta: Float32[Array, "rows columns"],
) -> tuple[
    Float32[Array, "rows columns"],
    Float32[Array, "rows columns"],
    Float32[Array, "rows columns"] | None,
]:
    """Weights of a tile, and the gradients of its logits and gates.

    Args:
      settings: Of the call.
      gates: With `interior`.
      logits: Before scale and gates.
      d_weight: Product of value and output's cotangent.
      lse: As in `Outcome`, already broadcast to the tile.
      delta: Likewise.

    Returns:
      `(weights, d_logits before the scale, d_gate)`, the last None where `interior` is.
    """
    gated = gated_logits(settings.gating, logits, gates.gate)
    probability = jnp.exp2(gated * (settings.scale * LOG2E) - lse)
    # Masked last: a NaN of a query must not reach keys that it does not attend to.
    weights = masked(gates.attended, times(probability, gates.gate), 0.0)
    d_logits, d_gate = cotangents(
        settings.gating, probability, gates.gate, logits * settings.scale, d_weight, delta
    )
    d_logits = masked(gates.attended, d_logits, 0.0)
    d_gate = None if gates.interior is None else jnp.where(gates.interior, d_gate, 0.0)
    return weights, d_logits, d_gate
