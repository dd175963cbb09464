r"""Compares runs by their nats by context, over seeds: a table, and a picture.

    python -m benchmarks.context_plot --to=long_code.png \
        dense=runs/dense_0/eval/dense.json,runs/dense_1/eval/dense.json \
        "SparseK=runs/sparsek_0/eval/sparsek.json" ...

Every argument is a name and the files that `eval.py` wrote for its seeds. The picture shows by how
much the nats of every model exceed those of the first; of one whose line leaves the picture they
exceed them by more than `--most`.
"""

import itertools
import json
import pathlib

import numpy as np
from absl import app, flags
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from benchmarks.named_files import named_files

_TO = flags.DEFINE_string("to", None, "PNG file to write.")
_MOST = flags.DEFINE_float("most", 0.2, "Upper end of the picture, in nats.", lower_bound=0)
flags.mark_flag_as_required("to")


def read_seeds(paths):
    """Reads what eval.py wrote for the seeds of one model.

    Args:
      paths: Of JSON files.

    Returns:
      Edges between buckets of context; nats over all tokens, `[S]`, and by bucket, `[S, B]`.
    """
    losses = [json.loads(pathlib.Path(path).read_text())["loss"] for path in paths]
    edges = [_edges(loss) for loss in losses]
    if any(other != edges[0] for other in edges):
        raise app.UsageError(f"{paths} have buckets {edges}; expected the same in all")
    nats = np.array([loss["nats_per_token"] for loss in losses])
    by_bucket = [[bucket["nats_per_token"] for bucket in loss["buckets"]] for loss in losses]
    return edges[0], nats, np.array(by_bucket)


def _edges(loss):
    buckets = loss["buckets"]
    return [bucket["start"] for bucket in buckets] + [buckets[-1]["stop"]]


def print_table(models):
    """Prints a line for every model: mean nats, those of the seeds, and means by context."""
    edges, first, _ = next(iter(models.values()))
    spans = [f"{low:,} to {high - 1:,}" for low, high in itertools.pairwise(edges)]
    print(f"| context | all | seeds | {' | '.join(spans)} |\n|{' --- |' * (len(spans) + 3)}")
    for name, (_, nats, by_bucket) in models.items():
        share = "" if nats is first else f" ({nats.mean() / first.mean() - 1:+.1%})"
        cells = [f"{nats.mean():.3f}{share}", ", ".join(f"{x:.3f}" for x in nats)]
        cells += [f"{x:.3f}" for x in by_bucket.mean(0)]
        print(f"| {name} | {' | '.join(cells)} |")


def plot(models, path):
    """Draws by how much every model's nats exceed the first's, by context."""
    edges, _, base = next(iter(models.values()))
    # As far apart as buckets that double; the first begins at no context.
    middles = np.sqrt(np.maximum(edges[:-1], edges[1] / 2) * np.array(edges[1:]))
    figure = Figure(figsize=(7.5, 4.4), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    ax = figure.subplots()
    base_name = next(iter(models))
    for i, (name, (_, _, by_bucket)) in enumerate(list(models.items())[1:]):
        excess = by_bucket.mean(0) - base.mean(0)
        ax.plot(middles, excess, marker="osD^vPX"[i % 7], ms=4, color=f"C{i}", label=name)
    ax.axhline(0, color="k", lw=0.8)
    ax.set_xscale("log", base=2)
    ax.set_xticks(edges[1:], [f"{edge / 1024:g}k" for edge in edges[1:]])
    ax.set(xlabel="tokens of context", ylabel=f"nats per token over {base_name}")
    ax.set_ylim(top=min(ax.get_ylim()[1], _MOST.value))
    ax.spines[["top", "right"]].set_visible(False)
    ax.grid(axis="y", alpha=0.3)
    figure.legend(loc="outside right upper", frameon=False)
    figure.savefig(path)


def main(arguments):
    """Prints the table and draws the picture."""
    files = named_files(arguments[1:], "NAME=FILE[,FILE...]")
    models = {name: read_seeds(paths.split(",")) for name, paths in files.items()}
    edges = {name: edges for name, (edges, _, _) in models.items()}
    for name, other in edges.items():
        if other != next(iter(edges.values())):
            raise app.UsageError(f"{name!r} has buckets {other}; expected those of the first")
    print_table(models)
    plot(models, _TO.value)
    print(f"wrote {_TO.value}")


if __name__ == "__main__":
    app.run(main)
