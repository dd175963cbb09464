"""Curves, heat maps and diagnostics of the page."""

from __future__ import annotations

import collections
import html
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from sparsek_jax.evaluation.gates import MEANINGS
from sparsek_jax.evaluation.page.charts import Series, line_chart
from sparsek_jax.evaluation.page.entries import Entry, Spread, mean_and_deviation, spread
from sparsek_jax.evaluation.page.records import TaskResult, TextNats
from sparsek_jax.evaluation.page.tables import (
    Marks,
    Value,
    best_marked,
    format_spread,
    key,
    row_head,
    task_names,
)
from sparsek_jax.evaluation.perplexity import Bucket
from sparsek_jax.evaluation.report import context_span, finite_mean

# Of the steps: what is above the rest only in these does not set the scale.
_WARM_UP = 0.05
_GATES = (
    ("kept_mass", "mass kept by top-k", ".1%"),
    ("support", "mean support", ",.1f"),
    ("saturation", "selected, gate = 1", ".1%"),
    ("interior", "support, gate < 1", ".1%"),
    ("score_std", "score std", ".3g"),
)


def training_curves(entries: Sequence[Entry]) -> str:
    """Loss by step, in a chart for each text that was trained on."""
    texts = collections.defaultdict(list)
    for entry in entries:
        record = entry.records[0]
        if entry.is_trained and record.metrics:
            seq_len = record.config.data.seq_len
            texts[f"{record.corpus or 'unknown text'}, seq_len {seq_len:,}"].append(entry)
    charts = []
    for text, group in texts.items():
        for name, title in (("loss", "Training loss"), ("validation_loss", "Validation loss")):
            curves = [Series(e.index, e.title, *e.curve(name)) for e in group]
            curves = [curve for curve in curves if np.isfinite(curve.y).any()]
            if curves:
                options = {"xlabel": "step", "y_range": _late_range(curves)}
                title = f"{title}, {text}" if len(texts) > 1 else title
                charts.append(line_chart(curves, title=title, ylabel="nats per token", **options))
    return _charts(charts, [e for group in texts.values() for e in group])


def _late_range(curves: Sequence[Series]) -> tuple[float, float] | None:
    """Of what comes after the first steps, where these are far above it."""
    late = np.concatenate([c.y[c.x > _WARM_UP * c.x.max()] for c in curves])
    late = late[np.isfinite(late)]
    highest = max(np.nanmax(curve.y) for curve in curves)
    if not late.size or highest - late.min() < 1.5 * (late.max() - late.min()):
        return None
    margin = 0.04 * (late.max() - late.min()) or 1.0
    return float(late.min() - margin), float(late.max() + margin)


def loss_by_position(entries: Sequence[Entry], marks: Marks) -> str:
    """Held-out loss by context, in a chart for each text and set of buckets."""
    groups = collections.defaultdict(list)
    for entry in entries:
        if entry.held_out:
            spans = tuple(_short(bucket) for bucket in entry.held_out[0].loss.buckets)
            groups[entry.held_out[0].setting, spans].append(entry)
    charts = []
    for (setting, spans), group in groups.items():
        series = []
        for entry in group:
            buckets = [result.loss.buckets for result in entry.held_out]
            nats = np.array([[bucket.nats_per_token for bucket in run] for run in buckets])
            mean, error = mean_and_deviation(nats)
            if len(buckets) == 1:
                error = np.array([bucket.standard_error for bucket in buckets[0]])
            series.append(Series(entry.index, entry.title, np.arange(len(spans)), mean, error))
        if any(np.isfinite(each.y).any() for each in series):
            chart = line_chart(
                series,
                title="Held-out loss by context",
                xlabel="tokens of context",
                ylabel="nats per token",
                categories=spans,
            )
            charts.append(_with_mark(chart, marks.mark(setting)))
    return _charts(charts, [entry for group in groups.values() for entry in group])


