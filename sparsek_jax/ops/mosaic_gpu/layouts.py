"""How tiles are divided among warpgroups, and laid out in registers and in shared memory."""

import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.typing import ArrayLike, DTypeLike
from jaxtyping import Array, Float32, Int32, Shaped

ROWS = 64  # of one warpgroup's tile, the height of a wgmma instruction
WARPGROUPS = 2  # that compute; one more loads
BLOCK = ROWS * WARPGROUPS

TILE = plgpu.Layout.WGMMA
BY_ROW = plgpu.Layout.WGMMA.reduce(1)
BY_COLUMN = plgpu.Layout.WGMMA.reduce(0)


def swizzle(head_dim: int, dtype: DTypeLike) -> tuple:
    """Transforms that lay tiles out in shared memory as wgmma reads them."""
    elements = next(n for n in (64, 32, 16) if head_dim % n == 0)
    return (
        plgpu.TilingTransform((8, elements)),
        plgpu.SwizzleTransform(elements * jnp.dtype(dtype).itemsize),
    )


def over_columns(x: Shaped[Array, "rows"], shape: tuple[int, int]) -> Shaped[Array, "rows columns"]:
    """Repeats one number a row in every column of a tile of that shape."""
    return lax.broadcast_in_dim(x, shape, [0])


def over_rows(x: Shaped[Array, "columns"], shape: tuple[int, int]) -> Shaped[Array, "rows columns"]:
    """Repeats one number a column in every row of a tile of that shape."""
    return lax.broadcast_in_dim(x, shape, [1])


def full(shape: tuple[int, ...], value: float, layout: plgpu.Layout) -> Float32[Array, "..."]:
    """One value everywhere, in that layout."""
    return plgpu.layout_cast(jnp.full(shape, value, jnp.float32), layout)


def iota(size: int, first: ArrayLike, layout: plgpu.Layout) -> Int32[Array, "size"]:
    """Consecutive numbers from `first` on, in that layout."""
    return plgpu.broadcasted_iota(jnp.int32, (size,), 0, layout=layout) + first
