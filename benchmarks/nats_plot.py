r"""Compares models by the nats of the same texts: a table, and a picture by position.

    python -m benchmarks.nats_plot --to=nats.png [--from_position=4096] \
        dense=runs/dense/nats.json "k = 512, w = 512=runs/tuned/nats.json" ...

Every argument is a name and a file that `benchmarks.text_nats --to` wrote. The first model is what
the others are compared with, file by file: errors are standard errors of that difference, and take
files, not tokens, for independent draws. A kind is the directory of a file; all kinds weigh alike.
"""

import collections
import json
import pathlib

import numpy as np
from absl import app, flags
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from benchmarks.named_files import named_files

_TO = flags.DEFINE_string("to", None, "PNG file to write.")
_FROM_POSITION = flags.DEFINE_integer(
    "from_position", 0, "First position that the table counts; the picture shows all.", 0
)
flags.mark_flag_as_required("to")


def read_nats(path):
    """Edges between buckets, and per kind the files' names, their pieces, and nats `[F, B]`."""
    record = json.loads(pathlib.Path(path).read_text())
    kinds = collections.defaultdict(list)
    for file in record["files"]:
        kinds[pathlib.Path(file["file"]).parent.name].append(file)
    tables = {}
    for kind, files in sorted(kinds.items()):
        names = [pathlib.Path(file["file"]).name for file in files]
        pieces = np.array([file["pieces"] for file in files])
        tables[kind] = (names, pieces, np.array([file["nats"] for file in files]))
    return record["edges"], tables


def mean_and_error(values, weights):
    """Weighted mean of what clusters have, and its standard error."""
    weights = weights / weights.sum()
    mean = weights @ values
    count = len(values)
    error = np.sqrt(np.sum((weights * (values - mean)) ** 2) * count / max(count - 1, 1))
    return mean, error


def _check_alike(models):
    (first, (edges, tables)), *others = models.items()
    for name, (other_edges, other) in others:
        alike = other_edges == edges and other.keys() == tables.keys()
        for kind in tables if alike else ():
            alike &= other[kind][0] == tables[kind][0]
            alike &= np.array_equal(other[kind][1], tables[kind][1])
        if not alike:
            raise app.UsageError(f"{name!r} has other texts, pieces or buckets than {first!r}")


def print_table(models, counted):
    """Prints a line of a table for every model: nats, and by how much they exceed the first's."""
    edges, first = next(iter(models.values()))
    positions = f"positions {edges[np.argmax(counted)]:,} to {edges[-1]:,}"
    print(f"| {positions} | {' | '.join(first)} | mean |")
    print(f"|{' --- |' * (len(first) + 2)}")
    for name, (_, tables) in models.items():
        cells, excess, nats = [], [], []
        for kind, (_, pieces, values) in tables.items():
            values, base = (x[:, counted].mean(1) for x in (values, first[kind][2]))
            mean, _ = mean_and_error(values, pieces)
            more, error = mean_and_error(values - base, pieces)
            is_first = tables is first
            cells.append(f"{mean:.3f}" + ("" if is_first else f" ({more:+.3f} ± {error:.3f})"))
            nats.append(mean)
            excess.append(more)
        total, more = np.mean(nats), np.mean(excess)
        share = "" if tables is first else f" ({more / (total - more):+.1%})"
        cells.append(f"{total:.3f}{share}")
        print(f"| {name} | {' | '.join(cells)} |")


def plot(models, path):
    """Draws by how much every model's nats exceed the first's, by position, a panel for a kind."""
    edges, first = next(iter(models.values()))
    middles = (np.array(edges[:-1]) + edges[1:]) / 2
    figure = Figure(figsize=(3.7 * len(first), 4.2), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, len(first), squeeze=False)[0]
    colours = ("#0072B2", "#56B4E9", "#E69F00", "#D55E00", "#009E73", "#CC79A7", "#777777")
    base_name = next(iter(models))
    for ax, kind in zip(axes, first, strict=True):
        for i, (name, (_, tables)) in enumerate(list(models.items())[1:]):
            _, pieces, values = tables[kind]
            means = np.average(values - first[kind][2], axis=0, weights=pieces)
            marker = "osD^vPX"[i % 7]
            ax.plot(middles, means, marker=marker, ms=4, color=colours[i % 7], label=name)
        ax.axhline(0, color="k", lw=0.8)
        ax.set_title(kind, fontsize=10)
        ax.set_xlabel("position in the document")
        ax.set_xticks(edges[::2], [f"{edge // 1024}k" for edge in edges[::2]])
        ax.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel(f"nats per token over {base_name}")
    handles, labels = axes[0].get_legend_handles_labels()
    columns = min(len(labels), 4)
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, frameon=False)
    figure.savefig(path)


def main(arguments):
    """Prints the table and draws the picture."""
    files = named_files(arguments[1:], "NAME=FILE")
    models = {name: read_nats(path) for name, path in files.items()}
    _check_alike(models)
    edges, _ = next(iter(models.values()))
    counted = np.array(edges[:-1]) >= _FROM_POSITION.value
    if not counted.any():
        raise app.UsageError(
            f"--from_position={_FROM_POSITION.value}; expected at most {edges[-2]}"
        )
    print_table(models, counted)
    plot(models, _TO.value)
    print(f"wrote {_TO.value}")


if __name__ == "__main__":
    app.run(main)
