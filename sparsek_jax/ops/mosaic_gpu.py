"""SparseK attention kernels for NVIDIA Hopper GPUs, in Pallas Mosaic GPU.

A chunk of C queries attends to a list of at most k keys, gathered beforehand, and to a contiguous
slab of keys around its window. Both are streamed through shared memory in tiles; each (query, key)
of a tile finds mask and gate from four numbers: the query's position and tau, the key's score and
the query that stops attending to it. Nothing of size T x k is ever stored.

The forward pass is flash attention over these tiles. The backward pass recomputes them twice, by
query for the gradients of queries and thresholds, and by key for those of keys, values and scores.
A key of a list gets one gradient a chunk; these are added up in order along its slot, which it
keeps from chunk to chunk, so the result is deterministic.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int, Int32

from sparsek_jax.ops.block_config import BlockConfig, KernelConfigs, tuned
from sparsek_jax.ops.gating import (
    Gating,
    cotangents,
    gated_logits,
    gates_sum,
    is_soft,
    least_gate,
    times,
)
from sparsek_jax.ops.selection import Selection, select
from sparsek_jax.ops.tracing import varying_like

_ROWS = 64  # of one warpgroup's tile, the height of a wgmma instruction
_WARPGROUPS = 2  # that compute; one more loads
_BLOCK = _ROWS * _WARPGROUPS
_LOG2E = math.log2(math.e)
_LOWEST = -1e30  # finite, so that differences of two of it are no NaN

_COMPILER_PARAMS = plgpu.CompilerParams(
    approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Lane
)
_TILE = plgpu.Layout.WGMMA
_BY_ROW = plgpu.Layout.WGMMA.reduce(1)
_BY_COLUMN = plgpu.Layout.WGMMA.reduce(0)


class _Settings(NamedTuple):
    chunk_size: int
    list_size: int
    window: int
    scale: float
    gating: Gating
    packed: bool
    configs: KernelConfigs


class _Keys(NamedTuple):
    """Keys in order of position, or in lists.

    Heads are second for lists `[B, K, R, H]` and third for rows `[B, T, K, H]`; scores and ends of
    attention are `[B, K, ...]`.
    """

    key: Array
    value: Array
    score: Array
    until: Array


def _swizzle(head_dim: int, dtype) -> tuple:
    """Transforms that lay tiles out in shared memory as wgmma reads them."""
    elements = next(n for n in (64, 32, 16) if head_dim % n == 0)
    return (
        plgpu.TilingTransform((8, elements)),
        plgpu.SwizzleTransform(elements * jnp.dtype(dtype).itemsize),
    )


def _over_columns(x, shape):
    return lax.broadcast_in_dim(x, shape, [0])


def _over_rows(x, shape):
    return lax.broadcast_in_dim(x, shape, [1])


def _full(shape, value, layout):
    return plgpu.layout_cast(jnp.full(shape, value, jnp.float32), layout)


def _iota(size, first, layout):
    return plgpu.broadcasted_iota(jnp.int32, (size,), 0, layout=layout) + first


class _Gates(NamedTuple):
    """Of one tile; None stands for "all"."""

    attended: Array | None
    gate: Array | None
    interior: Array | None


def _gates(settings, kind, query, key, *, with_interior=False) -> _Gates:
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
        return _Gates(None, None, None)
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
    return _Gates(attended, gate, interior)


def _masked(attended, x, other):
    return x if attended is None else jnp.where(attended, x, other)


# Which tiles a block of queries visits.


class _Span(NamedTuple):
    """The tiles of keys of one block of queries, as tile indices."""

    num_listed: Array
    slab: Array  # first of the slab
    window: Array  # first that lies in the windows of all queries
    diagonal: Array  # first that does not lie before all queries
    end: Array


def _span(settings: _Settings, first_query, length: int, columns: int) -> _Span:
    chunk = first_query - lax.rem(first_query, jnp.int32(settings.chunk_size))
    listed = jnp.clip(chunk - settings.window + 1, 0, settings.list_size)
    slab = lax.div(jnp.maximum(chunk - settings.window, 0), jnp.int32(columns))
    end = lax.div(jnp.minimum(first_query + _BLOCK, length) + columns - 1, jnp.int32(columns))
    diagonal = lax.div(first_query, jnp.int32(columns))
    in_window = first_query + _BLOCK - settings.window
    window = lax.div(jnp.maximum(in_window, 0) + columns - 1, jnp.int32(columns))
    window = jnp.clip(window, slab, diagonal)
    if settings.packed:
        window = diagonal
    return _Span(lax.div(listed + columns - 1, jnp.int32(columns)), slab, window, diagonal, end)


def _for_tiles(span: _Span, tile, carry):
    """Runs `tile(step, tile index or None, kind, carry)` over all tiles of a block of queries."""
    first_step = span.num_listed - span.slab

    def slab(kind):
        return lambda index, carry: tile(index + first_step, index, kind, carry)

    carry = lax.fori_loop(0, span.num_listed, lambda s, c: tile(s, None, "list", c), carry)
    carry = lax.fori_loop(span.slab, span.window, slab("slab"), carry)
    carry = lax.fori_loop(span.window, span.diagonal, slab("window"), carry)
    return lax.fori_loop(span.diagonal, span.end, slab("slab"), carry)


class _KeyBuffers(NamedTuple):
    """Tiles of keys in shared memory, and the barriers that tell of their arrival and release."""

    key: Array
    value: Array
    score: Array
    until: Array
    key_ready: Array
    value_ready: Array
    key_free: Array
    value_free: Array


def _key_buffers(config: BlockConfig, head_dim: int, dtype) -> _KeyBuffers:
    stages, columns = config.stages, config.columns
    rows = plgpu.SMEM((stages, columns, head_dim), dtype, transforms=_swizzle(head_dim, dtype))
    return _KeyBuffers(
        rows,
        rows,
        plgpu.SMEM((stages, columns), jnp.float32),
        plgpu.SMEM((stages, columns), jnp.int32),
        plgpu.Barrier(num_barriers=stages, num_arrivals=3),
        plgpu.Barrier(num_barriers=stages),
        plgpu.Barrier(num_barriers=stages, num_arrivals=_WARPGROUPS),
        plgpu.Barrier(num_barriers=stages, num_arrivals=_WARPGROUPS),
    )


def _load_key_tiles(settings, config, span: _Span, rows: _Keys, lists: _Keys, buffers, place):
    """Streams the tiles of one block of queries; `place`: batch, KV head and chunk."""
    batch, head, chunk = place
    columns = config.columns
    padded_list = lists.score.shape[2] // (-(-rows.key.shape[1] // settings.chunk_size))

    def load(step, tile):
        slot = lax.rem(step, jnp.int32(config.stages))

        @pl.when(step >= config.stages)
        def _():
            plgpu.barrier_wait(buffers.key_free.at[slot])

        if tile is None:
            at = pl.ds(chunk * padded_list + step * columns, columns)
            source = lists
            key, value = lists.key.at[batch, head, at], lists.value.at[batch, head, at]
        else:
            at = pl.ds(tile * columns, columns)
            source = rows
            key, value = rows.key.at[batch, at, head], rows.value.at[batch, at, head]
        ready = buffers.key_ready.at[slot]
        plgpu.copy_gmem_to_smem(key, buffers.key.at[slot], ready)
        plgpu.copy_gmem_to_smem(source.score.at[batch, head, at], buffers.score.at[slot], ready)
        plgpu.copy_gmem_to_smem(source.until.at[batch, head, at], buffers.until.at[slot], ready)

        @pl.when(step >= config.stages)
        def _():
            plgpu.barrier_wait(buffers.value_free.at[slot])

        plgpu.copy_gmem_to_smem(value, buffers.value.at[slot], buffers.value_ready.at[slot])

    @pl.loop(0, span.num_listed)
    def _(step):
        load(step, None)

    @pl.loop(span.slab, span.end)
    def _(tile):
        load(tile - span.slab + span.num_listed, tile)


def _key_side(settings, config, buffers, slot, tile, chunk_start, shape):
    """Loads the keys' `(position, score, until)` of a tile, broadcast to it."""
    score = plgpu.load(buffers.score.at[slot], layout=_BY_COLUMN)
    until = plgpu.load(buffers.until.at[slot], layout=_BY_COLUMN)
    if tile is None:
        return None, _over_rows(score, shape), _over_rows(until, shape)
    position = _iota(config.columns, tile * config.columns, _BY_COLUMN)
    # Keys before the slab are the list's.
    until = jnp.where(position > chunk_start - settings.window, until, 0)
    return tuple(_over_rows(x, shape) for x in (position, score, until))


