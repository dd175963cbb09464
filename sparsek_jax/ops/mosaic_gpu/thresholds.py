"""Thresholds of all prefixes of a row by a kernel that follows them, from many places at once.

Sorted keys are cut into stretches. There is an edge where the first key of each opens, and another
where it closes; a first kernel sums up what of every chunk's prefix is above each
(ops/mosaic_gpu/table.py). A second one takes the edge that is nearest below a threshold where a
chunk of keys begins, and goes on from there by itself (ops/mosaic_gpu/walk.py).
"""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int32

from sparsek_jax.ops.breakpoints import resolution, tau_at
from sparsek_jax.ops.descent import thresholds_of_prefixes
from sparsek_jax.ops.indexing import gather, rows_of
from sparsek_jax.ops.mosaic_gpu.sort import sort_rows
from sparsek_jax.ops.mosaic_gpu.table import Edges, WalkSettings, make_table
from sparsek_jax.ops.mosaic_gpu.walk import walk

_CHUNK, _STRETCH = 8, 32  # keys of each, at least


def thresholds_by_walking(
    u: Float[Array, "R M"],
    start: Int32[Array, "R M"],
    end: Int32[Array, "R M"],
    num_selected: int,
    *,
    packed: bool,
) -> tuple[Float[Array, "R M"], Int32[Array, "R M"]]:
    """`thresholds_of_prefixes` (ops/descent.py), which it leaves rows of more than 2^15 keys to.

    The k-th keys are the same, of pools of k keys and more. tau is the same up to rounding: the
    order among breakpoints of equal values is another.
    """
    length = u.shape[1]
    if length > 1 << 15:
        return thresholds_of_prefixes(u, start, end, num_selected, packed=packed)
    # Where there are few rows, tables may be larger. At most 0.8 MiB a row, or 19 MiB.
    num_stretches = min(max(1 << (768 // len(u)).bit_length() >> 1, 64), 256)
    num_chunks = min(8 * num_stretches, 1024)
    settings = WalkSettings(
        k=min(num_selected, length - 1),
        length=length,
        chunk=max(_CHUNK, -(-length // num_chunks)),
        stretch=max(_STRETCH, -(-length // num_stretches)),
        bits=resolution(length),
    )
    rows = sort_rows(u, start, end, settings.bits, packed=packed)
    edges = _edges(settings, rows)
    below, sums, kth = walk(settings, rows, edges, make_table(settings, rows, edges))

    # f is at most k at the breakpoint right below the place.
    row = rows_of(u)
    rank, closes = below >> 1, below & 1
    value = gather(rows.high, row, rank) - (closes << settings.bits), gather(rows.low, row, rank)
    is_in_pool = gather(rows.key, row, rank) <= jnp.arange(length, dtype=jnp.int32)
    score = gather(rows.u, row, rank)
    tau = tau_at(score, closes, is_in_pool, sums, value, settings.k, settings.bits)
    return tau, gather(rows.key, row, kth)


def _edges(settings, rows):
    length = settings.length
    row = rows_of(rows.u)
    rank = settings.stretch * np.arange(1, settings.num_stretches + 1, dtype=np.int32)
    at = np.minimum(rank, length - 1)
    first, stop = (gather(x, row, rows.key[:, at])[..., None] for x in (rows.start, rows.end))
    here, all_scores = rows.u[:, at], rows.u[:, None]
    all_ranks, is_last = np.arange(length, dtype=np.int32), (rank >= length)[:, None]

    def others(is_above):
        """How many are, of this document, and all of earlier ones."""
        is_above = (all_ranks < first) | ((all_ranks < stop) & is_above) | is_last
        return jnp.sum(is_above, axis=-1, dtype=jnp.int32)

    # Of equal ones, what closes is below what opens.
    here = here[..., None]
    return Edges(others(all_scores - 1.0 > here), others(all_scores >= here - 1.0))
