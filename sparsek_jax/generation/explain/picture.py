"""The memory of a text as a picture."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from jaxtyping import Float64, Int

from sparsek_jax.generation.explain.memory import Memory

# Finer than this, columns of the overview and steps of the curves would not be told apart.
_COLUMNS = 600
_STEPS = 60
_KEPT = "#0072B2"


def plot(memory: Memory, path: Path, *, title: str, prompt_length: int | None = None) -> None:
    """Draws how long keys lasted, the slots' ages and the evictions, as a PNG.

    Args:
      memory: What to draw.
      path: The file.
      title: What stands on top.
      prompt_length: Tokens before the first that was generated; None marks none.
    """
    # A figure without pyplot leaves the backend of the process alone; it is drawn by Agg.
    from matplotlib.figure import Figure

    layers, heads, _ = memory.until.shape
    overview = min(max(0.22 * layers * heads, 1.6), 9.0)
    figure = Figure(figsize=(11, overview + 4.2), dpi=130, layout="constrained")
    top, bottom = figure.subfigures(2, 1, height_ratios=(overview + 1, 3.2))
    _plot_survival(top, memory, prompt_length)
    left, right = bottom.subplots(1, 2)
    _plot_ages(left, memory)
    _plot_evictions(right, memory)
    for ax in (left, right):
        ax.spines[["top", "right"]].set_visible(False)
        ax.grid(axis="y", alpha=0.3, linewidth=0.6)
        ax.title.set_fontsize(10)
        ax.set(xlabel="query", xlim=(0, memory.length))
    figure.suptitle(
        f"{title}: {memory.length:,} tokens, k = {memory.num_selected:,}, "
        f"w = {memory.sliding_window:,}",
        fontsize=11,
        # A title is no formula, whatever it holds.
        parse_math=False,
    )
    figure.savefig(path, format="png")


def _plot_survival(figure, memory: Memory, prompt_length: int | None) -> None:
    from matplotlib.colors import PowerNorm

    layers, heads, length = memory.until.shape
    window = memory.sliding_window
    ax = figure.subplots()
    beyond = np.maximum(memory.survival - window, 0).reshape(layers * heads, length)
    # The last window's keys have not been judged.
    judged = np.where(np.arange(length) < length - window, beyond, np.nan)
    # Of neighbouring tokens the one that lasted: a mean would hide the few that do.
    starts = _bins(length, _COLUMNS)
    columns = np.fmax.reduceat(judged, starts[:-1], axis=1)
    edges = np.arange(layers * heads + 1)
    norm = PowerNorm(0.5, vmin=0, vmax=max(length - window, 1))
    mesh = ax.pcolormesh(starts, edges, columns, cmap="viridis", norm=norm, rasterized=True)
    ax.set_facecolor("0.85")
    rows = np.arange(layers)
    ax.set_yticks((rows + 0.5) * heads, [str(layer) for layer in memory.layers])
    ax.hlines(rows[1:] * heads, 0, length, color="white", linewidth=1)
    if prompt_length is not None:
        ax.axvline(prompt_length, color="#D55E00", linewidth=1.2)
        ax.annotate(
            "generated from here",
            (prompt_length, 1),
            (3, 2),
            xycoords=("data", "axes fraction"),
            textcoords="offset points",
            color="#D55E00",
            fontsize=8,
        )
    ax.invert_yaxis()
    ax.set(xlabel="token", ylabel="layer" if heads == 1 else f"layer, of {heads} heads each")
    ax.set_title("How long keys were selected (grey: still in the window)", fontsize=10, pad=14)
    figure.colorbar(mesh, ax=ax, label="queries", pad=0.01)


def _plot_ages(ax, memory: Memory) -> None:
    ages = memory.ages.mean(axis=(0, 1), dtype=np.float64)
    oldest, upper, median, lower, youngest = ages.T[::-1]
    options = {"color": _KEPT, "linewidth": 0}
    label = "youngest to oldest"
    ax.fill_between(memory.moments, youngest, oldest, alpha=0.2, label=label, **options)
    ax.fill_between(memory.moments, lower, upper, alpha=0.4, label="middle half", **options)
    ax.plot(memory.moments, median, color=_KEPT, label="median")
    ax.plot([0, memory.length], [0, memory.length], "--", color="grey", linewidth=1, label="text")
    ax.set(title="Ages of what the slots hold (means over heads)", ylabel="queries")
    ax.set_ylim(bottom=0)
    ax.legend(fontsize=8, frameon=False, loc="upper left")


def _plot_evictions(ax, memory: Memory) -> None:
    from matplotlib import colormaps

    first = memory.sliding_window + memory.num_selected
    ax.set(title="Newcomers that displaced a selected key", ylabel="share of steps", ylim=(0, 1.02))
    steps = memory.length - first
    if steps < 1:
        message = f"nobody had to leave: no more than w + k = {first:,} tokens"
        ax.text(0.5, 0.5, message, transform=ax.transAxes, ha="center", color="grey", fontsize=9)
        return
    starts = _bins(steps, _STEPS)
    shares = _bin_means(memory.displaced[..., first:].mean(axis=1), starts)
    middle = first + (starts[:-1] + starts[1:]) / 2
    colours = colormaps["viridis"](np.linspace(0, 0.9, len(memory.layers)))
    # A legend of many layers would be longer than the picture.
    named = np.linspace(0, len(memory.layers) - 1, min(len(memory.layers), 6)).round()
    for index, (layer, share) in enumerate(zip(memory.layers, shares, strict=True)):
        label = f"layer {layer}" if index in named else None
        ax.plot(middle, share, color=colours[index], linewidth=1, alpha=0.7, label=label)
    ax.plot(middle, shares.mean(axis=0), color="black", linewidth=2, label="all layers")
    ax.legend(fontsize=8, edgecolor="none", loc="upper right")


def _bins(length: int, count: int) -> Int[np.ndarray, " edges"]:
    """Edges of at most `count` bins that divide a range of integers about evenly."""
    return np.linspace(0, length, min(length, count) + 1).astype(int)


def _bin_means(
    values: Float64[np.ndarray, "rows n"], edges: Int[np.ndarray, " edges"]
) -> Float64[np.ndarray, "rows bins"]:
    return np.add.reduceat(values, edges[:-1], axis=-1) / np.diff(edges)
