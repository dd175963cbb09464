"""SparseK attention for any XLA device: a scan over chunks of queries, memory linear in T.

A chunk of C queries attends to at most the k keys that its first query has selected (a gathered
list) and the w + C - 1 keys from that query's window on (a contiguous slab). Whether a query
attends to a key follows from the key's lifetime, with which gate from its score and the query's
tau. Every chunk holds all keys of its queries, so a plain softmax over the tile is exact, and the
backward pass recomputes it from the inputs alone.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Int32

from sparsek_jax.ops.gating import (
    Gating,
    cotangents,
    gated_logits,
    gates_sum,
    is_soft,
    least_gate,
)
from sparsek_jax.ops.products import einsum_f32
from sparsek_jax.ops.selection import causal_selection
from sparsek_jax.ops.tracing import varying_like

_ALIGNMENT = 16  # keys


def sparsek_attention_xla(
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
    """`sparsek_attention` in chunks, and `until`; arguments as there, already checked."""
    batch, length, num_heads, head_dim = query.shape
    num_kv_heads = key.shape[2]
    scores = scores.astype(jnp.float32)
    selection = causal_selection(
        scores, num_selected=num_selected, sliding_window=sliding_window, segment_ids=segment_ids
    )
    until = selection.lifetimes.until
    if scores.shape[2] != num_kv_heads:
        scores, selection = jax.tree.map(
            lambda x: jnp.broadcast_to(x, (*x.shape[:2], num_kv_heads, *x.shape[3:])),
            (scores, selection),
        )
    grouped = query.reshape(batch, length, num_kv_heads, num_heads // num_kv_heads, head_dim)
    settings = _Settings(selection.chunk_size, sliding_window, scale, gating)
    fixed = (selection.lifetimes.until, selection.candidates)
    arrays = (grouped, key, value, scores, selection.tau, fixed)
    # Under `shard_map` an argument may be replicated where another is split, such as shared scores
    # next to heads. Its gradient is then a sum over devices, which this cast's transpose takes.
    arrays = jax.tree.map(lambda x: varying_like(x, *jax.tree.leaves(arrays)), arrays)
    return _attend(settings, *arrays).reshape(query.shape), until


class _Settings(NamedTuple):
    chunk_size: int
    window: int
    scale: float
    gating: Gating


class _Queries(NamedTuple):
    """One chunk of queries."""

    query: Float[Array, "B C K G H"]
    tau: Float[Array, "B C K"]
    position: Int32[Array, " C"]


class _Keys(NamedTuple):
    """Every key that one chunk of queries may attend to: the list, then the slab."""

    key: Float[Array, "B K L H"]
    value: Float[Array, "B K L H"]
    score: Float[Array, "B K L"]
    until: Int32[Array, "B K L"]
    position: Int32[Array, "B K L"]


class _Gates(NamedTuple):
    attended: Bool[Array, "B K C L"]
    gate: Float[Array, "B K C L"]
    # Selected keys, to which the gate's gradient flows, and those of them whose gate is strictly
    # between 0 and 1.
    interior: Bool[Array, "B K C L"]


def _gates(settings: _Settings, queries: _Queries, keys: _Keys) -> _Gates:
    """Window, selection and gate of every (query, key) of a tile."""
    key_position, until, score = (x[:, :, None, :] for x in (keys.position, keys.until, keys.score))
    query_position = queries.position[:, None]
    tau = jnp.swapaxes(queries.tau, 1, 2)[..., None]
    attended = (key_position <= query_position) & (query_position < until)
    selected = attended & (key_position <= query_position - settings.window)
    window = attended & ~selected
    distance = score - tau
    soft_gate = jnp.clip(distance, least_gate(settings.gating), 1.0)
    if not is_soft(settings.gating):
        # A hard gate of one, unless it is NaN.
        soft_gate = jnp.where(jnp.isnan(soft_gate), soft_gate, 1.0)
    gate = jnp.where(selected, soft_gate, jnp.where(window, 1.0, 0.0))
    interior = selected & ~(distance <= 0) & ~(distance >= 1)
    return _Gates(attended, gate, interior)


def _tile_forward(settings, queries, keys, gates):
    """Scaled logits before gating, probabilities, and the output `[B, C, K, G, H]` of one tile."""
    logits = settings.scale * einsum_f32("bckgh,bklh->bkgcl", queries.query, keys.key)
    gate = gates.gate[:, :, None]
    gated = gated_logits(settings.gating, logits, gate)
    gated = jnp.where(gates.attended[:, :, None], gated, -jnp.inf)
    probabilities = jax.nn.softmax(gated, axis=-1)
    if gates_sum(settings.gating):
        total = jnp.sum(probabilities * gate, axis=-1, keepdims=True)
        probabilities = probabilities / total
    weights = (probabilities * gate).astype(keys.value.dtype)
    out = einsum_f32("bkgcl,bklh->bckgh", weights, keys.value)
    return logits, probabilities, out


def _tile_backward(settings, queries, keys, d_out):
    """Cotangents of one tile's query, key, value, score and tau, in float32."""
    gates = _gates(settings, queries, keys)
    logits, probabilities, _ = _tile_forward(settings, queries, keys, gates)
    gate = gates.gate[:, :, None]

    d_weight = einsum_f32("bckgh,bklh->bkgcl", d_out, keys.value)
    delta = jnp.sum(probabilities * gate * d_weight, axis=-1, keepdims=True)
    d_logits, d_gate = cotangents(settings.gating, probabilities, gate, logits, d_weight, delta)
    # Products with a NaN of a key that is not attended must not spread.
    d_logits = jnp.where(gates.attended[:, :, None], d_logits, 0.0)
    d_gate = jnp.where(gates.interior, jnp.sum(d_gate, axis=2), 0.0)

    dtype = queries.query.dtype
    d_logits = (settings.scale * d_logits).astype(dtype)
    d_query = einsum_f32("bkgcl,bklh->bckgh", d_logits, keys.key)
    d_key = einsum_f32("bkgcl,bckgh->bklh", d_logits, queries.query)
    weights = jnp.where(gates.attended[:, :, None], probabilities * gate, 0.0)
    d_value = einsum_f32("bkgcl,bckgh->bklh", weights.astype(dtype), d_out)
    return (
        d_query,
        d_key,
        d_value,
        jnp.sum(d_gate, axis=2),
        -jnp.swapaxes(jnp.sum(d_gate, axis=3), 1, 2),
    )


