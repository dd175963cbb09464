"""What SparseK attention is compared and mixed with: dense and sliding-window attention."""

import functools
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Int32

from sparsek_jax.nn.attention import SelfAttention
from sparsek_jax.ops.selection import document_bounds

# Queries that attend at a time where no fused kernel masks by itself; with it the logits, or
# cuDNN's mask, take memory linear in T.
_QUERIES_AT_A_TIME = {"xla": 256, "cudnn": 1024}


class DenseAttention(SelfAttention):
    """Every token attends to all earlier ones of its document."""

    def attend(self, query, key, value, scores, segment_ids):
        """Applies `causal_attention`."""
        del scores
        return causal_attention(query, key, value, segment_ids=segment_ids)


class WindowAttention(SelfAttention):
    """Every token attends to the newest `sliding_window` of its document, its own included."""

    def attend(self, query, key, value, scores, segment_ids):
        """Applies `causal_attention` with a window."""
        del scores
        return causal_attention(
            query,
            key,
            value,
            sliding_window=self.config.sliding_window,
            segment_ids=segment_ids,
        )


def causal_attention(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B T K H"],
    value: Float[Array, "B T K H"],
    *,
    sliding_window: int | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
) -> Float[Array, "B T N H"]:
    """Causal softmax attention through `jax.nn.dot_product_attention`, memory linear in T.

    Where the computation is lowered for CUDA, and cuDNN takes its dtype and head size, this is
    cuDNN's flash attention. Its causal and window masks do not know packed documents: with
    `segment_ids` it gets the mask of one chunk of queries at a time. Elsewhere XLA does these
    chunks.

    Args:
      query: `[B, T, N, H]`, N a multiple of K.
      key: `[B, T, K, H]`.
      value: `[B, T, K, H]`.
      sliding_window: Query t sees keys t - w < j <= t; time is then linear in T. None: all j <= t.
      segment_ids: Ids of packed documents (maximal runs of equal ids).

    Returns:
      Shape and dtype of `query`.
    """
    batch, length = query.shape[:2]
    if sliding_window is not None and sliding_window >= length:
        sliding_window = None
    oldest, _ = document_bounds(segment_ids, batch, length)
    if sliding_window is not None:
        oldest = jnp.maximum(oldest, jnp.arange(length) - sliding_window + 1)
    chunked = functools.partial(_attend_in_chunks, sliding_window)
    on_cuda = functools.partial(chunked, "cudnn")
    if segment_ids is None:
        on_cuda = functools.partial(_attend_fused, sliding_window)
    elsewhere = functools.partial(chunked, "xla")
    arguments = (query, key, value, oldest)
    if not _is_supported(on_cuda, *arguments):
        return elsewhere(*arguments)
    return jax.lax.platform_dependent(*arguments, cuda=on_cuda, default=elsewhere)


def _is_supported(function, *arguments) -> bool:
    # JAX has no other way to ask what cuDNN takes: it raises while it is traced, RuntimeError if
    # cuDNN is not installed, NotImplementedError for a dtype or a head size.
    try:
        jax.eval_shape(function, *arguments)
    except (RuntimeError, NotImplementedError):
        return False
    return True


def _attend_fused(sliding_window, query, key, value, oldest):
    del oldest
    return jax.nn.dot_product_attention(
        query,
        key,
        value,
        is_causal=True,
        local_window_size=None if sliding_window is None else (sliding_window - 1, 0),
        implementation="cudnn",
    )


def _attend_in_chunks(
    sliding_window, implementation: Literal["xla", "cudnn"], query, key, value, oldest
):
    """Attends to keys `oldest[t] <= j <= t`, one chunk of queries after the other."""
    length = query.shape[1]
    size = max(_QUERIES_AT_A_TIME[implementation], sliding_window or 0)
    # cuDNN's gradient wants even lengths.
    size = min(size, length + length % 2)
    count = -(-length // size)
    padding = count * size - length

    def pad(x):
        return jnp.pad(x, ((0, 0), (0, padding), *((0, 0),) * (x.ndim - 2)))

    def chunks(x):
        x = x.reshape(x.shape[0], count, size, *x.shape[2:])
        return jnp.moveaxis(x, 1, 0)

    query, key, value, oldest = map(pad, (query, key, value, oldest))
    first = jnp.arange(count, dtype=jnp.int32) * size
    own = (first, chunks(query), chunks(oldest))
    if sliding_window is None:
        # Their gradients are summed over the chunks: not in bfloat16.
        wide_key, wide_value = key.astype(jnp.float32), value.astype(jnp.float32)

        @jax.checkpoint
        def attend(chunk):
            first, query, oldest = chunk
            return _attend(
                implementation,
                query,
                wide_key.astype(key.dtype),
                wide_value.astype(value.dtype),
                _mask(first, oldest, jnp.arange(count * size)),
            )

        out = jax.lax.map(attend, own)
    else:
        # No window reaches further back than the chunk before.
        def with_previous(x):
            x = chunks(x)
            previous = jnp.concatenate([jnp.zeros_like(x[:1]), x[:-1]])
            return jnp.concatenate([previous, x], axis=2)

        @jax.checkpoint
        def attend(chunk):
            first, query, oldest, key, value = chunk
            mask = _mask(first, oldest, first - size + jnp.arange(2 * size))
            return _attend(implementation, query, key, value, mask)

        out = jax.lax.map(attend, (*own, with_previous(key), with_previous(value)))
    out = jnp.moveaxis(out, 0, 1)
    return out.reshape(out.shape[0], -1, *out.shape[3:])[:, :length]


def _mask(
    first: Int32[Array, ""], oldest: Int32[Array, "B C"], key_position: Int32[Array, " S"]
) -> Bool[Array, "B 1 C S"]:
    query_position = first + jnp.arange(oldest.shape[1])
    seen = (key_position <= query_position[:, None]) & (key_position >= oldest[..., None])
    return seen[:, None]


def _attend(implementation, query, key, value, mask):
    return jax.nn.dot_product_attention(query, key, value, mask=mask, implementation=implementation)
