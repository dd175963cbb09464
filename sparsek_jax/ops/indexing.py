"""Gathers and scatters by one flat index.

XLA computes such an index on the spot, where it would write index vectors for several axes, or for
a mapped one, to memory first: on a GPU one launch instead of two or three.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int32, Shaped


def rows_of(x: Shaped[Array, "R n"]) -> Shaped[np.ndarray, "R 1"]:
    """The index of every row, to go with indices into rows."""
    return np.arange(x.shape[0], dtype=np.int32)[:, None]


def gather(x: Shaped[Array, "..."], *index: Array) -> Shaped[Array, "..."]:
    """`x[index]` of indices for the first axes, which are in bounds."""
    rest = x.shape[len(index) :]
    flat = _flat(x.shape[: len(index)], index)
    return x.reshape(-1, *rest).at[flat].get(mode="promise_in_bounds")


def scatter(
    x: Shaped[Array, "..."], index: tuple[Array, ...], values: Array, *, where: Array | None = None
) -> Shaped[Array, "..."]:
    """`x.at[index].set(values)` of distinct indices for all axes; only those `where` true."""
    flat = _flat(x.shape, index)
    if where is not None:
        flat = jnp.where(where, flat, x.size)
    values = jnp.broadcast_to(values, flat.shape)
    return x.reshape(-1).at[flat].set(values, mode="drop").reshape(x.shape)


def permute(x: Shaped[Array, "R n"], target: Int32[Array, "R n"]) -> Shaped[Array, "R n"]:
    """Moves `x[r, i]` to `target[r, i]`, of which every row is a permutation."""
    # As all of it is overwritten, nothing need be written first.
    return scatter(jax.lax.empty(x.shape, x.dtype), (rows_of(x), target), x)


def _flat(shape, index):
    flat = 0
    for i, size in zip(index, shape, strict=True):
        flat = flat * size + i
    return flat