class _Layout:
    """Cuts arrays into chunks of queries and slabs of keys.

    Keys are kept heads first, `[B, K, R, ...]`: a loop that gathers from, or adds to, an array
    whose head axis lies inside would copy it whole in every step. They are padded in front, so that
    position p lies at row `window + p` and the slab of the chunk that starts at t begins at row t +
    1. The slab goes on behind the chunk, out of all its queries' sight, until list and slab
    together are aligned; GPU matrix products of bfloat16 would otherwise copy them to align them.
    """

    def __init__(self, settings: _Settings, length: int, list_size: int):
        self.chunk_size = settings.chunk_size
        self.window = settings.window
        self.num_chunks = -(-length // self.chunk_size)
        needed = self.window + self.chunk_size - 1
        self.slab_size = needed + -(list_size + needed) % _ALIGNMENT
        self.length = length

    def pad_keys(self, x):
        """`[B, T, K, ...]` to `[B, K, R, ...]`."""
        last_slab = (self.num_chunks - 1) * self.chunk_size + 1
        after = last_slab + self.slab_size - self.window - self.length
        widths = [(0, 0), (0, 0), (self.window, after)] + [(0, 0)] * (x.ndim - 3)
        return jnp.pad(jnp.swapaxes(x, 1, 2), widths)

    def unpad_keys(self, x):
        return jnp.swapaxes(x[:, :, self.window : self.window + self.length], 1, 2)

    def chunked(self, x, mode="edge"):
        """`[B, T, ...]` to `[chunks, B, C, ...]`, the last chunk filled up by padding of that mode.

        Queries repeat the last one, which attends to something, so that no softmax is empty.
        """
        after = self.num_chunks * self.chunk_size - self.length
        x = jnp.pad(x, [(0, 0), (0, after)] + [(0, 0)] * (x.ndim - 2), mode=mode)
        x = x.reshape(x.shape[0], self.num_chunks, self.chunk_size, *x.shape[2:])
        return jnp.moveaxis(x, 1, 0)

    def unchunked(self, x):
        x = jnp.moveaxis(x, 0, 1)
        return x.reshape(x.shape[0], -1, *x.shape[3:])[:, : self.length]

    def slab(self, padded, first):
        return jax.lax.dynamic_slice_in_dim(padded, first + 1, self.slab_size, axis=2)

    def add_slab(self, padded, first, update):
        return jax.lax.dynamic_update_slice_in_dim(
            padded, self.slab(padded, first) + update, first + 1, axis=2
        )


def _per_head(function):
    return jax.vmap(jax.vmap(function))


def _keys(layout: _Layout, key, value, score, until, candidates, first) -> _Keys:
    """Gathers list and slab of the chunk whose first query is `first` from padded arrays."""
    rows = jnp.maximum(candidates, 0) + layout.window

    def gather(padded):
        listed = _per_head(lambda x, r: x[r])(padded, rows)
        return jnp.concatenate([listed, layout.slab(padded, first)], axis=2)

    slab_position = first - layout.window + 1 + jnp.arange(layout.slab_size, dtype=jnp.int32)
    position = jnp.concatenate(
        [
            candidates,
            jnp.broadcast_to(slab_position, (*candidates.shape[:2], layout.slab_size)),
        ],
        axis=2,
    )
    # An empty place in a list, at position -1, is no key of any query.
    until = jnp.where(position >= 0, gather(until), 0)
    return _Keys(gather(key), gather(value), gather(score), until, position)


def _chunks(layout: _Layout, query, tau, candidates) -> tuple[_Queries, Array]:
    """The scanned inputs: queries and their thresholds, and each chunk's list."""
    position = jnp.arange(layout.num_chunks * layout.chunk_size, dtype=jnp.int32)
    position = jnp.minimum(position, layout.length - 1)
    queries = _Queries(
        layout.chunked(query),
        layout.chunked(tau),
        position.reshape(layout.num_chunks, layout.chunk_size),
    )
    return queries, jnp.moveaxis(candidates, 1, 0)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(settings, query, key, value, score, tau, fixed):
    """Attention output `[B, T, K, G, H]`; `fixed`: lifetimes' ends and candidates."""
    until, candidates = fixed
    layout = _Layout(settings, query.shape[1], list_size=candidates.shape[-1])
    padded = [layout.pad_keys(x) for x in (key, value, score, until)]

    def chunk(inputs):
        queries, candidates = inputs
        keys = _keys(layout, *padded, candidates, queries.position[0])
        out = _tile_forward(settings, queries, keys, _gates(settings, queries, keys))[2]
        return out.astype(query.dtype)

    return layout.unchunked(jax.lax.map(chunk, _chunks(layout, query, tau, candidates)))


def _attend_fwd(settings, query, key, value, score, tau, fixed):
    residuals = (query, key, value, score, tau, fixed)
    return _attend(settings, *residuals), residuals


def _attend_bwd(settings, residuals, d_out):
    query, key, value, score, tau, (until, candidates) = residuals
    layout = _Layout(settings, query.shape[1], list_size=candidates.shape[-1])
    padded = [layout.pad_keys(x) for x in (key, value, score, until)]

    def chunk(totals, inputs):
        (queries, candidates), d_chunk = inputs
        first = queries.position[0]
        keys = _keys(layout, *padded, candidates, first)
        d_query, *d_keys, d_tau = _tile_backward(settings, queries, keys, d_chunk)
        # An empty place in the list has a zero cotangent, and is sent past the end to be dropped.
        list_size = candidates.shape[-1]
        rows = jnp.where(candidates >= 0, candidates + layout.window, padded[0].shape[2])
        add_rows = _per_head(lambda x, r, d: x.at[r].add(d, mode="drop"))
        totals = [
            layout.add_slab(add_rows(total, rows, d[:, :, :list_size]), first, d[:, :, list_size:])
            for total, d in zip(totals, d_keys, strict=True)
        ]
        return totals, (d_query.astype(query.dtype), d_tau)

    zeros = [
        varying_like(jnp.zeros(x.shape, jnp.float32), x, d_out, query, tau) for x in padded[:3]
    ]
    d_chunks = layout.chunked(d_out, mode="constant")
    totals, (d_query, d_tau) = jax.lax.scan(
        chunk, zeros, (_chunks(layout, query, tau, candidates), d_chunks)
    )
    d_key, d_value, d_score = (layout.unpad_keys(x) for x in totals)
    return (
        layout.unchunked(d_query),
        d_key.astype(key.dtype),
        d_value.astype(value.dtype),
        d_score,
        layout.unchunked(d_tau),
        None,
    )


_attend.defvjp(_attend_fwd, _attend_bwd)
