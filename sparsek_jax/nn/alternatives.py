"""What SparseK is compared with: dense and sliding-window attention, causal, within documents.

On GPU in half precision both run on cuDNN when rows are not packed. cuDNN takes a mask only as a
[T, T] array, so packed rows, like every other device, use chunks of queries: memory linear in T.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from sparsek_jax.ops.selection import document_bounds

_DENSE_CHUNK = 512


def dense_attention(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B T K H"],
    value: Float[Array, "B T K H"],
    *,
    segment_ids: Int[Array, "B T"] | None = None,
) -> Float[Array, "B T N H"]:
    """Causal attention over the whole document; shapes and dtypes as `sparsek_attention`."""
    if segment_ids is None and _cudnn_supports(query):
        return jax.nn.dot_product_attention(
            query, key, value, is_causal=True, implementation="cudnn"
        )
    batch, length = query.shape[:2]
    chunk_size = min(_DENSE_CHUNK, length)
    start, _ = document_bounds(segment_ids, batch, length)
    positions = jnp.arange(length)

    def chunk(inputs):
        query, start, query_positions = inputs
        return _masked_attention(query, key, value, start, query_positions, positions)

    chunks = (_split(query, chunk_size), _split(start, chunk_size))
    query_positions = jnp.arange(chunks[0].shape[0] * chunk_size).reshape(-1, chunk_size)
    out = jax.lax.map(jax.checkpoint(chunk), (*chunks, query_positions))
    return _join(out, length)


def window_attention(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B T K H"],
    value: Float[Array, "B T K H"],
    *,
    sliding_window: int,
    segment_ids: Int[Array, "B T"] | None = None,
) -> Float[Array, "B T N H"]:
    """Attention of query t over `t - sliding_window < j <= t` of its document; linear time in T."""
    if segment_ids is None and _cudnn_supports(query):
        return jax.nn.dot_product_attention(
            query,
            key,
            value,
            is_causal=True,
            local_window_size=(sliding_window - 1, 0),
            implementation="cudnn",
        )
    batch, length = query.shape[:2]
    # A chunk at least as long as the window needs only itself and the chunk before.
    chunk_size = min(max(sliding_window, 128), length)
    start, _ = document_bounds(segment_ids, batch, length)
    start = jnp.maximum(start, jnp.arange(length) - sliding_window + 1)

    def with_previous(x):
        x = _split(x, chunk_size)
        previous = jnp.concatenate([jnp.zeros_like(x[:1]), x[:-1]])
        return jnp.concatenate([previous, x], axis=2)

    def chunk(inputs):
        query, key, value, start, query_positions = inputs
        key_positions = query_positions[0] - chunk_size + jnp.arange(2 * chunk_size)
        return _masked_attention(query, key, value, start, query_positions, key_positions)

    chunks = (_split(query, chunk_size), with_previous(key), with_previous(value))
    query_positions = jnp.arange(chunks[0].shape[0] * chunk_size).reshape(-1, chunk_size)
    inputs = (*chunks, _split(start, chunk_size), query_positions)
    return _join(jax.lax.map(jax.checkpoint(chunk), inputs), length)


def _cudnn_supports(query) -> bool:
    half = query.dtype in (jnp.bfloat16, jnp.float16)
    head_dim = query.shape[-1]
    return jax.default_backend() == "gpu" and half and head_dim % 8 == 0 and head_dim <= 128


def _masked_attention(query, key, value, start, query_positions, key_positions):
    """Attention of query t over the keys at `start <= j <= t`."""
    mask = (key_positions >= start[..., None]) & (key_positions <= query_positions[:, None])
    return jax.nn.dot_product_attention(query, key, value, mask=mask[:, None])


def _split(x, chunk_size):
    """`[B, T, ...]` to `[chunks, B, C, ...]`, filled up with copies of the last position."""
    batch, length = x.shape[:2]
    widths = [(0, 0), (0, -length % chunk_size)] + [(0, 0)] * (x.ndim - 2)
    x = jnp.pad(x, widths, mode="edge")
    return jnp.moveaxis(x.reshape(batch, -1, chunk_size, *x.shape[2:]), 1, 0)


def _join(x, length):
    x = jnp.moveaxis(x, 0, 1)
    return x.reshape(x.shape[0], -1, *x.shape[3:])[:, :length]
