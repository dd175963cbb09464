"""SparseK attention (arXiv 2406.16747) in JAX and Flax."""

from sparsek_jax.ops import Selection, causal_selection, sparsek, sparsek_attention

__all__ = ["Selection", "causal_selection", "sparsek", "sparsek_attention"]
