"""A task's results as a table on the screen, a JSON file and a heat map."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float64
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from sparsek_jax.evaluation.report import describe_attention, jsonable, write_picture
from sparsek_jax.evaluation.tasks.evaluate import TaskEvaluation
from sparsek_jax.training.workdir import write_json

# What guessing a digit costs. Colours of nats reach at least to here, so that a good model does not
# look like a bad one.
_GUESSED_NATS = math.log(10)


def print_task(evaluation: TaskEvaluation, console: Console | None = None) -> None:
    """Prints length by depth for people."""
    console = console or Console(highlight=False)
    console.print(
        f"\n[bold]{escape(str(evaluation.workdir))}[/], step {evaluation.step:,}, attention "
        f"[bold]{escape(describe_attention(evaluation.attention))}[/]"
    )
    for note in evaluation.notes:
        console.print(f"[yellow]note:[/] {escape(note)}")
    # A title would be broken to the width of the table, which may be one column.
    console.print(
        f"{evaluation.task}: {evaluation.measure}, {evaluation.cells[0].samples} samples a cell "
        "(nats per token of the answer)"
    )
    table = Table()
    lengths, depths = _axes(evaluation)
    table.add_column("depth", justify="right")
    for length in lengths:
        table.add_column(f"{length:,} tokens", justify="right")
    cells = {(cell.length, cell.depth): cell for cell in evaluation.cells}
    for depth in depths:
        row = (cells[length, depth] for length in lengths)
        shown = (f"{cell.accuracy:.0%} ({cell.nats_per_token:.2f})" for cell in row)
        table.add_row(_depth_name(depth), *shown)
    console.print(table)


def write_task(evaluation: TaskEvaluation) -> tuple[Path, Path]:
    """Writes `workdir/eval/LABEL.TASK.json` and `.png`, each atomically, and returns the paths."""
    directory = evaluation.workdir / "eval"
    directory.mkdir(parents=True, exist_ok=True)
    json_path, png_path = (
        directory / f"{evaluation.label}.{evaluation.task}.{suffix}" for suffix in ("json", "png")
    )
    write_json(json_path, task_to_json(evaluation))
    write_picture(png_path, functools.partial(plot_task, evaluation))
    return json_path, png_path


def task_to_json(evaluation: TaskEvaluation) -> dict[str, Any]:
    """Returns the results in JSON's types; what is not a finite number is None."""
    return jsonable(
        {
            "workdir": str(evaluation.workdir),
            "step": evaluation.step,
            "label": evaluation.label,
            "attention": describe_attention(evaluation.attention),
            "notes": evaluation.notes,
            "task": evaluation.task,
            "measure": evaluation.measure,
            "cells": [dataclasses.asdict(cell) for cell in evaluation.cells],
            "config": json.loads(evaluation.config.to_json()),
        }
    )


def plot_task(evaluation: TaskEvaluation, path: Path) -> None:
    """Draws accuracy and nats by length and depth, as a PNG."""
    # A figure without pyplot leaves the backend of the process alone; it is drawn by Agg.
    from matplotlib.figure import Figure

    lengths, depths = _axes(evaluation)
    width, height = max(2.4, 0.8 * len(lengths)), max(2.0, 0.5 * len(depths))
    figure = Figure(figsize=(2 * width + 3.2, height + 1.7), dpi=150, layout="constrained")
    worst = max(_GUESSED_NATS, *(cell.nats_per_token for cell in evaluation.cells))
    panels = (
        ("accuracy", evaluation.measure, "viridis", 1.0, "{:.0%}"),
        ("nats_per_token", "nats per token of the answer", "viridis_r", worst, "{:.2f}"),
    )
    for ax, panel in zip(figure.subplots(1, 2), panels, strict=True):
        _heat_map(figure, ax, evaluation, *panel)
    figure.suptitle(
        f"{evaluation.task}: {evaluation.workdir.name}, step {evaluation.step:,}, "
        f"{describe_attention(evaluation.attention)}; {evaluation.cells[0].samples} samples a cell",
        fontsize=10,
    )
    figure.savefig(path)


def _heat_map(figure, ax, evaluation, field, title, colours, top, style) -> None:
    lengths, depths = _axes(evaluation)
    values = _by_depth(evaluation, field)
    image = ax.imshow(values, cmap=colours, vmin=0, vmax=top, aspect="auto")
    for (row, column), value in np.ndenumerate(values):
        red, green, blue, _ = image.cmap(image.norm(value))
        dark = 0.299 * red + 0.587 * green + 0.114 * blue < 0.5
        text = style.format(value)
        ax.text(column, row, text, ha="center", va="center", fontsize=8, color="w" if dark else "k")
    ax.set_xticks(range(len(lengths)), [f"{length:,}" for length in lengths], fontsize=8)
    ax.set_yticks(range(len(depths)), [_depth_name(depth) for depth in depths], fontsize=8)
    ax.set(xlabel="tokens of prompt", ylabel="depth")
    ax.set_title(title, fontsize=9)
    figure.colorbar(image, ax=ax)


def _depth_name(depth: float | None) -> str:
    return "any" if depth is None else f"{depth:g}"


def _axes(evaluation: TaskEvaluation) -> tuple[list[int], list[float | None]]:
    return tuple(
        sorted({getattr(cell, field) for cell in evaluation.cells}) for field in ("length", "depth")
    )


def _by_depth(evaluation: TaskEvaluation, field: str) -> Float64[np.ndarray, "depths lengths"]:
    lengths, depths = _axes(evaluation)
    cells = {(cell.depth, cell.length): getattr(cell, field) for cell in evaluation.cells}
    return np.array([[cells[depth, length] for length in lengths] for depth in depths], float)
