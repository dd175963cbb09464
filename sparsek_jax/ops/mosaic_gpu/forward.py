"""The forward kernel: flash attention over the tiles of keys of a block of queries."""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Float32

from sparsek_jax.ops.block_config import BlockConfig
from sparsek_jax.ops.gating import gated_logits, gates_sum, times
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
from sparsek_jax.ops.mosaic_gpu.operands import LOWEST, Keys, Settings
from sparsek_jax.ops.mosaic_gpu.spans import for_tiles, query_block
from sparsek_jax.ops.mosaic_gpu.tile import LOG2E, Gates, masked, tile_gates


def forward(
    settings: Settings,
    config: BlockConfig,
    query: Float[Array, "B T N H"],
    rows: Keys,
    lists: Keys,
    tau: Float32[Array, "B K Tp"],
) -> list[Float[Array, "..."]]:
    """Returns the output `[B, T, N, H]` and the log2-sum-exp2 of the logits `[B, N, Tp]`."""
    batch_size, length, num_heads, head_dim = query.shape
    group = num_heads // rows.key.shape[2]
    dtype = query.dtype
    tile_shape = (ROWS, config.columns)
    out_shape = (ROWS, head_dim)

    def kernel(
        q_ref, k_ref, v_ref, s_ref, u_ref, lk_ref, lv_ref, ls_ref, lu_ref, tau_ref,
        out_ref, lse_ref, q_smem2, tau_smem2, lse_smem2, q_ready, turn, buffers,
    ):  # fmt: skip
        block = query_block(settings, group, length, config.columns)
        batch, head, warpgroup = block.batch, block.head, block.warpgroup

        def take_turns():
            plgpu.barrier_arrive(turn)
            plgpu.barrier_wait(turn)

        @pl.when(warpgroup < WARPGROUPS)
        def _():
            plgpu.set_max_registers(232, action="increase")
            q_smem, tau_smem = q_smem2.at[warpgroup], tau_smem2.at[warpgroup]
            first_row = block.first_query + warpgroup * ROWS
            at = pl.ds(first_row, ROWS)
            ready = q_ready.at[warpgroup]
            plgpu.copy_gmem_to_smem(q_ref.at[batch, at, head], q_smem, ready)
            plgpu.copy_gmem_to_smem(tau_ref.at[batch, block.kv_head, at], tau_smem, ready)
            plgpu.barrier_wait(ready)
            tau = plgpu.load(tau_smem, layout=BY_ROW)
            position = iota(ROWS, first_row, BY_ROW)

            def tile(step, index, kind, carry):
                acc, maximum, total = carry
                slot = lax.rem(step, jnp.int32(config.stages))
                plgpu.barrier_wait(buffers.key_ready.at[slot])

                def product(acc_ref):
                    plgpu.wgmma(acc_ref, q_smem, buffers.key.at[slot].transpose((1, 0)))
                    take_turns()
                    return acc_ref[...]

                logits = pl.run_scoped(product, plgpu.ACC(tile_shape, jnp.float32))
                gates = Gates(None, None, None)
                if kind != "window":
                    gates = tile_gates(
                        settings,
                        kind,
                        (over_columns(position, tile_shape), over_columns(tau, tile_shape)),
                        key_side(
                            settings, config, buffers, slot, index, block.chunk_start, tile_shape
                        ),
                    )
                plgpu.barrier_arrive(buffers.key_free.at[slot])
                logits = gated_logits(settings.gating, logits, gates.gate)
                logits = masked(gates.attended, logits, -jnp.inf)
                factor = settings.scale * LOG2E
                new_maximum = jnp.maximum(maximum, logits.max(axis=1) * factor)
                decay = jnp.exp2(maximum - new_maximum)
                p = jnp.exp2(logits * factor - over_columns(new_maximum, tile_shape))
                acc *= over_columns(decay, out_shape)
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
            acc, maximum, total = for_tiles(
                block.span,
                tile,
                (
                    full(out_shape, 0.0, TILE),
                    full((ROWS,), LOWEST, BY_ROW),
                    full((ROWS,), 0.0, BY_ROW),
                ),
            )
            pl.when(warpgroup == 0)(take_turns)

            # A query whose pool holds a NaN has a NaN for tau; `min` in the gate may have lost it.
            # Rows behind the end attend to nothing: zero, and probabilities of zero later.
            poison = tau * 0.0
            divisor = jnp.where(total > 0.0, total, 1.0) + poison
            q_smem[...] = (acc / over_columns(divisor, out_shape)).astype(dtype)
            lse = jnp.where(total > 0.0, maximum + jnp.log2(total), -LOWEST) + poison
            lse_smem2.at[warpgroup][...] = lse
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(q_smem, out_ref.at[batch, at, head])
            plgpu.copy_smem_to_gmem(lse_smem2.at[warpgroup], lse_ref.at[batch, head, at])
            plgpu.wait_smem_to_gmem(0)

        @pl.when(warpgroup == WARPGROUPS)
        def _():
            row_refs = Keys(k_ref, v_ref, s_ref, u_ref)
            list_refs = Keys(lk_ref, lv_ref, ls_ref, lu_ref)
            load_key_tiles(settings, config, block, row_refs, list_refs, buffers)

    padded = tau.shape[2]
    return launch(
        kernel,
        out_type=[
            jax.ShapeDtypeStruct(query.shape, dtype),
            jax.ShapeDtypeStruct((batch_size, num_heads, padded), jnp.float32),
        ],
        scratch_types=[
            plgpu.SMEM((WARPGROUPS, ROWS, head_dim), dtype, transforms=swizzle(head_dim, dtype)),
            plgpu.SMEM((WARPGROUPS, ROWS), jnp.float32),
            plgpu.SMEM((WARPGROUPS, ROWS), jnp.float32),
            plgpu.Barrier(num_barriers=WARPGROUPS, num_arrivals=2),
            plgpu.Barrier(num_arrivals=WARPGROUPS),
            key_buffers(config, head_dim, dtype),
        ],
        grid=(num_heads, padded // BLOCK, batch_size),
        grid_names=("head", "block", "batch"),
        specialised=True,
        operands=(query, *rows, *lists, tau),
    )
