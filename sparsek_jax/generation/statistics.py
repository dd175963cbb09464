"""How long generation took and what it had to remember."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp

from sparsek_jax.nn import DecoderConfig


@dataclasses.dataclass
class Statistics:
    """Counted while generating, over all rows of the batch.

    Attributes:
      prefill_tokens: Appended prompt tokens, each row's first of all included.
      prefill_seconds: Time that took, without compilation.
      decode_tokens: Chosen tokens, whether or not they are shown.
      decode_seconds: Time that took, without compilation.
      compile_seconds: Spent on compiling.
      held_tokens: In the cache.
      cache_bytes: Of the whole cache.
    """

    prefill_tokens: int = 0
    prefill_seconds: float = 0.0
    decode_tokens: int = 0
    decode_seconds: float = 0.0
    compile_seconds: float = 0.0
    held_tokens: int = 0
    cache_bytes: int = 0

    def report(self, config: DecoderConfig) -> str:
        """Two lines for people.

        Args:
          config: Of the model, for what dense attention would have to remember.
        """
        dense = _size(dense_cache_bytes(config, self.held_tokens))
        return (
            f"prefill {_rate(self.prefill_tokens, self.prefill_seconds)} | "
            f"decode {_rate(self.decode_tokens, self.decode_seconds)} | "
            f"compilation {self.compile_seconds:.1f} s, not counted\n"
            f"cache {_size(self.cache_bytes)}; with dense attention in every layer "
            f"{self.held_tokens:,} tokens would take {dense}"
        )


def dense_cache_bytes(config: DecoderConfig, num_tokens: int) -> int:
    """Bytes of the keys and values of so many tokens in every layer."""
    heads = config.attention.num_kv_heads * config.attention.head_dim
    return 2 * config.num_layers * num_tokens * heads * jnp.dtype(config.dtype).itemsize


def _rate(tokens: int, seconds: float) -> str:
    rate = f", {tokens / seconds:,.1f} tokens/s" if tokens and seconds else ""
    return f"{tokens:,} tokens{rate}"


def _size(num_bytes: int) -> str:
    size, unit = float(num_bytes), "bytes"
    for larger in ("KiB", "MiB", "GiB"):
        if size < 1024:
            break
        size, unit = size / 1024, larger
    return f"{size:,.0f} {unit}" if unit == "bytes" else f"{size:,.2f} {unit}"
