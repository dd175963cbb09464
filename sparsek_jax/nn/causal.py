"""Dense and sliding-window attention, causal, within documents.

Both are `jax.nn.dot_product_attention`: cuDNN's where the computation is lowered for CUDA and cuDNN
takes its dtype and head size, XLA's elsewhere. cuDNN's own masks do not know packed documents and
XLA's logits are quadratic, so packed rows, and XLA, take one chunk of queries at a time with an
explicit mask: memory linear in T.
"""

import functools
from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PyTree, Shaped

from sparsek_jax.ops.selection import document_bounds

Backend = Literal["cudnn", "xla"]

# XLA writes the logits of all heads of a chunk, cuDNN reads one mask for all heads.
_DENSE_CHUNK: dict[Backend, int] = {"cudnn": 1024, "xla": 256}
_WINDOW_CHUNK = 128


def dense_attention(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B T K H"],
    value: Float[Array, "B T K H"],
    *,
    segment_ids: Int[Array, "B T"] | None = None,
) -> Float[Array, "B T N H"]:
    """Causal attention over the whole document; shapes and dtypes as `sparsek_attention`."""
    start, _ = document_bounds(segment_ids, *query.shape[:2])
    packed = segment_ids is not None
    return _by_platform(
        functools.partial(_dense_chunks, "cudnn") if packed else functools.partial(_fused, None),
        functools.partial(_dense_chunks, "xla"),
        query,
        key,
        value,
        start,
    )


def window_attention(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B T K H"],
    value: Float[Array, "B T K H"],
    *,
    sliding_window: int,
    segment_ids: Int[Array, "B T"] | None = None,
) -> Float[Array, "B T N H"]:
    """Attention of query t over `t - sliding_window < j <= t` of its document; linear time in T."""
    batch, length = query.shape[:2]
    sliding_window = min(sliding_window, length)
    start, _ = document_bounds(segment_ids, batch, length)
    start = jnp.maximum(start, jnp.arange(length) - sliding_window + 1)
    chunks = functools.partial(_window_chunks, sliding_window)
    packed = segment_ids is not None
    return _by_platform(
        functools.partial(chunks, "cudnn") if packed else functools.partial(_fused, sliding_window),
        functools.partial(chunks, "xla"),
        query,
        key,
        value,
        start,
    )


def positioned_attention(
    query: Float[Array, "B C N H"],
    key: Float[Array, "B S K H"],
    value: Float[Array, "B S K H"],
    *,
    positions: Int[Array, "B C"],
    key_positions: Int[Array, "#B S"],
    sliding_window: int | None = None,
) -> Float[Array, "B C N H"]:
    """Attention of the query at position t over the keys at `0 <= j <= t`, or in its window."""

    def attend(query, positions):
        start = jnp.zeros_like(positions)
        if sliding_window is not None:
            start = jnp.maximum(start, positions - sliding_window + 1)
        return _masked_attention("xla", query, key, value, start, positions, key_positions)

    return over_query_chunks(attend, query, positions)


def over_query_chunks(
    attend: Callable[..., PyTree],
    *per_query: Shaped[Array, "B T ..."],
    chunk_size: int | None = None,
) -> PyTree:
    """Applies a function to a chunk of queries at a time, and again in the backward pass.

    Args:
      attend: Of arrays `[B, C, ...]`, returns such arrays. Gradients of what it closes over are
        summed over the chunks in its dtype, which should be float32 where they matter.
      *per_query: Its arguments for all queries.
      chunk_size: C, by default what suits logits of all heads and keys.

    Returns:
      What it returns, for all queries.
    """
    length = per_query[0].shape[1]
    chunk_size = chunk_size or min(_DENSE_CHUNK["xla"], length)
    attend = jax.checkpoint(attend)
    if chunk_size == length:
        return attend(*per_query)
    chunks = [split_chunks(x, chunk_size) for x in per_query]
    outs = jax.lax.map(lambda chunk: attend(*chunk), chunks)
    return jax.tree.map(lambda x: join_chunks(x)[:, :length], outs)


