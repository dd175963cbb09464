"""The table of runs, and what has to be known to compare them."""

from __future__ import annotations

import collections
import dataclasses
import html
import math
from collections.abc import Callable, Iterable, Mapping, Sequence

from sparsek_jax.evaluation.page.charts import style_of
from sparsek_jax.evaluation.page.entries import Entry, Spread, spread
from sparsek_jax.evaluation.page.records import HeldOut, Setting, TaskResult

_NOTHING = '<span class="none">-</span>'


@dataclasses.dataclass(frozen=True)
class Value:
    """A cell of a column whose best is marked.

    Attributes:
      spread: The value.
      setting: What it was measured on; only values of an equal one compete.
    """

    spread: Spread
    setting: Setting


class Marks:
    """Letters for what was measured on different things, and none where it was on the same.

    Args:
      measurements: The settings of each, in the order of the rows.
    """

    def __init__(self, measurements: Iterable[Iterable[Setting]]):
        self._letters: dict[Setting, str] = {}
        lettered = 0
        for settings in measurements:
            distinct = list(dict.fromkeys(settings))
            for setting in distinct:
                self._letters[setting] = ""
                if len(distinct) > 1:
                    self._letters[setting] = _letters(lettered)
                    lettered += 1

    def mark(self, setting: Setting) -> str:
        """What stands behind a value."""
        letter = self._letters.get(setting, "")
        return f"<sup>{letter}</sup>" if letter else ""

    def legend(self) -> str:
        """What the letters mean; without letters, what was measured."""
        lines = [f"{self.mark(s)} {html.escape(s.text)}" for s in self._letters]
        if not lines:
            return ""
        warning = (
            "<p>Values with different letters were measured on different things and cannot be "
            "compared; the best is told for each letter.</p>"
            if any(self._letters.values())
            else ""
        )
        items = "".join(f"<li>{line}</li>" for line in lines)
        return f"<h3>Measured on</h3>{warning}<ul>{items}</ul>"


def _letters(index: int) -> str:
    first, second = divmod(index, 26)
    return (_letters(first - 1) if first else "") + chr(ord("a") + second)


def measured_settings(entries: Sequence[Entry]) -> Marks:
    """Letters for the held-out loss and for each task."""
    held_out = [entry.held_out[0].setting for entry in entries if entry.held_out]
    tasks = (
        [entry.tasks[name][0].setting for entry in entries if name in entry.tasks]
        for name in task_names(entries)
    )
    return Marks([held_out, *tasks])


def task_names(entries: Sequence[Entry]) -> list[str]:
    """All tasks, in the order in which they are found."""
    return list({name: None for entry in entries for name in entry.tasks})


