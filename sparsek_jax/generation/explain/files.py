"""The files that tell what was remembered."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Int32

from sparsek_jax.data import Tokenizer
from sparsek_jax.generation.explain.memory import explain
from sparsek_jax.generation.explain.page import page
from sparsek_jax.generation.explain.picture import plot
from sparsek_jax.nn import Decoder


def write_explanation(
    directory: str | os.PathLike,
    model: Decoder,
    tokenizer: Tokenizer,
    tokens: Sequence[int] | Int32[np.ndarray, " T"],
    *,
    title: str,
    prompt_length: int | None = None,
) -> tuple[Path, Path]:
    """Writes `explain.html` and `explain.png`, each atomically, and returns their paths.

    The page needs no network and no other file.

    Args:
      directory: Where to; created if needed.
      model: The language model.
      tokenizer: The one it was trained with.
      tokens: All that it has read, `[T]`, with what begins a document.
      title: Says which model and text it was.
      prompt_length: Tokens before the first that was generated, which is marked; None for none.

    Raises:
      ValueError: The model has no SparseK layer, there is no token, or scores are not finite.
      OSError: A file cannot be written.
    """
    tokens = np.asarray(tokens, np.int32)
    memory = explain(model, tokens)
    options = {"title": title, "prompt_length": prompt_length}
    html = page(memory, tokenizer, tokens, **options)
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    paths = directory / "explain.html", directory / "explain.png"
    _write(paths[0], lambda path: path.write_text(html, encoding="utf-8"))
    _write(paths[1], lambda path: plot(memory, path, **options))
    return paths


def _write(path: Path, write: Callable[[Path], object]) -> None:
    """Has a file written beside `path`, which it then replaces."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        write(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
