"""What a model remembered of a text: as arrays, as a page and as a picture."""

from sparsek_jax.generation.explain.files import write_explanation
from sparsek_jax.generation.explain.memory import Memory, check_explainable, explain

__all__ = ["Memory", "check_explainable", "explain", "write_explanation"]
