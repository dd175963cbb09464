"""Pure functions of arrays: the SparseK projection, causal selection and attention."""

from sparsek_jax.ops.attention import sparsek_attention
from sparsek_jax.ops.projection import sparsek
from sparsek_jax.ops.selection import Selection, causal_selection

__all__ = ["Selection", "causal_selection", "sparsek", "sparsek_attention"]