def _by_platform(cuda: Callable, default: Callable, *arguments: Array) -> Array:
    """Calls `cuda` where that is lowered for CUDA and cuDNN takes the arguments, else `default`."""
    if arguments[0].dtype not in (jnp.bfloat16, jnp.float16):
        return default(*arguments)
    # Only tracing tells whether cuDNN is there (RuntimeError) and takes the head size
    # (NotImplementedError).
    try:
        jax.eval_shape(cuda, *arguments)
    except (RuntimeError, NotImplementedError):
        return default(*arguments)
    return jax.lax.platform_dependent(*arguments, cuda=cuda, default=default)


def _fused(sliding_window: int | None, query, key, value, start):
    del start
    length = query.shape[1]
    # The position that makes an odd length even lies after all others: causally out of sight.
    query, key, value = (join_chunks(split_chunks(x, _even(length))) for x in (query, key, value))
    out = jax.nn.dot_product_attention(
        query,
        key,
        value,
        is_causal=True,
        local_window_size=None if sliding_window is None else (sliding_window - 1, 0),
        implementation="cudnn",
    )
    return out[:, :length]


def _dense_chunks(backend: Backend, query, key, value, start):
    chunk_size = _even(min(_DENSE_CHUNK[backend], query.shape[1]))
    dtype = key.dtype
    # The chunks' gradients of keys and values are summed outside: in float32.
    key, value = (
        join_chunks(split_chunks(x, chunk_size)).astype(jnp.float32) for x in (key, value)
    )
    key_positions = jnp.arange(key.shape[1])

    def attend(query, start, query_positions):
        return _masked_attention(
            backend,
            query,
            key.astype(dtype),
            value.astype(dtype),
            start,
            query_positions,
            key_positions,
        )

    query_positions = jnp.broadcast_to(jnp.arange(query.shape[1]), start.shape)
    return over_query_chunks(attend, query, start, query_positions, chunk_size=chunk_size)


def _window_chunks(sliding_window: int, backend: Backend, query, key, value, start):
    length = query.shape[1]
    # A chunk at least as long as the window needs only itself and the chunk before.
    chunk_size = _even(min(max(sliding_window, _WINDOW_CHUNK), length))

    def with_previous(x):
        x = split_chunks(x, chunk_size)
        previous = jnp.concatenate([jnp.zeros_like(x[:1]), x[:-1]])
        return jnp.concatenate([previous, x], axis=2)

    @jax.checkpoint
    def attend(chunk):
        query, key, value, start, query_positions = chunk
        key_positions = query_positions[0] - chunk_size + jnp.arange(2 * chunk_size)
        return _masked_attention(backend, query, key, value, start, query_positions, key_positions)

    chunks = (split_chunks(query, chunk_size), with_previous(key), with_previous(value))
    query_positions = jnp.arange(chunks[0].shape[0] * chunk_size).reshape(-1, chunk_size)
    inputs = (*chunks, split_chunks(start, chunk_size), query_positions)
    return join_chunks(jax.lax.map(attend, inputs))[:, :length]


def _masked_attention(backend: Backend, query, key, value, start, query_positions, key_positions):
    """Attention of query t over the keys at `start <= j <= t`."""
    key_positions = key_positions[..., None, :]
    mask = (key_positions >= start[..., None]) & (key_positions <= query_positions[..., None])
    return jax.nn.dot_product_attention(
        query, key, value, mask=mask[:, None], implementation=backend
    )


def _even(size: int) -> int:
    # JAX has no gradient of cuDNN's attention for an odd length (0.11.2).
    return size + size % 2


def split_chunks(x: Shaped[Array, "B T ..."], chunk_size: int) -> Shaped[Array, "chunks B C ..."]:
    """Cuts T into chunks, the last one filled up with copies of the last position."""
    batch, length = x.shape[:2]
    widths = [(0, 0), (0, -length % chunk_size)] + [(0, 0)] * (x.ndim - 2)
    x = jnp.pad(x, widths, mode="edge")
    return jnp.moveaxis(x.reshape(batch, -1, chunk_size, *x.shape[2:]), 1, 0)


def join_chunks(x: Shaped[Array, "chunks B C ..."]) -> Shaped[Array, "B T ..."]:
    """Undoes `split_chunks`, but for what it filled up."""
    x = jnp.moveaxis(x, 0, 1)
    return x.reshape(x.shape[0], -1, *x.shape[3:])
