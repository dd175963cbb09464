"""Many runs on one HTML page: `python -m sparsek_jax.evaluation.page RUN [RUN ...]`."""

from sparsek_jax.evaluation.page.page import make_page, write_page

__all__ = ["make_page", "write_page"]