def heat_maps(entries: Sequence[Entry], marks: Marks) -> str:
    """Accuracy by length and depth, a row of maps for each task."""
    out = []
    for name in task_names(entries):
        with_task = [(entry, entry.tasks[name]) for entry in entries if name in entry.tasks]
        maps = "".join(_heat_map(entry, results, marks) for entry, results in with_task)
        measure = html.escape(with_task[0][1][0].measure)
        out.append(
            f'<h3>{html.escape(name)} <small>{measure}</small></h3><div class="maps">{maps}</div>'
        )
    if out:
        ramp = "".join(f'<i style="--a:{step / 10}"></i>' for step in range(11))
        note = "small: nats per token of the answer. Columns: tokens of prompt; rows: depth."
        out.insert(0, f'<p class="ramp">0 % <span>{ramp}</span> 100 %; {note}</p>')
    return "".join(out)


def _heat_map(entry: Entry, results: Sequence[TaskResult], marks: Marks) -> str:
    cells = collections.defaultdict(list)
    for cell in (cell for result in results for cell in result.cells):
        cells[cell.length, cell.depth].append(cell)
    lengths, depths = (
        sorted({at[i] for at in cells}, key=lambda x: (x is None, x)) for i in (0, 1)
    )
    rows = []
    for depth in depths:
        row = "".join(_heat_cell(cells[length, depth]) for length in lengths)
        rows.append(f"<tr><th>{'any' if depth is None else f'{depth:g}'}</th>{row}</tr>")
    head = "".join(f"<th>{length:,}</th>" for length in lengths)
    return (
        f"<div><p>{key(entry)}{marks.mark(results[0].setting)}</p>"
        f'<table class="map"><tr><th></th>{head}</tr>{"".join(rows)}</table></div>'
    )


def _heat_cell(cells) -> str:
    accuracy = spread([cell.accuracy for cell in cells])
    nats = spread([cell.nats_per_token for cell in cells])
    told = f"{cells[0].samples} samples" + (f" for each of {len(cells)} seeds" if cells[1:] else "")
    title = f"{format_spread(accuracy, '.1%')}, {format_spread(nats, '.3f')} nats; {told}"
    return (
        f'<td style="--a:{accuracy.mean:.3f}" title="{title}">{accuracy.mean:.0%}'
        f"<small>{format_spread(Spread(nats.mean), '.2f')}</small></td>"
    )


def diagnostics(entries: Sequence[Entry], marks: Marks) -> str:
    """Gates by layer: charts of all runs, and a table of each."""
    with_gates = [e for e in entries if any(result.gates for result in e.held_out)]
    if not with_gates:
        return ""
    layers = sorted({g.layer for e in with_gates for r in e.held_out for g in r.gates})
    charts = []
    for field, title, _ in _GATES:
        series = []
        for entry in with_gates:
            means, errors = _by_layer(entry, field)
            x = np.array([layers.index(layer) for layer in means], float)
            y, error = np.array(list(means.values())), np.array(list(errors.values()))
            series.append(Series(entry.index, entry.title, x, y, error))
        if len(layers) > 1 and any(np.isfinite(each.y).any() for each in series):
            names = [str(layer) for layer in layers]
            share = field in ("kept_mass", "saturation", "interior")
            options = {"y_range": (0.0, 1.02)} if share else {}
            ylabel = "share" if share else "keys" if field == "support" else ""
            chart = line_chart(
                series, title=title, xlabel="layer", ylabel=ylabel, categories=names, **options
            )
            charts.append(chart)
    seen = {v for e in with_gates for r in e.held_out for g in r.gates for v in g.verdicts}
    meanings = "".join(
        f"<li>{_verdict(verdict)} {html.escape(meaning)}</li>"
        for verdict, meaning in MEANINGS.items()
        if verdict in seen
    )
    tables = "".join(_gates_table(entry, marks) for entry in with_gates)
    return _charts(charts, with_gates) + f'<div class="maps">{tables}</div><ul>{meanings}</ul>'


def _by_layer(entry: Entry, field: str) -> tuple[dict[int, float], dict[int, float]]:
    """Means over heads and seeds, and standard deviations over seeds."""
    values = collections.defaultdict(list)
    for layer in (layer for result in entry.held_out for layer in result.gates):
        values[layer.layer].append(finite_mean(getattr(layer, field)))
    spreads = {layer: spread(values[layer]) for layer in sorted(values)}
    return ({n: s.mean for n, s in spreads.items()}, {n: s.error for n, s in spreads.items()})


