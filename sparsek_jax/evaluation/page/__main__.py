r"""Shows runs and imported models beside each other, on one HTML page.

python -m sparsek_jax.evaluation.page runs/sparsek runs/dense [--to=page.html] \
    [--text=FILE [--text_tokens=2048]]

The page holds what train.py, eval.py and benchmarks/text_nats.py left in these directories. With a
text, the models are loaded, and it tells what each SparseK layer selected in it.
"""

from absl import flags

from sparsek_jax.evaluation.page import write_page
from sparsek_jax.training.cli import run

_TO = flags.DEFINE_string("to", "page.html", "File to write.")
_TEXT = flags.DEFINE_string("text", None, "Text file to show what was selected of.")
_TEXT_TOKENS = flags.DEFINE_integer("text_tokens", 2048, "Most tokens of it, the first ones.", 1)


def main(*directories: str) -> None:
    """Writes the page."""
    page = write_page(directories, _TO.value, text=_TEXT.value, max_tokens=_TEXT_TOKENS.value)
    print(f"wrote {page}")


if __name__ == "__main__":
    run(main, takes_arguments=True)
