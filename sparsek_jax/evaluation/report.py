"""An evaluation as tables on screen, a JSON file and a plot."""

from __future__ import annotations

import dataclasses
import json
import math
import os
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from sparsek_jax.evaluation.gates import MEANINGS, LayerGates
from sparsek_jax.evaluation.perplexity import HeldOutLoss


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """What was measured, and of what.

    Attributes:
      step: Of the weights.
      attention: What the model was evaluated with, such as "sparsek k=512 w=512".
      trained_attention: What its weights were trained with.
      corpus: Where the held-out text is from.
      seq_len: Context length in tokens.
      loss: Held-out loss.
      gates: Of the SparseK layers; empty for other attention.
    """

    step: int
    attention: str
    trained_attention: str
    corpus: str
    seq_len: int
    loss: HeldOutLoss
    gates: tuple[LayerGates, ...]


def print_report(evaluation: Evaluation, console: Console | None = None) -> None:
    """Prints the tables."""
    console = console or Console()
    loss = evaluation.loss
    summary = Table(title=f"Held-out text: {evaluation.corpus}", title_justify="left")
    for name in ("attention", "step", "tokens", "nats/token", "perplexity", "bits/byte"):
        summary.add_column(name, justify="left" if name == "attention" else "right")
    summary.add_row(
        evaluation.attention,
        f"{evaluation.step:,}",
        f"{loss.tokens:,}",
        f"{loss.nats_per_token:.4f} ± {loss.standard_error:.4f}",
        f"{loss.perplexity:.2f}",
        f"{loss.bits_per_byte:.4f}",
    )
    console.print(summary)
    if evaluation.attention != evaluation.trained_attention:
        console.print(
            f"A comparison: these weights were trained with {evaluation.trained_attention}.",
            style="bold",
        )

    buckets = Table(title="Loss by context in the segment", title_justify="left")
    for name in ("context (tokens)", "targets", "nats/token", "± s.e."):
        buckets.add_column(name, justify="right")
    for bucket in loss.buckets:
        buckets.add_row(
            f"{bucket.start:,} to {bucket.stop - 1:,}",
            f"{bucket.tokens:,}",
            f"{bucket.nats_per_token:.4f}",
            f"{bucket.standard_error:.4f}",
        )
    console.print(buckets)

    if not evaluation.gates:
        return
    gates = Table(title="Gates (mean over KV heads)", title_justify="left")
    columns = ("layer", "mass kept by top-k", "mean support", "saturated", "score std", "scorer")
    for name in columns:
        gates.add_column(name, justify="left" if name == "scorer" else "right")
    for layer in evaluation.gates:
        gates.add_row(
            str(layer.layer),
            f"{_mean(layer.kept_mass):.1%}",
            f"{_mean(layer.support):,.1f}",
            f"{_mean(layer.saturation):.1%}",
            f"{_mean(layer.score_std):.3f}",
            ", ".join(sorted(set(layer.verdicts))),
        )
    console.print(gates)
    verdicts = {verdict for layer in evaluation.gates for verdict in layer.verdicts}
    for verdict in sorted(verdicts):
        console.print(f"{verdict}: {MEANINGS[verdict]}")


def write_report(evaluation: Evaluation, directory: Path, name: str) -> tuple[Path, Path]:
    """Writes `<name>.json` and `<name>.png`, each atomically, and returns their paths."""
    directory.mkdir(parents=True, exist_ok=True)
    json_path, png_path = directory / f"{name}.json", directory / f"{name}.png"
    temporary = directory / f".{name}.{os.getpid()}.png"
    temporary.write_text(json.dumps(_plain(dataclasses.asdict(evaluation)), indent=2) + "\n")
    os.replace(temporary, json_path)
    _plot(evaluation, temporary)
    os.replace(temporary, png_path)
    return json_path, png_path


def _plain(value: Any) -> Any:
    """JSON has neither arrays nor NaN."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, np.ndarray)):
        return [_plain(item) for item in value]
    if isinstance(value, float | np.floating):
        return float(value) if math.isfinite(value) else None
    return value.item() if isinstance(value, np.generic) else value


def _mean(x: np.ndarray) -> float:
    return float(np.mean(x))


def _plot(evaluation: Evaluation, path: Path) -> None:
    from matplotlib.figure import Figure

    panels = 2 if evaluation.gates else 1
    figure = Figure(figsize=(5.2 * panels, 4.0), layout="constrained")
    axes = figure.subplots(1, panels, squeeze=False)[0]
    buckets = [b for b in evaluation.loss.buckets if b.tokens]
    labels = [f"{b.start:,}-{b.stop - 1:,}" for b in buckets]
    errors = [b.standard_error if math.isfinite(b.standard_error) else 0.0 for b in buckets]
    axes[0].errorbar(
        range(len(buckets)),
        [b.nats_per_token for b in buckets],
        yerr=errors,
        marker="o",
        capsize=3,
        color="#1f5aa6",
    )
    axes[0].set_xticks(range(len(buckets)), labels, rotation=35, ha="right")
    axes[0].set(xlabel="context (tokens)", ylabel="loss (nats/token)")
    axes[0].set_title("Does longer context help?")
    axes[0].grid(axis="y", alpha=0.3)
    if evaluation.gates:
        layers = [str(layer.layer) for layer in evaluation.gates]
        x = np.arange(len(layers))
        series = (("mass kept by top-k", "kept_mass"), ("saturated gates", "saturation"))
        for i, (label, field) in enumerate(series):
            heights = [_mean(getattr(layer, field)) for layer in evaluation.gates]
            axes[1].bar(x + 0.38 * (i - 0.5), np.nan_to_num(heights), 0.36, label=label)
        axes[1].set_xticks(x, layers)
        axes[1].set(xlabel="layer", ylabel="fraction", ylim=(0, 1.25))
        axes[1].set_title("Gates of the SparseK layers")
        axes[1].legend(loc="upper right", ncols=2, frameon=False, fontsize=8)
    figure.suptitle(
        f"{evaluation.attention}, step {evaluation.step:,}, "
        f"{evaluation.loss.bits_per_byte:.3f} bits/byte",
        fontsize=10,
    )
    figure.savefig(path, dpi=150)
