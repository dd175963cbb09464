"""The backward kernel by query, which has the gradients of queries and thresholds."""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float

from sparsek_jax.ops.block_config import BlockConfig
from sparsek_jax.ops.mosaic_gpu.key_tiles import key_buffers, key_side, load_key_tiles
from sparsek_jax.ops.mosaic_gpu.launch import launch
from sparsek_jax.ops.mosaic_gpu.layouts import (
    BLOCK,
    BY_ROW,
    ROWS,
    TILE,
    WARPGROUPS,
    full,
    iota,
    over_columns,
    swizzle,
)
from sparsek_jax.ops.mosaic_gpu.operands import Keys, Outcome, Settings
from sparsek_jax.ops.mosaic_gpu.spans import for_tiles, query_block
from sparsek_jax.ops.mosaic_gpu.tile import Gates, tile_cotangents, tile_gates


def query_backward(
    settings: Settings,
    config: BlockConfig,
    query: Float[Array, "B T N H"],
    rows: Keys,
    lists: Keys,
    outcome: Outcome,
) -> list[Float[Array, "..."]]:
    """Returns the gradients of the queries `[B, T, N, H]` and of tau, by head, `[B, N, Tp]`."""
    batch_size, length, num_heads, head_dim = query.shape
    group = num_heads // rows.key.shape[2]
    dtype = query.dtype
    tile_shape = (ROWS, config.columns)
    out_shape = (ROWS, head_dim)

    def kernel(
        q_ref, k_ref, v_ref, s_ref, u_ref, lk_ref, lv_ref, ls_ref, lu_ref,
        do_ref, lse_ref, delta_ref, tau_ref, dq_ref, dtau_ref,
        q_smem2, do_smem2, tau_smem2, lse_smem2, delta_smem2, q_ready, buffers,
    ):  # fmt: skip
        block = query_block(settings, group, length, config.columns)
        batch, head, warpgroup = block.batch, block.head, block.warpgroup

        @pl.when(warpgroup < WARPGROUPS)
        def _():
            plgpu.set_max_registers(232, action="increase")
            first_row = block.first_query + warpgroup * ROWS
            at = pl.ds(first_row, ROWS)
            ready = q_ready.at[warpgroup]
            q_smem, do_smem = q_smem2.at[warpgroup], do_smem2.at[warpgroup]
            vectors = [x.at[warpgroup] for x in (tau_smem2, lse_smem2, delta_smem2)]
            plgpu.copy_gmem_to_smem(q_ref.at[batch, at, head], q_smem, ready)
            plgpu.copy_gmem_to_smem(do_ref.at[batch, at, head], do_smem, ready)
            plgpu.copy_gmem_to_smem(tau_ref.at[batch, block.kv_head, at], vectors[0], ready)
            plgpu.copy_gmem_to_smem(lse_ref.at[batch, head, at], vectors[1], ready)
            plgpu.copy_gmem_to_smem(delta_ref.at[batch, head, at], vectors[2], ready)
            plgpu.barrier_wait(ready)
            tau, lse, delta = (plgpu.load(x, layout=BY_ROW) for x in vectors)
            position = iota(ROWS, first_row, BY_ROW)

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
                gates = Gates(None, None, None)
                if kind != "window":
                    gates = tile_gates(
                        settings,
                        kind,
                        (over_columns(position, tile_shape), over_columns(tau, tile_shape)),
                        key_side(
                            settings, config, buffers, slot, index, block.chunk_start, tile_shape
                        ),
                        with_interior=True,
                    )
                _, d_logits, d_gate = tile_cotangents(
                    settings,
                    gates,
                    logits,
                    d_weight,
                    over_columns(lse, tile_shape),
                    over_columns(delta, tile_shape),
                )
                if d_gate is not None:
                    d_tau -= d_gate.sum(axis=1)
                d_logits = d_logits.astype(dtype)

                def add(acc_ref):
                    plgpu.wgmma(acc_ref, d_logits, buffers.key.at[slot])

                acc = pl.run_state(add)(plgpu.ACC.init(acc))
                plgpu.barrier_arrive(buffers.key_free.at[slot])
                return acc, d_tau

            acc, d_tau = for_tiles(
                block.span, tile, (full(out_shape, 0.0, TILE), full((ROWS,), 0.0, BY_ROW))
            )
            q_smem[...] = (acc * settings.scale).astype(dtype)
            vectors[0][...] = d_tau
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(q_smem, dq_ref.at[batch, at, head])
            plgpu.copy_smem_to_gmem(vectors[0], dtau_ref.at[batch, head, at])
            plgpu.wait_smem_to_gmem(0)

        @pl.when(warpgroup == WARPGROUPS)
        def _():
            row_refs = Keys(k_ref, v_ref, s_ref, u_ref)
            list_refs = Keys(lk_ref, lv_ref, ls_ref, lu_ref)
            load_key_tiles(settings, config, block, row_refs, list_refs, buffers)

    matrix = plgpu.SMEM((WARPGROUPS, ROWS, head_dim), dtype, transforms=swizzle(head_dim, dtype))
    vector = plgpu.SMEM((WARPGROUPS, ROWS), jnp.float32)
    padded = outcome.tau.shape[2]
    return launch(
        kernel,
        out_type=[
            jax.ShapeDtypeStruct(query.shape, dtype),
            jax.ShapeDtypeStruct((batch_size, num_heads, padded), jnp.float32),
        ],
        scratch_types=[
            matrix,
            matrix,
            vector,
            vector,
            vector,
            plgpu.Barrier(num_barriers=WARPGROUPS, num_arrivals=5),
            key_buffers(config, head_dim, dtype),
        ],
        grid=(num_heads, padded // BLOCK, batch_size),
        grid_names=("head", "block", "batch"),
        specialised=True,
        operands=(query, *rows, *lists, *outcome),
    )
