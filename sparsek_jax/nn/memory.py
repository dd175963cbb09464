"""What an attention layer hands from a row of a batch to the next row of the same document."""

from typing import NamedTuple

from sparsek_jax.nn.norms import TimestepState
from sparsek_jax.ops.memory import Memory


class LayerMemory(NamedTuple):
    """Of one layer; in every array the first axis is the batch.

    Attributes:
      keys: Keys, values and scores.
      norm: What normalises the next scores; None where nothing does.
    """

    keys: Memory
    norm: TimestepState | None


# Of a decoder, by layer.
DecoderMemory = tuple[LayerMemory, ...]
