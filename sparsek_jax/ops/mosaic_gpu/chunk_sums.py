"""The kernel that adds up, over chunks, what each of them gives to a key of its list."""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int32

from sparsek_jax.ops.mosaic_gpu.launch import launch
from sparsek_jax.ops.mosaic_gpu.layouts import BY_ROW, ROWS, TILE, full, over_columns, swizzle


def sum_over_chunks(
    of_lists: list[Float[Array, "..."]], candidates: Int32[Array, "B K chunks L"]
) -> list[Float[Array, "..."]]:
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
    tile_shape = (ROWS, head_dim)
    before = jnp.pad(candidates, ((0, 0), (0, 0), (1, 0), (0, 0)), constant_values=-1)[:, :, :-1]
    same = (candidates == before).astype(jnp.int32).reshape(d_score.shape)

    def kernel(same_ref, *refs_and_scratch):
        in_refs, out_refs = refs_and_scratch[:3], refs_and_scratch[3:6]
        same_smem, buffers, results, ready = refs_and_scratch[6:]
        head, batch = lax.axis_index("head"), lax.axis_index("batch")
        first_slot = lax.axis_index("slots") * ROWS

        def at(chunk):
            return batch, head, pl.ds(chunk * list_size + first_slot, ROWS)

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
            same = plgpu.load(same_smem.at[stage], layout=BY_ROW) > 0
            new_totals = []
            # The previous chunk's results must have left their buffers.
            plgpu.wait_smem_to_gmem(0)
            for total, buffer, result in zip(totals, buffers, results, strict=True):
                layout = BY_ROW if len(total.shape) == 1 else TILE
                x = plgpu.load(buffer.at[stage], layout=layout).astype(jnp.float32)
                keep = same if len(total.shape) == 1 else over_columns(same, tile_shape)
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

        zeros = full(tile_shape, 0.0, TILE)
        lax.fori_loop(0, num_chunks, step, (zeros, zeros, full((ROWS,), 0.0, BY_ROW)))
        plgpu.wait_smem_to_gmem(0)

    transforms = swizzle(head_dim, d_key.dtype)

    def buffers(*leading):
        rows = plgpu.SMEM((*leading, *tile_shape), d_key.dtype, transforms=transforms)
        return rows, rows, plgpu.SMEM((*leading, ROWS), jnp.float32)

    return launch(
        kernel,
        out_type=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in of_lists],
        scratch_types=[
            plgpu.SMEM((stages, ROWS), jnp.int32),
            buffers(stages),
            buffers(),
            plgpu.Barrier(num_barriers=stages, num_arrivals=4),
        ],
        grid=(num_kv_heads, list_size // ROWS, batch_size),
        grid_names=("head", "slots", "batch"),
        operands=(same, *of_lists),
    )