def _gates_table(entry: Entry, marks: Marks) -> str:
    columns = [(title, spec, *_by_layer(entry, field)) for field, title, spec in _GATES]
    verdicts = collections.defaultdict(collections.Counter)
    for layer in (layer for result in entry.held_out for layer in result.gates):
        verdicts[layer.layer].update(layer.verdicts)
    rows = []
    for layer, counts in sorted(verdicts.items()):
        cells = "".join(
            f"<td>{format(means[layer], spec) if np.isfinite(means[layer]) else '-'}</td>"
            for _, spec, means, _ in columns
        )
        heads = " ".join(f"{count} {_verdict(name)}" for name, count in counts.items())
        rows.append(f'<tr><th scope="row">{layer}</th>{cells}<td class="heads">{heads}</td></tr>')
    head = "".join(f"<th>{html.escape(title)}</th>" for title, *_ in columns)
    mark = marks.mark(entry.held_out[0].setting)
    return (
        f'<div class="wide"><table class="gates"><caption>{key(entry)}{mark}</caption>'
        f"<tr><th>layer</th>{head}<th>heads</th></tr>{''.join(rows)}</table></div>"
    )


def _verdict(name: str) -> str:
    fine = "fine" if name == "alive" else "quiet" if name == "unused" else "bad"
    return f'<span class="verdict {fine}">{html.escape(name)}</span>'


def text_nats(entries: Sequence[Entry]) -> str:
    """Nats of text files by kind and position, a part for each set of files."""
    groups = collections.defaultdict(list)
    for entry in entries:
        for setting, results in entry.nats.items():
            groups[setting].append((entry, results))
    out = []
    for setting, group in groups.items():
        first = group[0][1][0]
        names = _kind_names(first)
        rows, charts = [], []
        columns = [
            best_marked(
                [_mean_nats(results, kind, setting) for _, results in group], min, ".4f", Marks(())
            )
            for kind in names
        ]
        for i, (entry, _) in enumerate(group):
            rows.append(f"<tr>{row_head(entry)}{''.join(f'<td>{c[i]}</td>' for c in columns)}</tr>")
        spans = [
            _short(Bucket(*ends, 0, 0, 0))
            for ends in zip(first.edges, first.edges[1:], strict=False)
        ]
        for kind, name in names.items() if len(spans) > 1 else ():
            series = []
            for entry, results in group:
                mean, error = mean_and_deviation(np.array([r.kinds[kind] for r in results]))
                series.append(Series(entry.index, entry.title, np.arange(len(mean)), mean, error))
            if any(np.isfinite(each.y).any() for each in series):
                options = {"xlabel": "position", "ylabel": "nats per token", "categories": spans}
                charts.append(line_chart(series, title=name, **options))
        head = "".join(f"<th>{html.escape(name)}</th>" for name in names.values())
        out.append(
            f"<p>{html.escape(setting.text)}</p>"
            f'<div class="wide"><table class="runs"><tr><th>run</th>{head}</tr>{"".join(rows)}'
            f"</table></div>{_charts(charts, [entry for entry, _ in group])}"
        )
    return "".join(out)


def _mean_nats(results: Sequence[TextNats], kind: str, setting) -> Value:
    return Value(spread([result.mean(kind) for result in results]), setting)


def _kind_names(nats: TextNats) -> dict[str, str]:
    """What to call directories: what distinguishes them."""
    if len(nats.kinds) == 1:
        return {kind: Path(kind).name or kind for kind in nats.kinds}
    if any(os.path.isabs(kind) for kind in nats.kinds) != all(map(os.path.isabs, nats.kinds)):
        return {kind: kind for kind in nats.kinds}
    common = os.path.commonpath(nats.kinds)
    names = {kind: os.path.relpath(kind, common or ".") for kind in nats.kinds}
    return {kind: "./" if name == "." else name for kind, name in names.items()}


def _short(bucket: Bucket) -> str:
    return context_span(bucket).replace(" to ", "-")


def _with_mark(figure: str, mark: str) -> str:
    return figure.replace(" <small>", f"{mark} <small>", 1)


def _charts(charts: Sequence[str], entries: Sequence[Entry]) -> str:
    """Charts with the colours of their lines above them."""
    if not charts:
        return ""
    keys = "".join(key(entry) for entry in {entry.index: entry for entry in entries}.values())
    return f'<div class="keys">{keys}</div><div class="charts">{"".join(charts)}</div>'
