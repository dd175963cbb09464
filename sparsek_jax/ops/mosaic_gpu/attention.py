"""The function that the kernels compute together, with its gradient."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Int32

from sparsek_jax.ops.block_config import KernelConfigs, tuned
from sparsek_jax.ops.mosaic_gpu.by_key import key_backward
from sparsek_jax.ops.mosaic_gpu.by_query import query_backward
from sparsek_jax.ops.mosaic_gpu.chunk_sums import sum_over_chunks
from sparsek_jax.ops.mosaic_gpu.forward import forward
from sparsek_jax.ops.mosaic_gpu.layouts import BLOCK
from sparsek_jax.ops.mosaic_gpu.operands import LOWEST, Keys, Outcome, Settings
from sparsek_jax.ops.mosaic_gpu.thresholds import thresholds_by_walking
from sparsek_jax.ops.selection import Selection, select
from sparsek_jax.ops.tracing import varying_like


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
    selection = select_for_kernels(
        scores, segment_ids, num_selected=num_selected, sliding_window=sliding_window
    )
    out = attend_selected(
        query,
        key,
        value,
        scores,
        selection,
        num_selected=num_selected,
        sliding_window=sliding_window,
        gating=gating,
        scale=scale,
        packed=segment_ids is not None,
        configs=configs,
    )
    return out, selection.lifetimes.until


def select_for_kernels(
    scores: Float[Array, "B T K"],
    segment_ids: Int[Array, "B T"] | None,
    *,
    num_selected: int,
    sliding_window: int,
) -> Selection:
    """The selection that `attend_selected` wants."""
    # A power of two near k, so that lists and slabs are of like size.
    chunk_size = min(max(1 << (num_selected - 1).bit_length(), BLOCK), 512)
    scores = scores.astype(jnp.float32)
    return select(
        scores, segment_ids, num_selected, sliding_window, chunk_size, thresholds_by_walking
    )


def attend_selected(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B T K H"],
    value: Float[Array, "B T K H"],
    scores: Float[Array, "B T K"],
    selection: Selection,
    *,
    num_selected: int,
    sliding_window: int,
    gating: str,
    scale: float,
    packed: bool,
    configs: KernelConfigs | None = None,
) -> Float[Array, "B T N H"]:
    """The attention of a selection; `packed`: whether there are segment ids, the rest as above."""
    length, head_dim = query.shape[1], query.shape[3]
    num_kv_heads = key.shape[2]
    arrays = (scores, selection.tau, selection.lifetimes, selection.candidates)
    if scores.shape[2] != num_kv_heads:
        arrays = jax.tree.map(lambda x: jnp.repeat(x, num_kv_heads, axis=2), arrays)
    # Copies through shared memory want whole groups of eight rows and at least one block.
    padding = max(-length % 8, BLOCK - length)
    widths = ((0, 0), (0, padding), (0, 0), (0, -head_dim % 16))
    query, key, value = (jnp.pad(x, widths) for x in (query, key, value))
    settings = Settings(
        chunk_size=selection.chunk_size,
        list_size=num_selected,
        window=sliding_window,
        scale=scale,
        gating=gating,
        packed=packed,
        configs=configs or tuned(head_dim),
    )
    arrays = jax.tree.map(
        lambda x: varying_like(x, *jax.tree.leaves((query, key, value, arrays))),
        (query, key, value, *arrays),
    )
    return _attend(settings, *arrays)[:, :length, :, :head_dim]


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


def _inputs(settings, key, value, score, tau, lifetimes, candidates):
    """Keys in order, keys in lists, and tau, as the kernels read them."""
    batch, length, num_kv_heads, _ = key.shape
    padded = length + -length % BLOCK
    # tau carries the news of a score that is not finite.
    score = jnp.where(jnp.isfinite(score), score, 0.0)
    rows = Keys(
        key, value, _padded_rows(score, padded, 0.0), _padded_rows(lifetimes.until, padded, 0)
    )
    tau = _padded_rows(jnp.maximum(tau, LOWEST), padded, LOWEST)

    num_chunks = -(-length // settings.chunk_size)
    size = candidates.shape[3]
    candidates = jnp.pad(
        jnp.moveaxis(candidates, 1, 2),
        ((0, 0), (0, 0), (0, num_chunks - candidates.shape[1]), (0, -size % BLOCK)),
        constant_values=-1,
    ).reshape(batch, num_kv_heads, -1)
    b = jnp.arange(batch)[:, None, None]
    h = jnp.arange(num_kv_heads)[:, None]
    at = jnp.maximum(candidates, 0)
    lists = Keys(
        key[b, at, h],
        value[b, at, h],
        rows.score[b, h, at],
        jnp.where(candidates >= 0, rows.until[b, h, at], 0),
    )
    return rows, lists, tau, candidates


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(settings, query, key, value, score, tau, lifetimes, candidates):
    return _attend_fwd(settings, query, key, value, score, tau, lifetimes, candidates)[0]


def _attend_fwd(settings, query, *arguments):
    rows, lists, tau, _ = _inputs(settings, *arguments)
    out, lse = forward(settings, settings.configs.forward, query, rows, lists, tau)
    return out, (query, *arguments, out, lse)


def _attend_bwd(settings, residuals, d_out):
    query, *arguments, out, lse = residuals
    key, _, score, _, lifetimes, _ = arguments
    batch, length, num_heads, _ = query.shape
    num_kv_heads = key.shape[2]
    rows, lists, tau, candidates = _inputs(settings, *arguments)
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
    unpadded = score.shape[1]
    position = jnp.arange(unpadded, dtype=jnp.int32)[:, None]
    first = -(-(position + settings.window) // settings.chunk_size)
    last = (lifetimes.until - 1) // settings.chunk_size
    at = jnp.where(first <= last, last * candidates.shape[3] + lifetimes.slot, -1)
    b = jnp.arange(batch)[:, None, None]
    h = jnp.arange(num_kv_heads)

    totals = sum_over_chunks(of_lists, candidates)

    def with_lists(slab, total):
        total = total[b, h, jnp.maximum(at, 0)]
        mask = (at >= 0).reshape(*at.shape, *[1] * (total.ndim - 3))
        total = jnp.where(mask, total.astype(jnp.float32), 0.0)
        total = slab[:, :unpadded].astype(jnp.float32) + total
        widths = [(0, 0), (0, slab.shape[1] - unpadded)] + [(0, 0)] * (slab.ndim - 2)
        return jnp.pad(total, widths).astype(slab.dtype)

    d_tau = d_tau.reshape(batch, num_kv_heads, num_heads // num_kv_heads, -1).sum(axis=2)
    return (
        d_query,
        with_lists(d_key, totals[0]),
        with_lists(d_value, totals[1]),
        with_lists(d_score[:, :unpadded], totals[2]),
        jnp.swapaxes(d_tau, 1, 2)[:, :unpadded],
        None,
        None,
    )


_attend.defvjp(_attend_fwd, _attend_bwd)
