"""SparseK attention (arXiv 2406.16747) in JAX and Flax."""

from sparsek_jax.ops import (
    Selection,
    SparseKCache,
    causal_selection,
    extend_cache,
    init_cache,
    reset_cache,
    sparsek,
    sparsek_attention,
)

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
