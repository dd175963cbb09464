"""The backward kernel by key, which has the gradients of keys, values and scores."""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float

from sparsek_jax.ops.block_config import BlockConfig
from sparsek_jax.ops.mosaic_gpu.launch import launch
from sparsek_jax.ops.mosaic_gpu.layouts import (
    BLOCK,
    BY_COLUMN,
    BY_ROW,
    ROWS,
    TILE,
    WARPGROUPS,
    full,
    iota,
    over_columns,
    over_rows,
    swizzle,
)
from sparsek_jax.ops.mosaic_gpu.operands import Keys, Outcome, Settings
from sparsek_jax.ops.mosaic_gpu.tile import tile_cotangents, tile_gates


def key_backward(
    settings: Settings,
    config: BlockConfig,
    query: Float[Array, "B T N H"],
    keys: Keys,
    outcome: Outcome,
    *,
    listed: bool,
) -> list[Float[Array, "..."]]:
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
    tile_shape = (ROWS, columns)
    out_shape = (ROWS, head_dim)
    chunk_size, window = settings.chunk_size, settings.window
    tiles_per_chunk = num_scores // -(-length // chunk_size) // BLOCK

    def query_blocks(block):
        """First and end of the blocks of queries that see this block of keys."""
        if listed:
            first = lax.div(block, jnp.int32(tiles_per_chunk)) * chunk_size
            end = first + chunk_size
        else:
            first = block * BLOCK
            # The chunk that follows the last query with a key of the block in its window.
            last = jnp.maximum(first + BLOCK + window - 2, 0)
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

        @pl.when(warpgroup < WARPGROUPS)
        def _():
            plgpu.set_max_registers(232, action="increase")
            first_row = block * BLOCK + warpgroup * ROWS
            at = pl.ds(first_row, ROWS)
            arrived = k_ready.at[warpgroup]
            k_smem, v_smem, s_smem, u_smem = (
                x.at[warpgroup] for x in (k_smem2, v_smem2, s_smem2, u_smem2)
            )
            plgpu.copy_gmem_to_smem(key_slice(k_ref, batch, head, at), k_smem, arrived)
            plgpu.copy_gmem_to_smem(key_slice(v_ref, batch, head, at), v_smem, arrived)
            plgpu.copy_gmem_to_smem(s_ref.at[batch, head, at], s_smem, arrived)
            plgpu.copy_gmem_to_smem(u_ref.at[batch, head, at], u_smem, arrived)
            plgpu.barrier_wait(arrived)
            score, until = (plgpu.load(x, layout=BY_ROW) for x in (s_smem, u_smem))
            position = iota(ROWS, first_row, BY_ROW)

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
                    over_rows(plgpu.load(x.at[slot], layout=BY_COLUMN), tile_shape)
                    for x in (lse_smem, delta_smem, tau_smem)
                )
                query_position = over_rows(iota(columns, first_query, BY_COLUMN), tile_shape)
                seen_until = until
                if kind == "slab":
                    chunk_start = first_query - lax.rem(first_query, jnp.int32(chunk_size))
                    seen_until = jnp.where(position > chunk_start - window, until, 0)
                gates = tile_gates(
                    settings,
                    kind,
                    (query_position, tau),
                    tuple(over_columns(x, tile_shape) for x in (position, score, seen_until)),
                    with_interior=True,
                )
                weights, d_logits, d_gate = tile_cotangents(
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
                    in_window = lax.div(block * BLOCK + window, jnp.int32(columns)) - first_block
                    diagonal = jnp.minimum(BLOCK // columns, num_blocks)
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
                    full(out_shape, 0.0, TILE),
                    full(out_shape, 0.0, TILE),
                    full((ROWS,), 0.0, BY_ROW),
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

        @pl.when(warpgroup == WARPGROUPS)
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

    transforms = swizzle(head_dim, dtype)
    block = plgpu.SMEM((WARPGROUPS, ROWS, head_dim), dtype, transforms=transforms)
    stage = plgpu.SMEM((stages, columns, head_dim), dtype, transforms=transforms)
    vector = plgpu.SMEM((stages, columns), jnp.float32)
    return launch(
        kernel,
        out_type=[
            jax.ShapeDtypeStruct(keys.key.shape, dtype),
            jax.ShapeDtypeStruct(keys.value.shape, dtype),
            jax.ShapeDtypeStruct(keys.score.shape, jnp.float32),
        ],
        scratch_types=[
            block,
            block,
            plgpu.SMEM((WARPGROUPS, ROWS), jnp.float32),
            plgpu.SMEM((WARPGROUPS, ROWS), jnp.int32),
            plgpu.Barrier(num_barriers=WARPGROUPS, num_arrivals=4),
            stage,
            stage,
            vector,
            vector,
            vector,
            plgpu.Barrier(num_barriers=stages, num_arrivals=5),
            plgpu.Barrier(num_barriers=stages, num_arrivals=WARPGROUPS),
        ],
        grid=(num_kv_heads, num_scores // BLOCK, batch_size),
        grid_names=("head", "block", "batch"),
        specialised=True,
        operands=(query, *keys, *outcome),
    )