def _launch(kernel, *, operands, specialised=False, **settings):
    """Runs a kernel, with `specialised` on two computing warpgroups and a loading one."""
    if specialised:
        settings |= {"num_threads": _WARPGROUPS + 1, "thread_name": "warpgroup"}
    compiled = plgpu.kernel(kernel, compiler_params=_COMPILER_PARAMS, **settings)
    # Kernels do not say over which axes of a `shard_map` their results vary: all that inputs do.
    return [varying_like(x, *operands) for x in compiled(*operands)]


def _forward(settings: _Settings, config: BlockConfig, query, rows: _Keys, lists: _Keys, tau):
    """Returns the output `[B, T, N, H]` and the log2-sum-exp2 of the logits `[B, N, Tp]`."""
    batch_size, length, num_heads, head_dim = query.shape
    group = num_heads // rows.key.shape[2]
    dtype = query.dtype
    tile_shape = (_ROWS, config.columns)
    out_shape = (_ROWS, head_dim)

    def kernel(
        q_ref, k_ref, v_ref, s_ref, u_ref, lk_ref, lv_ref, ls_ref, lu_ref, tau_ref,
        out_ref, lse_ref, q_smem2, tau_smem2, lse_smem2, q_ready, turn, buffers,
    ):  # fmt: skip
        head, batch = lax.axis_index("head"), lax.axis_index("batch")
        warpgroup = lax.axis_index("warpgroup")
        first_query = lax.axis_index("block") * _BLOCK
        kv_head = lax.div(head, jnp.int32(group))
        chunk = lax.div(first_query, jnp.int32(settings.chunk_size))
        chunk_start = chunk * settings.chunk_size
        span = _span(settings, first_query, length, config.columns)

        def take_turns():
            plgpu.barrier_arrive(turn)
            plgpu.barrier_wait(turn)

        @pl.when(warpgroup < _WARPGROUPS)
        def _():
            plgpu.set_max_registers(232, action="increase")
            q_smem, tau_smem = q_smem2.at[warpgroup], tau_smem2.at[warpgroup]
            first_row = first_query + warpgroup * _ROWS
            at = pl.ds(first_row, _ROWS)
            ready = q_ready.at[warpgroup]
            plgpu.copy_gmem_to_smem(q_ref.at[batch, at, head], q_smem, ready)
            plgpu.copy_gmem_to_smem(tau_ref.at[batch, kv_head, at], tau_smem, ready)
            plgpu.barrier_wait(ready)
            tau = plgpu.load(tau_smem, layout=_BY_ROW)
            position = _iota(_ROWS, first_row, _BY_ROW)

            def tile(step, index, kind, carry):
                acc, maximum, total = carry
                slot = lax.rem(step, jnp.int32(config.stages))
                plgpu.barrier_wait(buffers.key_ready.at[slot])

                def product(acc_ref):
                    plgpu.wgmma(acc_ref, q_smem, buffers.key.at[slot].transpose((1, 0)))
                    take_turns()
                    return acc_ref[...]

                logits = pl.run_scoped(product, plgpu.ACC(tile_shape, jnp.float32))
                gates = _Gates(None, None, None)
                if kind != "window":
                    gates = _gates(
                        settings,
                        kind,
                        (_over_columns(position, tile_shape), _over_columns(tau, tile_shape)),
                        _key_side(settings, config, buffers, slot, index, chunk_start, tile_shape),
                    )
                plgpu.barrier_arrive(buffers.key_free.at[slot])
                logits = gated_logits(settings.gating, logits, gates.gate)
                logits = _masked(gates.attended, logits, -jnp.inf)
                factor = settings.scale * _LOG2E
                new_maximum = jnp.maximum(maximum, logits.max(axis=1) * factor)
                decay = jnp.exp2(maximum - new_maximum)
                p = jnp.exp2(logits * factor - _over_columns(new_maximum, tile_shape))
                acc *= _over_columns(decay, out_shape)
                weights = times(p, gates.gate)
                total = total * decay + (weights if gates_sum(settings.gating) else p).sum(axis=1)
                weights = weights.astype(dtype)
                acc, total, new_maximum, weights = lax.optimization_barrier(
                    (acc, total, new_maximum, weights)
                )
                plgpu.barrier_arrive(turn)
                plgpu.barrier_wait(buffers.value_ready.at[slot])
                plgpu.barrier_wait(turn)

                def weigh(acc_ref):
                    plgpu.wgmma(acc_ref, weights, buffers.value.at[slot])

                acc = pl.run_state(weigh)(plgpu.ACC.init(acc))
                plgpu.barrier_arrive(buffers.value_free.at[slot])
                return acc, new_maximum, total

            pl.when(warpgroup == 1)(take_turns)
            acc, maximum, total = _for_tiles(
                span,
                tile,
                (
                    _full(out_shape, 0.0, _TILE),
                    _full((_ROWS,), _LOWEST, _BY_ROW),
                    _full((_ROWS,), 0.0, _BY_ROW),
                ),
            )
            pl.when(warpgroup == 0)(take_turns)

            # A query whose pool holds a NaN has a NaN for tau; `min` in the gate may have lost it.
            # Rows behind the end attend to nothing: zero, and probabilities of zero later.
            poison = tau * 0.0
            divisor = jnp.where(total > 0.0, total, 1.0) + poison
            q_smem[...] = (acc / _over_columns(divisor, out_shape)).astype(dtype)
            lse = jnp.where(total > 0.0, maximum + jnp.log2(total), -_LOWEST) + poison
            lse_smem2.at[warpgroup][...] = lse
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(q_smem, out_ref.at[batch, at, head])
            plgpu.copy_smem_to_gmem(lse_smem2.at[warpgroup], lse_ref.at[batch, head, at])
            plgpu.wait_smem_to_gmem(0)

        @pl.when(warpgroup == _WARPGROUPS)
        def _():
            plgpu.set_max_registers(40, action="decrease")
            _load_key_tiles(
                settings,
                config,
                span,
                _Keys(k_ref, v_ref, s_ref, u_ref),
                _Keys(lk_ref, lv_ref, ls_ref, lu_ref),
                buffers,
                (batch, kv_head, chunk),
            )

    padded = tau.shape[2]
    return _launch(
        kernel,
        out_type=[
            jax.ShapeDtypeStruct(query.shape, dtype),
            jax.ShapeDtypeStruct((batch_size, num_heads, padded), jnp.float32),
        ],
        scratch_types=[
            plgpu.SMEM((_WARPGROUPS, _ROWS, head_dim), dtype, transforms=_swizzle(head_dim, dtype)),
            plgpu.SMEM((_WARPGROUPS, _ROWS), jnp.float32),
            plgpu.SMEM((_WARPGROUPS, _ROWS), jnp.float32),
            plgpu.Barrier(num_barriers=_WARPGROUPS, num_arrivals=2),
            plgpu.Barrier(num_arrivals=_WARPGROUPS),
            _key_buffers(config, head_dim, dtype),
        ],
        grid=(num_heads, padded // _BLOCK, batch_size),
        grid_names=("head", "block", "batch"),
        specialised=True,
        operands=(query, *rows, *lists, tau),
    )


class _Outcome(NamedTuple):
    """What the backward pass knows of every query, beside the query itself."""

    d_out: Float[Array, "B T N H"]
    lse: Float[Array, "B N Tp"]
    # Of out and its cotangent, the product: what the softmax's gradient subtracts.
    delta: Float[Array, "B N Tp"]
    tau: Float[Array, "B K Tp"]


def _tile_cotangents(settings, gates, logits, d_weight, lse, delta):
    """Of one tile: `(weights, d_logits before the scale, d_gate)`; `lse`, `delta` broadcast."""
    gated = gated_logits(settings.gating, logits, gates.gate)
    probability = jnp.exp2(gated * (settings.scale * _LOG2E) - lse)
    # Masked last: a NaN of a query must not reach keys that it does not attend to.
    weights = _masked(gates.attended, times(probability, gates.gate), 0.0)
    d_logits, d_gate = cotangents(
        settings.gating, probability, gates.gate, logits * settings.scale, d_weight, delta
    )
    d_logits = _masked(gates.attended, d_logits, 0.0)
    d_gate = None if gates.interior is None else jnp.where(gates.interior, d_gate, 0.0)
    return weights, d_logits, d_gate


def _query_backward(
    settings: _Settings, config: BlockConfig, query, rows: _Keys, lists: _Keys, outcome: _Outcome
):
    """Returns the gradients of the queries `[B, T, N, H]` and of tau, by head, `[B, N, Tp]`."""
    batch_size, length, num_heads, head_dim = query.shape
    group = num_heads // rows.key.shape[2]
    dtype = query.dtype
    tile_shape = (_ROWS, config.columns)
    out_shape = (_ROWS, head_dim)

    def kernel(
        q_ref, k_ref, v_ref, s_ref, u_ref, lk_ref, lv_ref, ls_ref, lu_ref,
        do_ref, lse_ref, delta_ref, tau_ref, dq_ref, dtau_ref,
        q_smem2, do_smem2, tau_smem2, lse_smem2, delta_smem2, q_ready, buffers,
    ):  # fmt: skip
        head, batch = lax.axis_index("head"), lax.axis_index("batch")
        warpgroup = lax.axis_index("warpgroup")
        first_query = lax.axis_index("block") * _BLOCK
        kv_head = lax.div(head, jnp.int32(group))
        chunk = lax.div(first_query, jnp.int32(settings.chunk_size))
        chunk_start = chunk * settings.chunk_size
        span = _span(settings, first_query, length, config.columns)

        @pl.when(warpgroup < _WARPGROUPS)
        def _():
            plgpu.set_max_registers(232, action="increase")
            first_row = first_query + warpgroup * _ROWS
            at = pl.ds(first_row, _ROWS)
            ready = q_ready.at[warpgroup]
            q_smem, do_smem = q_smem2.at[warpgroup], do_smem2.at[warpgroup]
            vectors = [x.at[warpgroup] for x in (tau_smem2, lse_smem2, delta_smem2)]
            plgpu.copy_gmem_to_smem(q_ref.at[batch, at, head], q_smem, ready)
            plgpu.copy_gmem_to_smem(do_ref.at[batch, at, head], do_smem, ready)
            plgpu.copy_gmem_to_smem(tau_ref.at[batch, kv_head, at], vectors[0], ready)
            plgpu.copy_gmem_to_smem(lse_ref.at[batch, head, at], vectors[1], ready)
            plgpu.copy_gmem_to_smem(delta_ref.at[batch, head, at], vectors[2], ready)
            plgpu.barrier_wait(ready)
            tau, lse, delta = (plgpu.load(x, layout=_BY_ROW) for x in vectors)
            position = _iota(_ROWS, first_row, _BY_ROW)

            def tile(step, index, kind, carry):
                acc, d_tau = carry
                slot = lax.rem(step, jnp.int32(config.stages))
                plgpu.barrier_wait(buffers.key_ready.at[slot])
                plgpu.barrier_wait(buffers.value_ready.at[slot])

                def products(logits_ref, d_weight_ref):
                    plgpu.wgmma(logits_ref, q_smem, buffers.key.at[slot].transpose((1, 0)))
                    plgpu.wgmma(d_weight_ref, do_smem, buffers.value.at[slot].transpose((1, 0)))
                    return logits_ref[...], d_weight_ref[...]

                accumulator = plgpu.ACC(tile_shape, jnp.float32)
                logits, d_weight = pl.run_scoped(products, accumulator, accumulator)
                plgpu.barrier_arrive(buffers.value_free.at[slot])
                gates = _Gates(None, None, None)
                if kind != "window":
                    gates = _gates(
                        settings,
                        kind,
                        (_over_columns(position, tile_shape), _over_columns(tau, tile_shape)),
                        _key_side(settings, config, buffers, slot, index, chunk_start, tile_shape),
                        with_interior=True,
                    )
                _, d_logits, d_gate = _tile_cotangents(
                    settings,
                    gates,
                    logits,
                    d_weight,
                    _over_columns(lse, tile_shape),
                    _over_columns(delta, tile_shape),
                )
                if d_gate is not None:
                    d_tau -= d_gate.sum(axis=1)
                d_logits = d_logits.astype(dtype)

                def add(acc_ref):
                    plgpu.wgmma(acc_ref, d_logits, buffers.key.at[slot])

                acc = pl.run_state(add)(plgpu.ACC.init(acc))
                plgpu.barrier_arrive(buffers.key_free.at[slot])
                return acc, d_tau

            acc, d_tau = _for_tiles(
                span, tile, (_full(out_shape, 0.0, _TILE), _full((_ROWS,), 0.0, _BY_ROW))
            )
            q_smem[...] = (acc * settings.scale).astype(dtype)
            vectors[0][...] = d_tau
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(q_smem, dq_ref.at[batch, at, head])
            plgpu.copy_smem_to_gmem(vectors[0], dtau_ref.at[batch, head, at])
            plgpu.wait_smem_to_gmem(0)

        @pl.when(warpgroup == _WARPGROUPS)
        def _():
            plgpu.set_max_registers(40, action="decrease")
            _load_key_tiles(
                settings,
                config,
                span,
                _Keys(k_ref, v_ref, s_ref, u_ref),
                _Keys(lk_ref, lv_ref, ls_ref, lu_ref),
                buffers,
                (batch, kv_head, chunk),
            )

    block = plgpu.SMEM((_WARPGROUPS, _ROWS, head_dim), dtype, transforms=_swizzle(head_dim, dtype))
    vector = plgpu.SMEM((_WARPGROUPS, _ROWS), jnp.float32)
    padded = outcome.tau.shape[2]
    return _launch(
        kernel,
        out_type=[
            jax.ShapeDtypeStruct(query.shape, dtype),
            jax.ShapeDtypeStruct((batch_size, num_heads, padded), jnp.float32),
        ],
        scratch_types=[
            block,
            block,
            vector,
            vector,
            vector,
            plgpu.Barrier(num_barriers=_WARPGROUPS, num_arrivals=5),
            _key_buffers(config, head_dim, dtype),
        ],
        grid=(num_heads, padded // _BLOCK, batch_size),
        grid_names=("head", "block", "batch"),
        specialised=True,
        operands=(query, *rows, *lists, *outcome),
    )


def _key_backward(
    settings: _Settings, config: BlockConfig, query, keys: _Keys, outcome: _Outcome, *, listed: bool
):
    """Gradients of keys, values and scores, as far as they are seen through lists or through slabs.

    Args:
      settings: Of the call.
      config: Of this kernel.
      query: `[B, T, N, H]`.
      keys: The lists if `listed`, else the keys in order.
      outcome: Of the queries.
      listed: Which of the two.

    Returns:
      Gradients in the shapes of keys' `key`, `value` and `score`, the last in float32.
    """
    batch_size, length, num_heads, head_dim = query.shape
    num_kv_heads, num_scores = keys.score.shape[1:]
    group = num_heads // num_kv_heads
    dtype = query.dtype
    columns, stages = config.columns, config.stages
    tile_shape = (_ROWS, columns)
    out_shape = (_ROWS, head_dim)
    chunk_size, window = settings.chunk_size, settings.window
    tiles_per_chunk = num_scores // -(-length // chunk_size) // _BLOCK

    def query_blocks(block):
        """First and end of the blocks of queries that see this block of keys."""
        if listed:
            first = lax.div(block, jnp.int32(tiles_per_chunk)) * chunk_size
            end = first + chunk_size
        else:
            first = block * _BLOCK
            # The chunk that follows the last query with a key of the block in its window.
            last = jnp.maximum(first + _BLOCK + window - 2, 0)
            end = lax.div(last + chunk_size, jnp.int32(chunk_size)) * chunk_size
        end = jnp.minimum(end, length)
        first = lax.div(first, jnp.int32(columns))
        return first, jnp.maximum(lax.div(end + columns - 1, jnp.int32(columns)), first)

    def key_slice(ref, batch, head, at):
        return ref.at[batch, head, at] if listed else ref.at[batch, at, head]

    def kernel(
        q_ref, k_ref, v_ref, s_ref, u_ref, do_ref, lse_ref, delta_ref, tau_ref,
        dk_ref, dv_ref, ds_ref,
        k_smem2, v_smem2, s_smem2, u_smem2, k_ready,
        q_smem, do_smem, lse_smem, delta_smem, tau_smem, ready, free,
    ):  # fmt: skip
        head, batch = lax.axis_index("head"), lax.axis_index("batch")
        warpgroup = lax.axis_index("warpgroup")
        block = lax.axis_index("block")
        first_block, end_block = query_blocks(block)
        num_blocks = end_block - first_block

        @pl.when(warpgroup < _WARPGROUPS)
        def _():
            plgpu.set_max_registers(232, action="increase")
            first_row = block * _BLOCK + warpgroup * _ROWS
            at = pl.ds(first_row, _ROWS)
            arrived = k_ready.at[warpgroup]
            k_smem, v_smem, s_smem, u_smem = (
                x.at[warpgroup] for x in (k_smem2, v_smem2, s_smem2, u_smem2)
            )
            plgpu.copy_gmem_to_smem(key_slice(k_ref, batch, head, at), k_smem, arrived)
            plgpu.copy_gmem_to_smem(key_slice(v_ref, batch, head, at), v_smem, arrived)
            plgpu.copy_gmem_to_smem(s_ref.at[batch, head, at], s_smem, arrived)
            plgpu.copy_gmem_to_smem(u_ref.at[batch, head, at], u_smem, arrived)
            plgpu.barrier_wait(arrived)
            score, until = (plgpu.load(x, layout=_BY_ROW) for x in (s_smem, u_smem))
            position = _iota(_ROWS, first_row, _BY_ROW)

            def tile(kind, query_head, block, carry):
                d_key, d_value, d_score = carry
                slot = lax.rem(query_head * num_blocks + block, jnp.int32(stages))
                plgpu.barrier_wait(ready.at[slot])
                first_query = (first_block + block) * columns

                def products(logits_ref, d_weight_ref):
                    plgpu.wgmma(logits_ref, k_smem, q_smem.at[slot].transpose((1, 0)))
                    plgpu.wgmma(d_weight_ref, v_smem, do_smem.at[slot].transpose((1, 0)))
                    return logits_ref[...], d_weight_ref[...]

                accumulator = plgpu.ACC(tile_shape, jnp.float32)
                logits, d_weight = pl.run_scoped(products, accumulator, accumulator)
                lse, delta, tau = (
                    _over_rows(plgpu.load(x.at[slot], layout=_BY_COLUMN), tile_shape)
                    for x in (lse_smem, delta_smem, tau_smem)
                )
                query_position = _over_rows(_iota(columns, first_query, _BY_COLUMN), tile_shape)
                seen_until = until
                if kind == "slab":
                    chunk_start = first_query - lax.rem(first_query, jnp.int32(chunk_size))
                    seen_until = jnp.where(position > chunk_start - window, until, 0)
                gates = _gates(
                    settings,
                    kind,
                    (query_position, tau),
                    tuple(_over_columns(x, tile_shape) for x in (position, score, seen_until)),
                    with_interior=True,
                )
                weights, d_logits, d_gate = _tile_cotangents(
                    settings, gates, logits, d_weight, lse, delta
                )
                if d_gate is not None:
                    d_score += d_gate.sum(axis=1)
                weights, d_logits = weights.astype(dtype), d_logits.astype(dtype)

                def add(refs):
                    d_key_ref, d_value_ref = refs
                    plgpu.wgmma(d_value_ref, weights, do_smem.at[slot])
                    plgpu.wgmma(d_key_ref, d_logits, q_smem.at[slot])

                d_key, d_value = pl.run_state(add)((plgpu.ACC.init(d_key), plgpu.ACC.init(d_value)))
                plgpu.barrier_arrive(free.at[slot])
                return d_key, d_value, d_score

            def head_of_group(query_head, carry):
                edges = [0, num_blocks]
                kinds = ["list"]
                if not listed:
                    # Up to the last block of queries with all keys in their windows.
                    in_window = lax.div(block * _BLOCK + window, jnp.int32(columns)) - first_block
                    diagonal = jnp.minimum(_BLOCK // columns, num_blocks)
                    if settings.packed:
                        in_window = diagonal
                    edges = [0, diagonal, jnp.clip(in_window, diagonal, num_blocks), num_blocks]
                    kinds = ["slab", "window", "slab"]
                for kind, first, end in zip(kinds, edges[:-1], edges[1:], strict=True):
                    visit = functools.partial(tile, kind, query_head)
                    carry = lax.fori_loop(first, end, visit, carry)
                return carry

            d_key, d_value, d_score = lax.fori_loop(
                0,
                group,
                head_of_group,
                (
                    _full(out_shape, 0.0, _TILE),
                    _full(out_shape, 0.0, _TILE),
                    _full((_ROWS,), 0.0, _BY_ROW),
                ),
            )
            k_smem[...] = (d_key * settings.scale).astype(dtype)
            v_smem[...] = d_value.astype(dtype)
            s_smem[...] = d_score
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(k_smem, key_slice(dk_ref, batch, head, at))
            plgpu.copy_smem_to_gmem(v_smem, key_slice(dv_ref, batch, head, at))
            plgpu.copy_smem_to_gmem(s_smem, ds_ref.at[batch, head, at])
            plgpu.wait_smem_to_gmem(0)

        @pl.when(warpgroup == _WARPGROUPS)
        def _():
            plgpu.set_max_registers(40, action="decrease")

            @pl.loop(0, num_blocks * group)
            def _(step):
                slot = lax.rem(step, jnp.int32(stages))
                query_head = head * group + lax.div(step, num_blocks)
                at = pl.ds((first_block + lax.rem(step, num_blocks)) * columns, columns)

                @pl.when(step >= stages)
                def _():
                    plgpu.barrier_wait(free.at[slot])

                arrived = ready.at[slot]
                plgpu.copy_gmem_to_smem(q_ref.at[batch, at, query_head], q_smem.at[slot], arrived)
                plgpu.copy_gmem_to_smem(do_ref.at[batch, at, query_head], do_smem.at[slot], arrived)
                plgpu.copy_gmem_to_smem(
                    lse_ref.at[batch, query_head, at], lse_smem.at[slot], arrived
                )
                plgpu.copy_gmem_to_smem(
                    delta_ref.at[batch, query_head, at], delta_smem.at[slot], arrived
                )
                plgpu.copy_gmem_to_smem(tau_ref.at[batch, head, at], tau_smem.at[slot], arrived)

    transforms = _swizzle(head_dim, dtype)
    block = plgpu.SMEM((_WARPGROUPS, _ROWS, head_dim), dtype, transforms=transforms)
    stage = plgpu.SMEM((stages, columns, head_dim), dtype, transforms=transforms)
    vector = plgpu.SMEM((stages, columns), jnp.float32)
    return _launch(
        kernel,
        out_type=[
            jax.ShapeDtypeStruct(keys.key.shape, dtype),
            jax.ShapeDtypeStruct(keys.value.shape, dtype),
            jax.ShapeDtypeStruct(keys.score.shape, jnp.float32),
        ],
        scratch_types=[
            block,
            block,
            plgpu.SMEM((_WARPGROUPS, _ROWS), jnp.float32),
            plgpu.SMEM((_WARPGROUPS, _ROWS), jnp.int32),
            plgpu.Barrier(num_barriers=_WARPGROUPS, num_arrivals=4),
            stage,
            stage,
            vector,
            vector,
            vector,
            plgpu.Barrier(num_barriers=stages, num_arrivals=5),
            plgpu.Barrier(num_barriers=stages, num_arrivals=_WARPGROUPS),
        ],
        grid=(num_kv_heads, num_scores // _BLOCK, batch_size),
        grid_names=("head", "block", "batch"),
        specialised=True,
        operands=(query, *keys, *outcome),
    )


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
) -> Float[Array, "B T N H"]:
    """`sparsek_attention` by GPU kernels; arguments as there, already checked.

    `configs` are tile sizes, None the tuned ones.

    Raises:
      NotImplementedError: The kernels do not support the dtype or head size.
    """
    if reason := unsupported(query):
        raise NotImplementedError(f"implementation='mosaic_gpu': {reason}")
    selection = select_for_kernels(
        scores, segment_ids, num_selected=num_selected, sliding_window=sliding_window
    )
    return attend_selected(
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


def select_for_kernels(
    scores: Float[Array, "B T K"],
    segment_ids: Int[Array, "B T"] | None,
    *,
    num_selected: int,
    sliding_window: int,
) -> Selection:
    """The selection that `attend_selected` wants."""
    # A power of two near k, so that lists and slabs are of like size.
    chunk_size = min(max(1 << (num_selected - 1).bit_length(), _BLOCK), 512)
    scores = scores.astype(jnp.float32)
    return select(scores, segment_ids, num_selected, sliding_window, chunk_size)


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
    padding = max(-length % 8, _BLOCK - length)
    widths = ((0, 0), (0, padding), (0, 0), (0, -head_dim % 16))
    query, key, value = (jnp.pad(x, widths) for x in (query, key, value))
    settings = _Settings(
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
    padded = length + -length % _BLOCK
    # tau carries the news of a score that is not finite.
    score = jnp.where(jnp.isfinite(score), score, 0.0)
    rows = _Keys(
        key, value, _padded_rows(score, padded, 0.0), _padded_rows(lifetimes.until, padded, 0)
    )
    tau = _padded_rows(jnp.maximum(tau, _LOWEST), padded, _LOWEST)

    num_chunks = -(-length // settings.chunk_size)
    size = candidates.shape[3]
    candidates = jnp.pad(
        jnp.moveaxis(candidates, 1, 2),
        ((0, 0), (0, 0), (0, num_chunks - candidates.shape[1]), (0, -size % _BLOCK)),
        constant_values=-1,
    ).reshape(batch, num_kv_heads, -1)
    b = jnp.arange(batch)[:, None, None]
    h = jnp.arange(num_kv_heads)[:, None]
    at = jnp.maximum(candidates, 0)
    lists = _Keys(
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
    out, lse = _forward(settings, settings.configs.forward, query, rows, lists, tau)
    return out, (query, *arguments, out, lse)


def _attend_bwd(settings, residuals, d_out):
    query, *arguments, out, lse = residuals
    key, _, score, _, lifetimes, _ = arguments
    batch, length, num_heads, _ = query.shape
    num_kv_heads = key.shape[2]
    rows, lists, tau, candidates = _inputs(settings, *arguments)
    delta = jnp.sum(out.astype(jnp.float32) * d_out.astype(jnp.float32), axis=-1)
    outcome = _Outcome(d_out, lse, _padded_rows(delta, tau.shape[2], 0.0), tau)
    configs = settings.configs
    d_query, d_tau = _query_backward(settings, configs.by_query, query, rows, lists, outcome)
    of_slab = _key_backward(settings, configs.by_key, query, rows, outcome, listed=False)
    of_lists = _key_backward(settings, configs.by_key, query, lists, outcome, listed=True)
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

    totals = _sum_over_chunks(of_lists, candidates)

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


def _sum_over_chunks(of_lists, candidates: Int32[Array, "B K chunks L"]):
    """Adds up, in every slot, what its present key was given in this chunk and those before.

    Args:
      of_lists: Gradients of the lists' keys, values `[B, K, R, H]` and scores `[B, K, R]`.
      candidates: The lists.

    Returns:
      Running sums, shapes and dtypes as given.
    """
    d_key, _, d_score = of_lists
    batch_size, num_kv_heads, _, head_dim = d_key.shape
    num_chunks, list_size = candidates.shape[2:]
    stages = 4
    tile_shape = (_ROWS, head_dim)
    before = jnp.pad(candidates, ((0, 0), (0, 0), (1, 0), (0, 0)), constant_values=-1)[:, :, :-1]
    same = (candidates == before).astype(jnp.int32).reshape(d_score.shape)

    def kernel(same_ref, *refs_and_scratch):
        in_refs, out_refs = refs_and_scratch[:3], refs_and_scratch[3:6]
        same_smem, buffers, results, ready = refs_and_scratch[6:]
        head, batch = lax.axis_index("head"), lax.axis_index("batch")
        first_slot = lax.axis_index("slots") * _ROWS

        def at(chunk):
            return batch, head, pl.ds(chunk * list_size + first_slot, _ROWS)

        def load(chunk):
            stage = lax.rem(chunk, jnp.int32(stages))
            for ref, smem in zip((same_ref, *in_refs), (same_smem, *buffers), strict=True):
                plgpu.copy_gmem_to_smem(ref.at[at(chunk)], smem.at[stage], ready.at[stage])

        @pl.loop(0, min(stages, num_chunks))
        def _(chunk):
            load(chunk)

        def step(chunk, totals):
            stage = lax.rem(chunk, jnp.int32(stages))
            plgpu.barrier_wait(ready.at[stage])
            same = plgpu.load(same_smem.at[stage], layout=_BY_ROW) > 0
            new_totals = []
            # The previous chunk's results must have left their buffers.
            plgpu.wait_smem_to_gmem(0)
            for total, buffer, result in zip(totals, buffers, results, strict=True):
                layout = _BY_ROW if len(total.shape) == 1 else _TILE
                x = plgpu.load(buffer.at[stage], layout=layout).astype(jnp.float32)
                keep = same if len(total.shape) == 1 else _over_columns(same, tile_shape)
                total = jnp.where(keep, total, 0.0) + x
                result[...] = total.astype(result.dtype)
                new_totals.append(total)
            plgpu.commit_smem()
            for result, ref in zip(results, out_refs, strict=True):
                plgpu.copy_smem_to_gmem(result, ref.at[at(chunk)])

            @pl.when(chunk + stages < num_chunks)
            def _():
                load(chunk + stages)

            return tuple(new_totals)

        zeros = _full(tile_shape, 0.0, _TILE)
        lax.fori_loop(0, num_chunks, step, (zeros, zeros, _full((_ROWS,), 0.0, _BY_ROW)))
        plgpu.wait_smem_to_gmem(0)

    transforms = _swizzle(head_dim, d_key.dtype)

    def buffers(*leading):
        rows = plgpu.SMEM((*leading, *tile_shape), d_key.dtype, transforms=transforms)
        return rows, rows, plgpu.SMEM((*leading, _ROWS), jnp.float32)

    return _launch(
        kernel,
        out_type=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in of_lists],
        scratch_types=[
            plgpu.SMEM((stages, _ROWS), jnp.int32),
            buffers(stages),
            buffers(),
            plgpu.Barrier(num_barriers=stages, num_arrivals=4),
        ],
        grid=(num_kv_heads, list_size // _ROWS, batch_size),
        grid_names=("head", "slots", "batch"),
        operands=(same, *of_lists),
    )


_attend.defvjp(_attend_fwd, _attend_bwd)
