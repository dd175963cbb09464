"""What every kind of attention layer remembers while a decoder generates.

All are pytrees of fixed shapes. In every array the first axis is the batch. Except for the
`SparseKCache`, nothing is nothing but zeros.
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Float32, Int, Int32

from sparsek_jax.nn.causal import positioned_attention, window_attention
from sparsek_jax.nn.config import AttentionConfig
from sparsek_jax.nn.norms import TimestepState
from sparsek_jax.ops import SparseKCache, reset_cache
from sparsek_jax.ops.checks import check_int
from sparsek_jax.ops.ring import ages, rows_in_order


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["sparsek", "norm"], meta_fields=[]
)
@dataclasses.dataclass(frozen=True)
class ScoredCache:
    """Of SparseK attention with its scoring network.

    Attributes:
      sparsek: Keys, values and scores.
      norm: What normalises the next scores; None without a norm.
    """

    sparsek: SparseKCache
    norm: TimestepState | None

    @property
    def length(self) -> Int32[Array, " B"]:
        """Tokens so far."""
        return self.sparsek.length


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["sparsek", "norm", "state"], meta_fields=[]
)
@dataclasses.dataclass(frozen=True)
class ScoredLinearCache(ScoredCache):
    """Of SparseK attention beside linear attention to the keys that were dropped.

    Attributes:
      state: Of every KV head, a matrix of key features and value channels, and of ones, which is
        the sum over the dropped keys.
    """

    state: Float32[Array, "B K H H+1"]


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["key", "value", "length"], meta_fields=[]
)
@dataclasses.dataclass(frozen=True)
class WindowCache:
    """Of sliding-window attention.

    Attributes:
      key: A ring: token p lies in row p % w.
      value: As `key`.
      length: Tokens so far.
    """

    key: Float[Array, "B w K H"]
    value: Float[Array, "B w K H"]
    length: Int32[Array, " B"]


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["key", "value", "length"], meta_fields=[]
)
@dataclasses.dataclass(frozen=True)
class DenseCache:
    """Of attention that has to remember all tokens and has room for so many.

    Attributes:
      key: Token p lies in row p.
      value: As `key`.
      length: Tokens so far.
    """

    key: Float[Array, "B M K H"]
    value: Float[Array, "B M K H"]
    length: Int32[Array, " B"]


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["window", "state"], meta_fields=[]
)
@dataclasses.dataclass(frozen=True)
class GatedLinearCache:
    """Of gated linear attention beside a window.

    Attributes:
      window: Keys and values of the window.
      state: Of every KV head, a matrix of key and value channels.
    """

    window: WindowCache
    state: Float32[Array, "B K H H"]

    @property
    def length(self) -> Int32[Array, " B"]:
        """Tokens so far."""
        return self.window.length


LayerCache = ScoredCache | WindowCache | DenseCache | GatedLinearCache


@functools.partial(jax.tree_util.register_dataclass, data_fields=["layers"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class DecoderCache:
    """Of all layers of a decoder, `Decoder.init_cache` makes an empty one.

    Attributes:
      layers: Caches in the order of the layers, also where their parameters are stacked.
    """

    layers: tuple[LayerCache, ...]

    @property
    def length(self) -> Int32[Array, " B"]:
        """Tokens so far."""
        return self.layers[0].length

    @property
    def num_lost(self) -> Int32[Array, " B"]:
        """Scores that had no room in the support of SparseK layers; exact gates as long as zero."""
        supports = [x.sparsek.support for x in self.layers if isinstance(x, ScoredCache)]
        lost = (x.num_lost.sum(axis=1) for x in supports if x is not None)
        return sum(lost, jnp.zeros_like(self.length))

    def reset(self, rows: Bool[Array, " B"]) -> "DecoderCache":
        """Empties the members of the batch that `rows`, a bool array `[B]`, marks."""

        def reset(layer):
            if isinstance(layer, ScoredCache):
                others = _zeroed(dataclasses.replace(layer, sparsek=None), rows)
                return dataclasses.replace(others, sparsek=reset_cache(layer.sparsek, rows))
            return _zeroed(layer, rows)

        return DecoderCache(tuple(reset(layer) for layer in self.layers))


def check_room(cache: DecoderCache, num_tokens: Int[Array, " B"]) -> None:
    """Raises ValueError if layers with a `DenseCache` lack room, as far as the lengths are known.

    Args:
      cache: The cache.
      num_tokens: How many tokens each member of the batch is about to append.
    """
    rooms = [x.key.shape[-3] for x in cache.layers if isinstance(x, DenseCache)]
    if not rooms or any(isinstance(x, jax.core.Tracer) for x in (cache.length, num_tokens)):
        return
    needed = np.asarray(cache.length) + np.asarray(num_tokens)
    if needed.max(initial=0) > min(rooms):
        raise ValueError(
            f"max_length={min(rooms)} tokens is the cache's room, which layers that remember all "
            f"tokens need; expected at least {needed.max()}"
        )


def init_window_cache(
    batch_size: int, config: AttentionConfig, dtype: jax.typing.DTypeLike
) -> WindowCache:
    """Makes an empty cache of `config.sliding_window` rows."""
    return WindowCache(*_empty(batch_size, config.sliding_window, config, dtype))


def init_gated_linear_cache(
    batch_size: int, config: AttentionConfig, dtype: jax.typing.DTypeLike
) -> GatedLinearCache:
    """Makes an empty cache of `config.sliding_window` rows and a matrix for every KV head."""
    state = jnp.zeros((batch_size, config.num_kv_heads, config.head_dim, config.head_dim))
    return GatedLinearCache(init_window_cache(batch_size, config, dtype), state)


def init_dense_cache(
    batch_size: int, max_length: int | None, config: AttentionConfig, dtype: jax.typing.DTypeLike
) -> DenseCache:
    """Makes an empty cache of `max_length` rows.

    Raises:
      TypeError: `max_length` is not an int.
      ValueError: It is missing or out of range.
    """
    if max_length is None:
        raise ValueError(
            "max_length=None; expected an int, as there are layers that remember all tokens"
        )
    check_int("max_length", max_length, 1)
    return DenseCache(*_empty(batch_size, max_length, config, dtype))


def _empty(batch_size, rows, config, dtype):
    shape = (batch_size, rows, config.num_kv_heads, config.head_dim)
    return jnp.zeros(shape, dtype), jnp.zeros(shape, dtype), jnp.zeros((batch_size,), jnp.int32)


def extend_dense_cache(
    cache: DenseCache,
    query: Float[Array, "B C N H"],
    key: Float[Array, "B C K H"],
    value: Float[Array, "B C K H"],
    num_tokens: Int[Array, " B"],
    attend: Callable[..., Float[Array, "B C N H"]] = positioned_attention,
) -> tuple[DenseCache, Float[Array, "B C N H"]]:
    """Appends the first `num_tokens` tokens and attends over all so far.

    Args:
      cache: What came before.
      query: Of the next tokens.
      key: Of the next tokens.
      value: Of the next tokens.
      num_tokens: How many of them each member of the batch appends.
      attend: Attention, with the arguments of `positioned_attention`.

    Returns:
      The new cache and the output. A token for which there is no room has NaN as its output.
    """
    room = cache.key.shape[1]
    appended, positions = _appended(cache, query, num_tokens)
    row = jnp.where(appended, positions, room)
    cache = DenseCache(
        _set_rows(cache.key, row, key),
        _set_rows(cache.value, row, value),
        cache.length + num_tokens,
    )
    out = attend(
        query,
        cache.key,
        cache.value,
        positions=positions,
        key_positions=jnp.arange(room, dtype=jnp.int32),
    )
    return cache, jnp.where((positions < room)[..., None, None], out, jnp.nan)


def extend_window_cache(
    cache: WindowCache,
    query: Float[Array, "B C N H"],
    key: Float[Array, "B C K H"],
    value: Float[Array, "B C K H"],
    num_tokens: Int[Array, " B"],
) -> tuple[WindowCache, Float[Array, "B C N H"]]:
    """Appends the first `num_tokens` tokens and attends over the newest w of each."""
    window = cache.key.shape[1]
    appended, positions = _appended(cache, query, num_tokens)
    length = cache.length + num_tokens
    age = ages(length, window)
    if query.shape[1] == 1:
        row = jnp.where(appended, positions % window, window)
        cache = WindowCache(
            _set_rows(cache.key, row, key), _set_rows(cache.value, row, value), length
        )
        out = positioned_attention(
            query,
            cache.key,
            cache.value,
            positions=positions,
            key_positions=length[:, None] - 1 - age,
        )
        return cache, out
    past = rows_in_order(cache.length, window)
    # What is not appended must not spread its NaNs through a product with zero.
    key, value = (
        jnp.concatenate([_rows(x, past), jnp.where(appended[..., None, None], y, 0)], axis=1)
        for x, y in ((cache.key, key), (cache.value, value))
    )
    # Rows that were never written come first, as a document of their own.
    num_missing = window - jnp.minimum(cache.length, window)
    exists = jnp.arange(key.shape[1]) >= num_missing[:, None]
    out = window_attention(
        jnp.pad(query, ((0, 0), (window, 0), (0, 0), (0, 0))),
        key,
        value,
        sliding_window=window,
        segment_ids=exists.astype(jnp.int32),
    )[:, window:]
    row = window - 1 + num_tokens[:, None] - age
    return WindowCache(_rows(key, row), _rows(value, row), length), out


def _appended(cache, query, num_tokens):
    """Which of the next tokens are appended, and all their positions, `[B, C]`."""
    number = jnp.arange(query.shape[1], dtype=jnp.int32)
    return number < num_tokens[:, None], cache.length[:, None] + number


def _zeroed(tree, rows):
    return jax.tree.map(
        lambda x: jnp.where(rows.reshape(rows.shape + (1,) * (x.ndim - 1)), 0, x), tree
    )


_rows = jax.vmap(lambda x, index: x.at[index].get(mode="promise_in_bounds"))
_set_rows = jax.vmap(lambda x, index, rows: x.at[index].set(rows, mode="drop"))
