"""Tiles of keys on their way to the queries of a block: loaded by one warpgroup, read by others."""

from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.typing import DTypeLike
from jaxtyping import Array, Float32, Int32

from sparsek_jax.ops.block_config import BlockConfig
from sparsek_jax.ops.mosaic_gpu.layouts import BY_COLUMN, WARPGROUPS, iota, over_rows, swizzle
from sparsek_jax.ops.mosaic_gpu.operands import Keys, Settings
from sparsek_jax.ops.mosaic_gpu.spans import QueryBlock


class KeyBuffers(NamedTuple):
    """Tiles of keys in shared memory, and the barriers that tell of their arrival and release."""

    key: Array
    value: Array
    score: Array
    until: Array
    key_ready: Array
    value_ready: Array
    key_free: Array
    value_free: Array


def key_buffers(config: BlockConfig, head_dim: int, dtype: DTypeLike) -> KeyBuffers:
    """The scratch types that make such buffers."""
    stages, columns = config.stages, config.columns
    rows = plgpu.SMEM((stages, columns, head_dim), dtype, transforms=swizzle(head_dim, dtype))
    return KeyBuffers(
        rows,
        rows,
        plgpu.SMEM((stages, columns), jnp.float32),
        plgpu.SMEM((stages, columns), jnp.int32),
        plgpu.Barrier(num_barriers=stages, num_arrivals=3),
        plgpu.Barrier(num_barriers=stages),
        plgpu.Barrier(num_barriers=stages, num_arrivals=WARPGROUPS),
        plgpu.Barrier(num_barriers=stages, num_arrivals=WARPGROUPS),
    )


def load_key_tiles(
    settings: Settings,
    config: BlockConfig,
    block: QueryBlock,
    rows: Keys,
    lists: Keys,
    buffers: KeyBuffers,
) -> None:
    """Streams the tiles of one block of queries, in a warpgroup that does nothing else."""
    plgpu.set_max_registers(40, action="decrease")
    batch, head, span = block.batch, block.kv_head, block.span
    columns = config.columns
    padded_list = lists.score.shape[2] // (-(-rows.key.shape[1] // settings.chunk_size))

    def load(step, tile):
        slot = lax.rem(step, jnp.int32(config.stages))

        @pl.when(step >= config.stages)
        def _():
            plgpu.barrier_wait(buffers.key_free.at[slot])

        if tile is None:
            at = pl.ds(block.chunk * padded_list + step * columns, columns)
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


def key_side(
    settings: Settings,
    config: BlockConfig,
    buffers: KeyBuffers,
    slot: Int32[Array, ""],
    tile: Int32[Array, ""] | None,
    chunk_start: Int32[Array, ""],
    shape: tuple[int, int],
) -> tuple[
    Int32[Array, "rows columns"] | None,
    Float32[Array, "rows columns"],
    Int32[Array, "rows columns"],
]:
    """Loads the keys' `(position, score, until)` of a tile, broadcast to it.

    Args:
      settings: Of the call.
      config: Of the kernel.
      buffers: Of the keys.
      slot: Where in these the tile lies.
      tile: Its index; None for one of the list, whose keys have no positions.
      chunk_start: First query of the chunk.
      shape: Of the tile.
    """
    score = plgpu.load(buffers.score.at[slot], layout=BY_COLUMN)
    until = plgpu.load(buffers.until.at[slot], layout=BY_COLUMN)
    if tile is None:
        return None, over_rows(score, shape), over_rows(until, shape)
    position = iota(config.columns, tile * config.columns, BY_COLUMN)
    # Keys before the slab are the list's.
    until = jnp.where(position > chunk_start - settings.window, until, 0)
    return tuple(over_rows(x, shape) for x in (position, score, until))
