"""What the kernels are given."""

from typing import NamedTuple

from jaxtyping import Array, Float

from sparsek_jax.ops.block_config import KernelConfigs
from sparsek_jax.ops.gating import Gating

LOWEST = -1e30  # finite, so that differences of two of it are no NaN


class Settings(NamedTuple):
    """Of a call; all of it is known when the call is compiled.

    Attributes:
      chunk_size: Queries per chunk, C.
      list_size: k.
      window: w.
      scale: Factor on the logits.
      gating: As in `sparsek_attention`.
      packed: Whether rows hold several documents.
      configs: Tile sizes.
    """

    chunk_size: int
    list_size: int
    window: int
    scale: float
    gating: Gating
    packed: bool
    configs: KernelConfigs


class Keys(NamedTuple):
    """Keys in order of position, or in lists.

    Heads are second for lists `[B, K, R, H]` and third for rows `[B, T, K, H]`; scores and ends of
    attention are `[B, K, ...]`.
    """

    key: Array
    value: Array
    score: Array
    until: Array


class Outcome(NamedTuple):
    """What the backward pass knows of every query, beside the query itself.

    Attributes:
      d_out: Cotangent of the output.
      lse: log2-sum-exp2 of the logits.
      delta: Of out and its cotangent, the product: what the softmax's gradient subtracts.
      tau: As in `Selection`, at least `LOWEST`.
    """

    d_out: Float[Array, "B T N H"]
    lse: Float[Array, "B N Tp"]
    delta: Float[Array, "B N Tp"]
    tau: Float[Array, "B K Tp"]
