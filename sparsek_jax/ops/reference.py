"""SparseK attention written for clarity: dense [T, T] masks and gradients by autodiff."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Int32

from sparsek_jax.ops.gating import Gating, gated_logits, gates_sum, least_gate
from sparsek_jax.ops.projection import sparsek
from sparsek_jax.ops.selection import document_bounds


def sparsek_attention_reference(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B T K H"],
    value: Float[Array, "B T K H"],
    scores: Float[Array, "B T K"],
    *,
    num_selected: int,
    sliding_window: int,
    gating: Gating,
    scale: float,
    segment_ids: Int[Array, "B T"] | None,
) -> tuple[Float[Array, "B T N H"], Int32[Array, "B T S"]]:
    """`sparsek_attention` over whole rows, and `until`; arguments as there, already checked.

    Takes O(T^2) time and memory. Computes in float32 or wider.
    """
    batch, length, num_heads, head_dim = query.shape
    num_kv_heads = key.shape[2]
    dtype = jnp.promote_types(query.dtype, jnp.float32)
    pool, window = pool_and_window(segment_ids, batch, length, sliding_window)

    rows = jnp.broadcast_to(
        jnp.swapaxes(scores, 1, 2)[:, :, None, :], (batch, num_kv_heads, length, length)
    )
    gate = sparsek(rows, num_selected, where=pool[:, None])
    if gating == "straight_through":
        gate = gate + jax.lax.stop_gradient(1 - gate)
    # Ranked by (score descending, index ascending), keys outside the pool last.
    ranked = jnp.argsort(jnp.where(pool[:, None], -rows, jnp.inf), axis=-1, stable=True)
    rank = jnp.argsort(ranked, axis=-1)
    selected = pool[:, None] & (rank < num_selected)
    gate = jnp.maximum(gate, least_gate(gating))
    gate = jnp.where(selected, gate, jnp.where(window[:, None], 1.0, 0.0))[:, :, None]
    attended = selected | window[:, None]
    # The queries that attend to a key are one run, from its own on.
    until = jnp.arange(length, dtype=jnp.int32) + jnp.sum(attended, axis=2, dtype=jnp.int32)
    until = jnp.swapaxes(until, 1, 2)[..., : scores.shape[2]]
    attended = attended[:, :, None]

    grouped = query.reshape(batch, length, num_kv_heads, num_heads // num_kv_heads, head_dim)
    with jax.default_matmul_precision("highest"):
        logits = jnp.einsum("btkgh,bskh->bkgts", grouped.astype(dtype), key.astype(dtype))
        logits = jnp.where(attended, gated_logits(gating, logits * scale, gate), -jnp.inf)
        weights = jax.nn.softmax(logits, axis=-1) * gate
        if gates_sum(gating):
            weights = weights / jnp.sum(weights, axis=-1, keepdims=True)
        # A query whose pool holds a NaN must not spread it to keys that it does not attend to.
        weights = jnp.where(attended, weights, 0.0)
        out = jnp.einsum("bkgts,bskh->btkgh", weights, value.astype(dtype))
    return out.reshape(query.shape).astype(query.dtype), until


def pool_and_window(
    segment_ids: Int[Array, "B T"] | None, batch: int, length: int, sliding_window: int
) -> tuple[Bool[Array, "B T T"], Bool[Array, "B T T"]]:
    """Which keys (last axis) lie in the pool and in the window of every query."""
    start, _ = document_bounds(segment_ids, batch, length)
    position = jnp.arange(length)
    age = position[:, None] - position
    same_document = position >= start[:, :, None]
    return same_document & (age >= sliding_window), same_document & (age >= 0) & (
        age < sliding_window
    )
