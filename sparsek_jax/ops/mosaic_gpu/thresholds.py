"""Thresholds of all prefixes of a row by a kernel that follows them, from many places at once.

Where each chunk of keys begins, a table of sums tells, over "the keys before the chunk" x "the
breakpoints above an edge", which edge is the first below each threshold. There is an edge at every
so many keys that open, and at every so many that close. From there the kernel goes on by itself
(ops/mosaic_gpu/walk.py).
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int32

from sparsek_jax.ops.breakpoints import Sums, fixed_point, resolution, tau_at
from sparsek_jax.ops.descent import thresholds_of_prefixes
from sparsek_jax.ops.indexing import gather, permute, rows_of
from sparsek_jax.ops.mosaic_gpu.walk import KthPlace, Place, SortedRows, WalkSettings, walk

_CHUNKS, _STRETCHES = 512, 64  # that a row, and its sorted keys, are cut into, at most
_CHUNK, _STRETCH = 16, 64  # keys of each, at least
_HALF = 16  # bits: two counts share an int32


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
    if length > 1 << _HALF - 1:
        return thresholds_of_prefixes(u, start, end, num_selected, packed=packed)
    settings = WalkSettings(
        min(num_selected, length - 1),
        length,
        max(_CHUNK, -(-length // _CHUNKS)),
        resolution(length),
    )
    rows = _sort(u, start, end, settings.bits, packed=packed)
    below, sums, kth = walk(settings, rows, *_begins(settings, rows))

    # f is at most k at the breakpoint right below the place.
    row = rows_of(u)
    rank, closes = below >> 1, below & 1
    value = gather(rows.high, row, rank) - (closes << settings.bits), gather(rows.low, row, rank)
    is_in_pool = gather(rows.key, row, rank) <= jnp.arange(length, dtype=jnp.int32)
    score = gather(rows.u, row, rank)
    tau = tau_at(score, closes, is_in_pool, sums, value, settings.k, settings.bits)
    return tau, gather(rows.key, row, kth)


def _sort(u, start, end, bits, *, packed):
    ids = jnp.broadcast_to(jnp.arange(u.shape[1], dtype=jnp.int32), u.shape)
    # Stable, so ties stay in order of position.
    keys = (start, -u) if packed else (-u,)
    *_, negative, key = jax.lax.sort((*keys, ids), num_keys=len(keys), is_stable=True)
    by_rank, rank = -negative, permute(ids, key)
    return SortedRows(
        key, by_rank, *fixed_point(by_rank, bits), rank, *fixed_point(u, bits), start, end
    )


def _begins(settings, rows):
    """The nearest edges below the thresholds of the keys before each chunk, as places."""
    _, length, chunk, bits = settings
    row = rows_of(rows.u)
    stretch = max(_STRETCH, -(-length // _STRETCHES))
    opened, closed, below = _edges(rows, stretch)
    num_edges = opened.shape[1] // 2
    counts, high, low = _table(settings, rows, opened, closed)

    begin = np.arange(0, length, chunk, dtype=np.int32)
    first, stop = (x[:, begin, None] for x in (rows.start, rows.end))
    # Of each key of earlier documents both breakpoints are above, and add up to one.
    sums = Sums(counts & ((1 << _HALF) - 1), high - (first << bits), low)
    value = gather(rows.high, row, below >> 1) - ((below & 1) << bits)
    of_edges = opened, closed, below, value, gather(rows.low, row, below >> 1)
    opened, closed, below, *value = (x[:, None] for x in of_edges)
    places = Place(opened, closed, sums, below, *value)
    kth_places = KthPlace(opened, (counts >> _HALF) - first)

    def nearest(is_below):
        """The first of a kind, from its number: the last one is below everything."""
        return jnp.sum(~is_below, axis=2, dtype=jnp.int32)

    def pick(places, edge):
        at = edge[..., None]

        def take(x):
            x = jnp.broadcast_to(x, counts.shape)
            return jnp.take_along_axis(x, at, axis=2, mode="promise_in_bounds")[..., 0]

        return jax.tree.map(take, places)

    is_below = places.is_below_tau(first, stop, settings.k, bits)
    kinds = nearest(is_below[..., :num_edges]), num_edges + nearest(is_below[..., num_edges:])
    opens, closes = (pick(places, edge) for edge in kinds)
    is_nearer = opens.depth < closes.depth
    to_tau = jax.tree.map(lambda x, y: jnp.where(is_nearer, x, y), opens, closes)
    is_below = kth_places.is_below_kth(first, stop, settings.k)
    to_kth = pick(kth_places, nearest(is_below[..., :num_edges]))
    # What is behind the document has entered none of its pools.
    stop = stop[..., 0]
    to_tau = to_tau._replace(
        opened=jnp.minimum(to_tau.opened, stop), closed=jnp.minimum(to_tau.closed, stop)
    )
    return to_tau, to_kth._replace(rank=jnp.minimum(to_kth.rank, stop))


def _edges(rows, stretch):
    """Of every edge, how many keys open and close above it, and the breakpoint next below.

    First come those where the first key of a stretch opens, then those where it closes, each with a
    last one that is below all.
    """
    num_rows, length = rows.u.shape
    row = rows_of(rows.u)
    rank = stretch * np.arange(1, -(-length // stretch) + 1, dtype=np.int32)
    at = np.minimum(rank, length - 1)
    first, stop = (gather(x, row, rows.key[:, at])[..., None] for x in (rows.start, rows.end))
    here, all_scores = rows.u[:, at, None], rows.u[:, None]
    all_ranks = np.arange(length, dtype=np.int32)

    def others(is_above):
        """How many are, of this document, and all of earlier ones."""
        is_above = (all_ranks < first) | ((all_ranks < stop) & is_above)
        return jnp.where(rank < length, jnp.sum(is_above, axis=-1, dtype=jnp.int32), length)

    # Of equal ones, what closes is below what opens.
    itself = jnp.broadcast_to(np.minimum(rank, length), (num_rows, len(rank)))
    opened = jnp.concatenate([itself, others(all_scores >= here - 1.0)], axis=1)
    closed = jnp.concatenate([others(all_scores - 1.0 > here), itself], axis=1)
    return opened, closed, np.concatenate([2 * at, 2 * at + 1])[None]


def _table(settings, rows, opened, closed):
    """Sums over the breakpoints of all keys before a chunk that are above an edge.

    Returns:
      `[3, R, chunks, edges]`: slopes and counts of opened keys, which share a number, and values'
      high and low parts.
    """
    _, length, chunk, bits = settings
    num_chunks = -(-length // chunk)
    one = jnp.ones_like(rows.rank)
    opening = jnp.stack([one + (one << _HALF), rows.key_high, rows.key_low])
    closing = jnp.stack([-one, (one << bits) - rows.key_high, -rows.key_low])

    def by_chunk(x, fill):
        padding = [(0, 0)] * (x.ndim - 1) + [(0, num_chunks * chunk - length)]
        return jnp.pad(x, padding, constant_values=fill).reshape(*x.shape[:-1], num_chunks, chunk)

    rank, opening, closing = by_chunk(rows.rank, length), by_chunk(opening, 0), by_chunk(closing, 0)
    of_chunk = 0
    for i in range(chunk):
        of_chunk += jnp.where(rank[..., i, None] < opened[:, None], opening[..., i, None], 0)
        of_chunk += jnp.where(rank[..., i, None] < closed[:, None], closing[..., i, None], 0)
    return jnp.cumsum(of_chunk, axis=2) - of_chunk
