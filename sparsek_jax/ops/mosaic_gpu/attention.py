"""The function that the kernels compute together, with its gradient."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Int32

from sparsek_jax.ops.block_config import KernelConfigs, tuned
from sparsek_jax.ops.indexing import gather
from sparsek_jax.ops.mosaic_gpu.by_key import key_backward
from sparsek_jax.ops.mosaic_gpu.by_query import query_backward
from sparsek_jax.ops.mosaic_gpu.chains import chain_starts
from sparsek_jax.ops.mosaic_gpu.chunk_sums import sum_over_chunks
from sparsek_jax.ops.mosaic_gpu.forward import forward
from sparsek_jax.ops.mosaic_gpu.layouts import BLOCK
from sparsek_jax.ops.mosaic_gpu.operands import LOWEST, Keys, Outcome, Settings
from sparsek_jax.ops.mosaic_gpu.thresholds import LONGEST, thresholds_by_walking
from sparsek_jax.ops.selection import (
    Search,
    SelectionSettings,
    document_bounds,
    find_selection,
    tau_gradient,
)
from sparsek_jax.ops.tracing import computed_once, varying_like


def sparsek_attention_mosaic_gpu(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B T K H"],
    value: Float[Array, "B T K H"],
    scores: Float[Array, "B T K"],
    *,
    num_selected: int,
    sliding_window: int,
    gating: str,
    scale: float,
    segment_ids: Int[Array, "B T"] | None,
    configs: KernelConfigs | None = None,
) -> tuple[Float[Array, "B T N H"], Int32[Array, "B T S"]]:
    """`sparsek_attention` by GPU kernels, and `until`; arguments as there, already checked.

    `configs` are tile sizes, None the tuned ones.

    Raises:
      NotImplementedError: The kernels do not support the dtype or head size.
    """
    if reason := unsupported(query):
        raise NotImplementedError(f"implementation='mosaic_gpu': {reason}")
    length, head_dim = query.shape[1], query.shape[3]
    documents = document_bounds(segment_ids, *scores.shape[:2])
    settings = Settings(
        # A power of two near k, so that lists and slabs are of like size.
        chunk_size=min(max(1 << (num_selected - 1).bit_length(), BLOCK), 512),
        list_size=num_selected,
        window=sliding_window,
        scale=scale,
        gating=gating,
        packed=segment_ids is not None,
        configs=configs or tuned(head_dim),
    )
    # Copies through shared memory want whole groups of eight rows and at least one block.
    padding = max(-length % 8, BLOCK - length)
    widths = ((0, 0), (0, padding), (0, 0), (0, -head_dim % 16))
    # In the order that all but the arguments has; XLA would else reorder them several times.
    scores = jnp.swapaxes(computed_once(jnp.swapaxes(scores.astype(jnp.float32), 1, 2)), 1, 2)
    # Under `shard_map` scores may be replicated where heads are split, and so is what is selected.
    selecting = varying_like(scores, *documents), documents
    arrays = *(jnp.pad(x, widths) for x in (query, key, value)), scores
    leaves = jax.tree.leaves((arrays, documents))
    out, until = _attend(settings, *(varying_like(x, *leaves) for x in arrays), selecting)
    return out[:, :length, :, :head_dim], until


def unsupported(query: Float[Array, "B T N H"]) -> str | None:
    """Why the kernels cannot compute attention of such queries; None if they can."""
    if query.dtype not in (jnp.bfloat16, jnp.float16):
        return f"query has dtype {query.dtype}; expected bfloat16 or float16"
    if query.shape[3] > 128:
        return f"query has head size {query.shape[3]}; expected at most 128"
    return None


def _padded_rows(x, padded, fill):
    """`[B, T, K]` to `[B, K, Tp]`."""
    x = jnp.swapaxes(x, 1, 2)
    return jnp.pad(x, ((0, 0), (0, 0), (0, padded - x.shape[2])), constant_values=fill)


def _per_head(num_heads, arrays):
    """Of every KV head, also where they share scores."""

    def repeat(x):
        return x if x.shape[2] == num_heads else jnp.repeat(x, num_heads, axis=2)

    return jax.tree.map(repeat, arrays)


def _score_rows(key, scores):
    """Scores of every KV head as the kernels read them."""
    _, length, num_kv_heads, _ = key.shape
    # tau carries the news of a score that is not finite.
    scores = _per_head(num_kv_heads, jnp.where(jnp.isfinite(scores), scores, 0.0))
    return _padded_rows(scores, length + -length % BLOCK, 0.0)


def _inputs(settings, key, value, score, selected):
    """Keys in order, keys in lists, and tau, as the kernels read them; lists' positions."""
    batch, length, num_kv_heads, _ = key.shape
    tau, lifetimes, candidates = _per_head(num_kv_heads, selected)
    padded = score.shape[2]
    rows = Keys(key, value, score, _padded_rows(lifetimes.until, padded, 0))
    tau = _padded_rows(jnp.maximum(tau, LOWEST), padded, LOWEST)

    num_chunks = -(-length // settings.chunk_size)
    size = candidates.shape[3]
    candidates = jnp.pad(
        jnp.moveaxis(candidates, 1, 2),
        ((0, 0), (0, 0), (0, num_chunks - candidates.shape[1]), (0, -size % BLOCK)),
        constant_values=-1,
    ).reshape(batch, num_kv_heads, -1)
    b = np.arange(batch, dtype=np.int32)[:, None, None]
    h = np.arange(num_kv_heads, dtype=np.int32)[:, None]
    at = jnp.maximum(candidates, 0)
    lists = Keys(
        gather(key, b, at, h),
        gather(value, b, at, h),
        gather(rows.score, b, h, at),
        jnp.where(candidates >= 0, gather(rows.until, b, h, at), 0),
    )
    return rows, lists, tau, candidates


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(settings, query, key, value, scores, selecting):
    return _attend_fwd(settings, query, key, value, scores, selecting)[0]


def _attend_fwd(settings, query, key, value, scores, selecting):
    of_selection = SelectionSettings(
        settings.list_size,
        settings.window,
        settings.chunk_size,
        settings.packed,
        Search(thresholds_by_walking, chain_starts),
        LONGEST,
    )

    score = _score_rows(key, scores)

    def read(selection):
        selected = selection.tau, selection.lifetimes, selection.candidates
        varying = jax.tree.map(lambda x: varying_like(x, key), selected)
        rows, lists, tau, _ = _inputs(settings, key, value, score, varying)
        return rows.until, lists, tau, selected

    until, lists, tau, selected = find_selection(of_selection, *selecting, read)
    rows = Keys(key, value, score, until)
    out, lse = forward(settings, settings.configs.forward, query, rows, lists, tau)
    residuals = query, key, value, scores, selecting[1], selected, out, lse
    return (out, selected[1].until), residuals


def _attend_bwd(settings, residuals, cotangents):
    d_out, _ = cotangents
    query, key, value, scores, *selection, out, lse = residuals
    documents, selected = jax.tree.map(lambda x: varying_like(x, key), selection)
    batch, length, num_heads, _ = query.shape
    num_kv_heads = key.shape[2]
    score = _score_rows(key, scores)
    rows, lists, tau, candidates = _inputs(settings, key, value, score, selected)
    delta = jnp.sum(out.astype(jnp.float32) * d_out.astype(jnp.float32), axis=-1)
    outcome = Outcome(d_out, lse, _padded_rows(delta, tau.shape[2], 0.0), tau)
    configs = settings.configs
    d_query, d_tau = query_backward(settings, configs.by_query, query, rows, lists, outcome)
    of_slab = key_backward(settings, configs.by_key, query, rows, outcome, listed=False)
    of_lists = key_backward(settings, configs.by_key, query, lists, outcome, listed=True)
    d_key, d_value = of_slab[:2]
    d_score = jnp.swapaxes(of_slab[2], 1, 2)

    num_chunks = -(-length // settings.chunk_size)
    candidates = candidates.reshape(batch, num_kv_heads, num_chunks, -1)
    unpadded = scores.shape[1]
    lifetimes = _per_head(num_kv_heads, selected[1])
    position = jnp.arange(unpadded, dtype=jnp.int32)[:, None]
    first = -(-(position + settings.window) // settings.chunk_size)
    last = (lifetimes.until - 1) // settings.chunk_size
    at = jnp.where(first <= last, last * candidates.shape[3] + lifetimes.slot, -1)
    b = np.arange(batch, dtype=np.int32)[:, None, None]
    h = np.arange(num_kv_heads, dtype=np.int32)

    totals = sum_over_chunks(of_lists, candidates)

    def with_lists(slab, total):
        total = gather(total, b, h, jnp.maximum(at, 0))
        mask = (at >= 0).reshape(*at.shape, *[1] * (total.ndim - 3))
        total = jnp.where(mask, total.astype(jnp.float32), 0.0)
        total = slab[:, :unpadded].astype(jnp.float32) + total
        widths = [(0, 0), (0, slab.shape[1] - unpadded)] + [(0, 0)] * (slab.ndim - 2)
        return jnp.pad(total, widths).astype(slab.dtype)

    d_tau = d_tau.reshape(batch, num_kv_heads, num_heads // num_kv_heads, -1).sum(axis=2)
    d_tau = jnp.swapaxes(d_tau, 1, 2)[:, :unpadded]
    d_scores = with_lists(d_score[:, :unpadded], totals[2])
    if scores.shape[2] != num_kv_heads:
        d_scores, d_tau = (jnp.sum(x, axis=2, keepdims=True) for x in (d_scores, d_tau))
    # Last: XLA would put these many small operations where the GPU waits for what comes next.
    of_selection = jax.lax.optimization_barrier((selected[0], documents, d_tau))
    d_scores += tau_gradient(settings.window, scores, *of_selection)
    # NaN, as loud as others', if any: an infinite score is one whatever it is.
    d_scores = jnp.where(jnp.isinf(scores), 0.0, d_scores)
    return d_query, with_lists(d_key, totals[0]), with_lists(d_value, totals[1]), d_scores, None


_attend.defvjp(_attend_fwd, _attend_bwd)
