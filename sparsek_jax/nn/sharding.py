"""Attention of several devices, each with its rows of the batch and its heads."""

import math
from collections.abc import Callable

import jax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P


def split_over_rows_and_heads(
    attend: Callable, sharding: NamedSharding, num_scores: int, num_kv_heads: int
) -> Callable:
    """Makes every device attend with its own rows of the batch and its own heads.

    Args:
      attend: Attention of `(query, key, value, scores, segment_ids)`, the last of which may be
        None, with one or several outputs of the shape of query. Members of the batch and KV heads
        must not depend on each other.
      sharding: Of the residual stream: the mesh, and the axes over which rows are split. Heads are
        split over all other axes, if their sizes divide the number of KV heads.
      num_scores: Score heads: the KV heads, or 1.
      num_kv_heads: KV heads.

    Returns:
      A function of the same arguments.
    """
    rows, heads = rows_and_heads(sharding, num_kv_heads)
    by_head = P(rows, None, heads)
    by_score = by_head if num_scores == num_kv_heads else P(rows)
    return jax.shard_map(
        attend,
        mesh=sharding.mesh,
        in_specs=(by_head, by_head, by_head, by_score, P(rows)),
        out_specs=by_head,
    )


def rows_and_heads(
    sharding: NamedSharding, num_kv_heads: int
) -> tuple[tuple[str, ...] | str | None, tuple[str, ...] | None]:
    """The mesh axes that rows of the batch and heads are split over, as entries of a spec.

    Args:
      sharding: Of the residual stream.
      num_kv_heads: KV heads.
    """
    mesh = sharding.mesh
    rows = sharding.spec[0] if sharding.spec else None
    taken = rows if isinstance(rows, tuple) else (rows,)
    others = tuple(axis for axis in mesh.axis_names if axis not in taken)
    fits = num_kv_heads % math.prod(mesh.shape[axis] for axis in others) == 0
    return rows, others if fits else None
