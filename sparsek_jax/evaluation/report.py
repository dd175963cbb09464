"""An evaluation as a table on the screen, a JSON file and a plot.

Run as a program, it makes a page of several runs: see `sparsek_jax.evaluation.page`.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import json
import math
import os
import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from sparsek_jax.evaluation.evaluate import Evaluation
from sparsek_jax.evaluation.gates import MEANINGS, LayerGates
from sparsek_jax.evaluation.perplexity import Bucket
from sparsek_jax.nn import AttentionConfig
from sparsek_jax.nn.config import has_scorer
from sparsek_jax.training.workdir import write_json


def print_report(evaluation: Evaluation, console: Console | None = None) -> None:
    """Prints the evaluation for people."""
    console = console or Console(highlight=False)
    loss = evaluation.loss
    console.print(
        f"\n[bold]{escape(str(evaluation.workdir))}[/], step {evaluation.step:,}, attention "
        f"[bold]{escape(describe_attention(evaluation.attention))}[/]"
    )
    console.print(f"text: {escape(evaluation.corpus)}")
    console.print(
        f"held out: {loss.documents:,} document{'s' if loss.documents > 1 else ''}, "
        f"{loss.tokens:,} tokens, {loss.bytes:,} bytes"
    )
    for note in evaluation.notes:
        console.print(f"[yellow]note:[/] {escape(note)}")

    table = Table(title="Held-out loss", title_justify="left")
    for column in ("nats per token", "perplexity", "bits per byte", "accuracy"):
        table.add_column(column, justify="right")
    table.add_row(
        _with_error(loss.nats_per_token, loss.standard_error),
        _number(loss.perplexity, ".3f"),
        _number(loss.bits_per_byte, ".4f"),
        _number(loss.accuracy, ".1%"),
    )
    console.print(table)

    table = Table(title="Loss by tokens of context", title_justify="left")
    for column in ("context", "tokens", "nats per token", "accuracy"):
        table.add_column(column, justify="right")
    for bucket in loss.buckets:
        table.add_row(
            context_span(bucket),
            f"{bucket.tokens:,}",
            _with_error(bucket.nats_per_token, bucket.standard_error),
            _number(bucket.accuracy, ".1%"),
        )
    console.print(table)
    if evaluation.gates:
        _print_gates(evaluation, console)


def _print_gates(evaluation: Evaluation, console: Console) -> None:
    k = evaluation.attention.num_selected
    table = Table(
        title=f"Scorers, over queries with more than k = {k} keys to choose from",
        title_justify="left",
    )
    for column in (
        "layer",
        "mass kept\nby top-k",
        "mean\nsupport",
        "selected,\ngate = 1",
        "support,\ngate < 1",
        "score\nstd",
    ):
        table.add_column(column, justify="right")
    table.add_column("heads")
    seen = set()
    for layer in evaluation.gates:
        verdicts = collections.Counter(layer.verdicts)
        seen.update(verdicts)
        table.add_row(
            str(layer.layer),
            _number(finite_mean(layer.kept_mass), ".1%"),
            _number(finite_mean(layer.support), ",.1f"),
            _number(finite_mean(layer.saturation), ".1%"),
            _number(finite_mean(layer.interior), ".1%"),
            _number(finite_mean(layer.score_std), ".3g"),
            ", ".join(f"{count} {verdict}" for verdict, count in verdicts.items()),
        )
    console.print(table)
    for verdict, meaning in MEANINGS.items():
        if verdict in seen:
            console.print(f"{verdict}: {meaning}")


def write_report(evaluation: Evaluation) -> tuple[Path, Path]:
    """Writes `workdir/eval/LABEL.json` and `LABEL.png`, each atomically, and returns the paths."""
    directory = evaluation.workdir / "eval"
    directory.mkdir(parents=True, exist_ok=True)
    json_path = directory / f"{evaluation.label}.json"
    png_path = directory / f"{evaluation.label}.png"
    write_json(json_path, to_json(evaluation))
    write_picture(png_path, functools.partial(plot, evaluation))
    return json_path, png_path


def write_picture(path: Path, draw: Callable[[Path], None]) -> None:
    """Writes a PNG atomically; `draw` draws it where it is told."""
    temporary = path.with_name(f".{path.stem}.{os.getpid()}.png")
    draw(temporary)
    os.replace(temporary, path)


def to_json(evaluation: Evaluation) -> dict[str, Any]:
    """Returns the evaluation in JSON's types; what is not a finite number is None."""
    return jsonable(
        {
            "workdir": str(evaluation.workdir),
            "step": evaluation.step,
            "label": evaluation.label,
            "attention": describe_attention(evaluation.attention),
            "notes": evaluation.notes,
            "corpus": evaluation.corpus,
            "loss": dataclasses.asdict(evaluation.loss),
            "gates": [dataclasses.asdict(layer) for layer in evaluation.gates],
            "config": json.loads(evaluation.config.to_json()),
        }
    )


