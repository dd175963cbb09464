"""Pure functions of arrays: the SparseK projection, causal selection, attention and its cache."""

from sparsek_jax.ops.attention import sparsek_attention
from sparsek_jax.ops.cache import SparseKCache, extend_cache, init_cache, reset_cache
from sparsek_jax.ops.projection import sparsek
from sparsek_jax.ops.selection import Selection, causal_selection

__all__ = [
    "Selection",
    "SparseKCache",
    "causal_selection",
    "extend_cache",
    "init_cache",
    "reset_cache",
    "sparsek",
    "sparsek_attention",
]
