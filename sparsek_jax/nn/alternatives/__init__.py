"""What SparseK is compared with: other attention layers of nearly the same parameters.

Dense attention and a sliding window say what selection could gain at most and has to gain at least.
Some kinds select, with SparseK's operator and cache, by scores that nobody has to learn: a scorer
is worth what it is better than these.
"""

from sparsek_jax.nn.alternatives.blocks import BigBirdAttention, MobaAttention
from sparsek_jax.nn.alternatives.gated_linear import GatedLinearAttention
from sparsek_jax.nn.alternatives.hashing import LshAttention
from sparsek_jax.nn.alternatives.nsa import NativeSparseAttention
from sparsek_jax.nn.alternatives.plain import DenseAttention, WindowAttention
from sparsek_jax.nn.alternatives.selection import (
    KeyNormAttention,
    RandomAttention,
    SinkAttention,
    StridedAttention,
    UnlearnedSelection,
)
from sparsek_jax.nn.alternatives.sparsek_linear import SparseKLinearAttention
from sparsek_jax.nn.attention import SparseKAttention

LAYERS = {
    "sparsek": SparseKAttention,
    "dense": DenseAttention,
    "window": WindowAttention,
    "sinks": SinkAttention,
    "random": RandomAttention,
    "key_norm": KeyNormAttention,
    "strided": StridedAttention,
    "bigbird": BigBirdAttention,
    "moba": MobaAttention,
    "nsa": NativeSparseAttention,
    "lsh": LshAttention,
    "gated_linear": GatedLinearAttention,
    "sparsek_linear": SparseKLinearAttention,
}

__all__ = [
    "LAYERS",
    "BigBirdAttention",
    "DenseAttention",
    "GatedLinearAttention",
    "KeyNormAttention",
    "LshAttention",
    "MobaAttention",
    "NativeSparseAttention",
    "RandomAttention",
    "SinkAttention",
    "SparseKLinearAttention",
    "StridedAttention",
    "UnlearnedSelection",
    "WindowAttention",
]