def plot(evaluation: Evaluation, path: Path) -> None:
    """Draws loss by context and, for SparseK layers, their gates, as a PNG."""
    # A figure without pyplot leaves the backend of the process alone; it is drawn by Agg.
    from matplotlib.figure import Figure

    gates = [layer for layer in evaluation.gates if layer.queries]
    panels = 3 if gates else 1
    figure = Figure(figsize=(4.6 * panels if gates else 6.5, 4.2), dpi=150, layout="constrained")
    axes = figure.subplots(1, panels, squeeze=False)[0]
    _plot_loss(axes[0], evaluation)
    if gates:
        _plot_shares(axes[1], gates)
        _plot_support(axes[2], gates, evaluation.attention.num_selected)
    for ax in axes:
        ax.spines[["top", "right"]].set_visible(False)
        ax.grid(axis="y", alpha=0.3, linewidth=0.6)
        ax.title.set_fontsize(10)
    loss = evaluation.loss
    bits, accuracy = f"{loss.bits_per_byte:.3f} bits per byte", f"{loss.accuracy:.1%} right"
    figure.suptitle(
        f"{evaluation.workdir.name}, step {evaluation.step:,}, "
        f"{describe_attention(evaluation.attention)}: "
        f"{loss.nats_per_token:.3f} nats per token, {bits if loss.bytes else accuracy}",
        fontsize=11,
    )
    figure.savefig(path)


def _plot_loss(ax, evaluation: Evaluation) -> None:
    buckets = [b for b in evaluation.loss.buckets if b.tokens]
    nats = [b.nats_per_token for b in buckets]
    errors = [0 if math.isnan(b.standard_error) else b.standard_error for b in buckets]
    ax.errorbar(range(len(buckets)), nats, yerr=errors, marker="o", markersize=4, capsize=3)
    ax.set_xticks(
        range(len(buckets)),
        [context_span(b) for b in buckets],
        rotation=40,
        ha="right",
        rotation_mode="anchor",
        fontsize=8,
    )
    ax.set(
        title="Held-out loss by context",
        xlabel="tokens of context",
        ylabel="nats per token (± standard error)",
    )


def _plot_shares(ax, gates: list[LayerGates]) -> None:
    for name, label, marker in (
        ("kept_mass", "gate mass kept by top-k", "o"),
        ("saturation", "selected keys with gate 1", "s"),
        ("interior", "support with gate below 1", "^"),
    ):
        _plot_heads(ax, gates, name, label, marker)
    ax.set(title="Gates: heads, and their mean", xlabel="layer", ylabel="share", ylim=(0, 1.02))
    ax.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.16), frameon=False)


def _plot_support(ax, gates: list[LayerGates], num_selected: int) -> None:
    _plot_heads(ax, gates, "support", "mean support", "o")
    ax.axhline(num_selected, color="grey", linestyle="--", linewidth=1, label="k")
    ax.set(title="Keys with a gate above 0", xlabel="layer", ylabel="keys per query")
    ax.set_ylim(bottom=0)
    ax.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=2, frameon=False)


def _plot_heads(ax, gates: list[LayerGates], name: str, label: str, marker: str) -> None:
    layers = [layer.layer for layer in gates]
    (line,) = ax.plot(
        layers,
        [finite_mean(getattr(layer, name)) for layer in gates],
        marker=marker,
        markersize=4,
        label=label,
    )
    for layer in gates:
        values = getattr(layer, name)
        ax.scatter([layer.layer] * len(values), values, s=8, alpha=0.4, color=line.get_color())
    ax.set_xticks(layers if len(layers) <= 16 else layers[:: len(layers) // 8])


def describe_attention(attention: AttentionConfig) -> str:
    """Kinds of layers, and the sizes that matter to them."""
    kinds = attention.pattern or (attention.kind,)
    parts = ["+".join(kinds)]
    parts += [f"{name}={size}" for name, size in attention_sizes(attention).items()]
    if any(map(has_scorer, kinds)) and attention.gating != "soft":
        parts.append(attention.gating)
    return " ".join(parts)


def attention_sizes(attention: AttentionConfig) -> dict[str, int]:
    """Of "k", "w" and "block", those that matter to the kinds of layers."""
    kinds = set(attention.pattern or (attention.kind,))
    sizes = {}
    if kinds - {"dense", "window", "gated_linear"}:
        sizes["k"] = attention.num_selected
    if kinds - {"dense"}:
        sizes["w"] = attention.sliding_window
    if kinds & {"bigbird", "moba", "nsa"}:
        sizes["block"] = attention.block_size
    return sizes


def context_span(bucket: Bucket) -> str:
    """The tokens of context of a bucket, for people."""
    last = bucket.stop - 1
    return f"{bucket.start:,}" if bucket.start == last else f"{bucket.start:,} to {last:,}"


def finite_mean(values: np.ndarray) -> float:
    """Mean over the heads that have a value."""
    finite = values[np.isfinite(values)]
    return float(finite.mean()) if finite.size else math.nan


def _with_error(value: float, error: float) -> str:
    shown = _number(value, ".4f")
    return shown if math.isnan(error) else f"{shown} ± {error:.4f}"


def _number(value: float, spec: str) -> str:
    return format(value, spec) if math.isfinite(value) else "-"


def jsonable(value: Any) -> Any:
    """The value in JSON's types; what is not a finite number is None."""
    if isinstance(value, dict):
        return {str(name): jsonable(child) for name, child in value.items()}
    if isinstance(value, np.ndarray):
        return jsonable(value.tolist())
    if isinstance(value, list | tuple):
        return [jsonable(child) for child in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


if __name__ == "__main__":
    # The page shows the reports of many runs; its modules import this one.
    runpy.run_module("sparsek_jax.evaluation.page", run_name="__main__", alter_sys=True)