def runs_table(entries: Sequence[Entry], marks: Marks) -> str:
    """Writes a row for each entry, with the best of every measured column marked."""
    columns = [
        ("attention", [html.escape(_attention(entry)[0]) for entry in entries]),
        *(_size_column(entries, name) for name in ("k", "w", "block")),
        ("seeds", [str(len(entry.records)) for entry in entries]),
        ("parameters", [_count(entry.records[0].parameters) for entry in entries]),
        ("steps", [_count(entry.step) for entry in entries]),
        ("tokens read", [_count(_tokens(entry)) for entry in entries]),
    ]
    uninteresting = {"block": _NOTHING, "seeds": "1"}
    columns = [
        (name, cells)
        for name, cells in columns
        if name not in uninteresting or set(cells) != {uninteresting[name]}
    ]
    for name, best, spec in (
        ("nats_per_token", min, ".4f"),
        ("bits_per_byte", min, ".4f"),
        ("accuracy", max, ".1%"),
    ):
        values = [_loss(entry.held_out, name) for entry in entries]
        if any(values) or name == "nats_per_token":
            columns.append((name.replace("_", " "), best_marked(values, best, spec, marks)))
    for name in task_names(entries):
        values = [_accuracy(entry.tasks.get(name, ())) for entry in entries]
        columns.append((name, best_marked(values, max, ".1%", marks)))
    head = "".join(f"<th>{html.escape(name)}</th>" for name, _ in columns)
    rows = [
        f"<tr>{row_head(entry)}{''.join(f'<td>{cells[i]}</td>' for _, cells in columns)}</tr>"
        for i, entry in enumerate(entries)
    ]
    return (
        f'<div class="wide"><table class="runs"><thead><tr><th>run</th>{head}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )


def row_head(entry: Entry) -> str:
    """The cell that names an entry, with its colour."""
    return f'<th scope="row">{key(entry)}</th>'


def key(entry: Entry, name: str = "") -> str:
    """An entry's title, or another name, with its colour; pointed at, it shows its lines."""
    return (
        f'<span class="key {style_of(entry.index)}" data-e="{entry.index}">'
        f'<svg viewBox="0 0 22 8" aria-hidden="true"><polyline points="1,4 21,4"/></svg>'
        f"{html.escape(name or entry.title)}</span>"
    )


def best_marked(
    values: Sequence[Value | None], better: Callable, spec: str, marks: Marks
) -> list[str]:
    """Writes the cells of a column.

    Args:
      values: In the order of the rows; None where there is none.
      better: `min` or `max`.
      spec: How a number is formatted.
      marks: Letters of settings.
    """
    groups = collections.defaultdict(list)
    for value in values:
        if value is not None and math.isfinite(value.spread.mean):
            groups[value.setting].append(value.spread.mean)
    # Where all are alike, none is best.
    best = {s: better(means) for s, means in groups.items() if len(set(means)) > 1}
    cells = []
    for value in values:
        if value is None:
            cells.append(_NOTHING)
            continue
        shown = format_spread(value.spread, spec)
        if value.spread.mean == best.get(value.setting):
            shown = f'<b class="best" title="best of its column">{shown}</b>'
        cells.append(shown + marks.mark(value.setting))
    return cells


def format_spread(value: Spread, spec: str) -> str:
    """A mean, and ± what it varies by where that is known."""
    if not math.isfinite(value.mean):
        return "not finite"
    shown = format(value.mean, spec)
    return f"{shown} ± {format(value.error, spec)}" if math.isfinite(value.error) else shown


def notes(entries: Sequence[Entry]) -> str:
    """What evaluations say of themselves, what is missing, and what was left out."""
    said = collections.defaultdict(list)
    for entry in entries:
        results = [*entry.held_out, *(result for group in entry.tasks.values() for result in group)]
        for note in dict.fromkeys(note for result in results for note in result.notes):
            said[note].append(entry.title)
        results += (nats for group in entry.nats.values() for nats in group)
        steps = {step for step in (r.step for r in results) if step != entry.step}
        if steps:
            told = " and ".join(f"{step:,}" for step in sorted(steps))
            said[f"Of another step, {told}: tasks or text files."].append(entry.title)
    for record in (record for entry in entries for record in entry.records):
        for remark in record.remarks:
            said[f"Left out: {remark}."].append(record.directory.absolute().name)
    for what, lacking in missing(entries).items():
        said[f"Missing: {what}."] = lacking
    items = "".join(
        f"<li>{html.escape(', '.join(dict.fromkeys(names)))}: {html.escape(note)}</li>"
        for note, names in said.items()
    )
    return f"<h3>Notes</h3><ul>{items}</ul>" if items else ""


def missing(entries: Sequence[Entry]) -> Mapping[str, list[str]]:
    """Which entries lack what, and what would make it."""
    lacking = collections.defaultdict(list)
    for entry in entries:
        record = entry.records[0]
        if entry.is_trained and not record.imported and not record.metrics:
            lacking["training curves (metrics.jsonl)"].append(entry.title)
        if not entry.held_out:
            lacking["held-out loss (eval.py)"].append(entry.title)
        for name in task_names(entries) or ["tasks"]:
            if name not in entry.tasks:
                lacking[f"{name} (eval.py --tasks)"].append(entry.title)
        if entry.is_trained and not entry.nats:
            lacking["nats of text files (benchmarks/text_nats.py --to)"].append(entry.title)
        if record.parameters is None:
            lacking["number of parameters, as the tokenizer is gone"].append(entry.title)
        # Some runs of a row may lack what others have.
        for what, found in (("held-out loss", entry.held_out), *entry.tasks.items()):
            if 0 < len(found) < len(entry.records):
                count = f"{what} of {len(entry.records) - len(found)} of {len(entry.records)} seeds"
                lacking[count].append(entry.title)
    return lacking


def _attention(entry: Entry) -> tuple[str, dict[str, int]]:
    """Kinds and sizes that were evaluated, which may not be those of training."""
    for results in (entry.held_out, *entry.tasks.values()):
        if results:
            return results[0].kinds, results[0].sizes
    return entry.records[0].kinds, entry.records[0].sizes


def _size_column(entries: Sequence[Entry], name: str) -> tuple[str, list[str]]:
    return name, [_count(_attention(entry)[1].get(name)) for entry in entries]


def _tokens(entry: Entry) -> int | None:
    """Positions of the rows that training has read until the step that is shown."""
    record = entry.records[0]
    if record.imported or entry.step is None:
        return None
    return entry.step * record.config.train.batch_size * record.config.data.seq_len


def _count(value: int | None) -> str:
    return _NOTHING if value is None else f"{value:,}"


def _loss(results: Sequence[HeldOut], name: str) -> Value | None:
    # Of what is no text there are no bytes, and earlier versions did not report accuracy.
    losses = [result.loss for result in results]
    missing = {
        "bits_per_byte": not all(loss.bytes for loss in losses),
        "accuracy": any(math.isnan(loss.accuracy) for loss in losses),
    }
    if not results or missing.get(name):
        return None
    error = results[0].loss.standard_error if name == "nats_per_token" else math.nan
    values = [getattr(loss, name) for loss in losses]
    return Value(spread(values, error), results[0].setting)


def _accuracy(results: Sequence[TaskResult]) -> Value | None:
    """The mean over all cells, each of which has as many samples."""
    if not results:
        return None
    means = [sum(c.accuracy for c in result.cells) / len(result.cells) for result in results]
    return Value(spread(means), results[0].setting)
