"""Thresholds of all prefixes of a row by a kernel that follows them, from many places at once.

Keys are sorted (ops/mosaic_gpu/sort.py), and edges put between them (ops/mosaic_gpu/edges.py). A
table tells what of every chunk's prefix is above each (ops/mosaic_gpu/table.py). A last kernel
takes the edge that is nearest below a threshold where a chunk of keys begins, and goes on from
there by itself (ops/mosaic_gpu/walk.py).
"""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from sparsek_jax.ops.breakpoints import resolution, tau_at
from sparsek_jax.ops.descent import thresholds_of_prefixes
from sparsek_jax.ops.indexing import gather, rows_of
from sparsek_jax.ops.mosaic_gpu.edges import WalkSettings, find_edges
from sparsek_jax.ops.mosaic_gpu.sort import UNIT, sort_rows
from sparsek_jax.ops.mosaic_gpu.table import make_table
from sparsek_jax.ops.mosaic_gpu.walk import walk

LONGEST = 1 << 15  # of rows whose thresholds are followed

_CHUNKS = 2048  # of a row, at most
_FEW = 6  # rows, at most
_STRETCH = 32  # sorted keys of a stretch, at least, of a row that has a key at each place


def thresholds_by_walking(
    u: Float[Array, "R M"],
    start: Int32[Array, "R M"],
    end: Int32[Array, "R M"],
    num_selected: int,
    *,
    packed: bool,
) -> tuple[Float[Array, "R M"], Int32[Array, "R M"]]:
    """`thresholds_of_prefixes` (ops/descent.py), which it leaves rows that are too long to.

    The k-th keys are the same, of pools of k keys and more in rows of more than k. tau is the same
    up to rounding: the order among breakpoints of equal values is another. What has an empty
    document is no key, as `sort_rows` says, and takes no time. Every row has a key.
    """
    length = u.shape[1]
    if length > LONGEST:
        return thresholds_of_prefixes(u, start, end, num_selected, packed=packed)
    # Where there are few rows, tables may be larger. At most 3 MiB a row, or 36 MiB.
    num_stretches = 128 if len(u) <= _FEW else 64
    settings = WalkSettings(
        k=min(num_selected, length - 1),
        num_chunks=min(_CHUNKS, -(-length // UNIT)),
        num_stretches=min(num_stretches, -(-length // _STRETCH)),
        bits=resolution(length),
    )
    rows = sort_rows(u, start, end, settings.bits, packed=packed)
    edges = find_edges(settings, rows)
    below, sums, kth = walk(settings, rows, edges, make_table(settings, rows, edges))

    # f is at most k at the breakpoint right below the place.
    row = rows_of(u)
    key = jnp.arange(rows.u.shape[1], dtype=jnp.int32)
    is_key = key < rows.num_keys[:, None]
    below, kth = (jnp.where(is_key, x, 0) for x in (below, kth))
    rank, closes = below >> 1, below & 1
    value = gather(rows.high, row, rank) - (closes << settings.bits), gather(rows.low, row, rank)
    is_in_pool = gather(rows.key, row, rank) <= key
    score = gather(rows.u, row, rank)
    tau = tau_at(score, closes, is_in_pool, sums, value, settings.k, settings.bits)
    return tau[:, :length], gather(rows.key, row, kth)[:, :length]
