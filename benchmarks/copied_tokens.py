r"""Where a sparse model loses nats: at tokens that could be copied, by how far back these stand.

    python -m benchmarks.copied_tokens --base=runs/dense --workdir=runs/sparse --tokens=4096 \
        --edges=128,256 FILE [FILE ...]

A token can be copied if it and the two before it stand together earlier in the text. For every
distance of the nearest such place the table has the share of the tokens, the base's nats, by how
much the model's exceed them, and the share of all that it loses. Of every file the first --tokens
tokens are read, of which those from --from_position on count.
"""

import pathlib

import numpy as np
from absl import app, flags
from flax import nnx

from benchmarks.text_nats import file_nats
from sparsek_jax.generation.loading import load_run

_BASE = flags.DEFINE_string("base", None, "Directory of the model to compare with.")
_EDGES = flags.DEFINE_list("edges", ["512", "1024"], "Distances between rows, ascending.")
_FROM_POSITION = flags.DEFINE_integer("from_position", 1024, "First position that counts.", 1)
flags.mark_flag_as_required("base")


def copy_distances(tokens):
    """How far back the nearest place is where the last two tokens were followed by the next one.

    Args:
      tokens: Of a text, `[T]`.

    Returns:
      For every token but the first, `[T - 1]`; 0 where there is no such place.
    """
    last, distances = {}, np.zeros(len(tokens) - 1, int)
    for t in range(2, len(tokens)):
        triple = tuple(tokens[t - 2 : t + 1])
        if triple in last:
            distances[t - 1] = t - last[triple]
        last[triple] = t
    return distances


def main(arguments):
    """Prints the table."""
    paths = [pathlib.Path(path) for path in arguments[1:]]
    length, first = flags.FLAGS.tokens, _FROM_POSITION.value
    run = load_run(_BASE.value)
    texts = [run.tokenizer.encode(path.read_text("utf-8", "replace"))[:length] for path in paths]
    for path, text in zip(paths, texts, strict=True):
        if len(text) < length:
            raise app.UsageError(f"{path} has {len(text)} tokens; expected at least {length}")
    distances = np.stack([copy_distances(text.tolist()) for text in texts])[:, first - 1 :]
    base, model = (
        np.stack([file_nats(*split, text) for text in texts])[:, first - 1 :]
        for split in (nnx.split(run.model), nnx.split(load_run(flags.FLAGS.workdir).model))
    )
    edges = [int(edge) for edge in _EDGES.value]
    rows = [("not before", distances == 0)]
    for low, high in zip([0, *edges], [*edges, None], strict=True):
        name = f"at most {high:,} back" if not low else f"{low + 1:,} back or more"
        if low and high:
            name = f"{low + 1:,} to {high:,} back"
        above = distances > low
        rows.append((name, above if high is None else above & (distances <= high)))
    lost = (model - base).sum()
    print("| the token with the two before it | of all tokens | nats | more | of what is lost |")
    print(f"|{' --- |' * 5}")
    for name, of_row in rows:
        more = (model - base)[of_row]
        print(
            f"| {name} | {of_row.mean():.0%} | {base[of_row].mean():.3f} | {more.mean():+.3f} "
            f"| {more.sum() / lost:.0%} |"
        )
    print(f"| all | 100% | {base.mean():.3f} | {(model - base).mean():+.3f} | 100% |")


if __name__ == "__main__":
    app.run(main)
