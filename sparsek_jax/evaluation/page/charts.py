"""Line charts as inline SVG, in colours of the page that the reader's theme chooses."""

from __future__ import annotations

import dataclasses
import html
import math
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float64

# As the page's style sheet has them; then they repeat, dashed.
NUM_COLOURS = 8
_WIDTH, _HEIGHT, _LEFT, _RIGHT, _TOP = 460, 250, 52, 14, 12
# Of points, with more of which means of neighbours are drawn instead.
_MOST_POINTS = 240
_MOST_MARKS = 40


@dataclasses.dataclass(frozen=True)
class Series:
    """A line.

    Attributes:
      index: Of the entry, which chooses the colour.
      name: For people.
      x: Ascending; with categories, their indices.
      y: NaN leaves a gap.
      error: Half the height of the band around it; NaN for none.
    """

    index: int
    name: str
    x: Float64[np.ndarray, " n"]
    y: Float64[np.ndarray, " n"]
    error: Float64[np.ndarray, " n"]


def style_of(index: int) -> str:
    """CSS classes of an entry's colour and dashes."""
    dashes = index // NUM_COLOURS % 3
    return f"c{index % NUM_COLOURS}" + (f" d{dashes}" if dashes else "")


def line_chart(
    series: Sequence[Series],
    *,
    title: str,
    xlabel: str,
    ylabel: str,
    categories: Sequence[str] = (),
    y_range: tuple[float, float] | None = None,
) -> str:
    """Draws lines.

    Args:
      series: At least one with a finite value.
      title: Above.
      xlabel: What x is.
      ylabel: What y is.
      categories: Names of x = 0, 1, ...; none: x is a number, from 0 on.
      y_range: Of the axis, beyond which lines are cut off; None: all that there is.

    Returns:
      A figure, as HTML.
    """
    slanted = sum(len(name) + 2 for name in categories) > 60
    bottom = _HEIGHT - (64 if slanted else 36)
    low, high = y_range or _range(series)
    ticks = _ticks(low, high, 5)
    x_high = max(len(categories) - 1, 0) if categories else max(s.x.max() for s in series)
    x_low, x_high = (-0.3, x_high + 0.3) if categories else (0.0, max(x_high, 1.0))

    def place(x, y):
        return (
            _LEFT + (x - x_low) / (x_high - x_low) * (_WIDTH - _LEFT - _RIGHT),
            bottom - (y - low) / (high - low) * (bottom - _TOP),
        )

    out = []
    for value in ticks:
        _, y = place(0, value)
        out.append(
            f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
        )
        out.append(f'<text x="{_LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{_tick(value)}</text>')
    out += _x_axis(categories, slanted, x_high, bottom, place)
    middle = (_LEFT + _WIDTH - _RIGHT) / 2
    out.append(
        f'<text x="{middle}" y="{_HEIGHT - 3}" text-anchor="middle">{html.escape(xlabel)}</text>'
    )
    # What is beyond the axis is not drawn, but marks on its ends are whole.
    top, size = _TOP - 5, f"{_WIDTH} {bottom - _TOP + 10}"
    width, height = size.split()
    out.append(f'<svg y="{top}" width="{width}" height="{height}" viewBox="0 {top} {size}">')
    out += [*(_line(each, place, categories) for each in series), "</svg>"]
    return (
        f"<figure><figcaption>{html.escape(title)} <small>{html.escape(ylabel)}</small>"
        "</figcaption>"
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{html.escape(title)}">'
        + "".join(out)
        + "</svg></figure>"
    )


def _x_axis(categories, slanted, x_high, bottom, place) -> list[str]:
    if not categories:
        ticks = {_tick(value): place(value, 0)[0] for value in _ticks(0, x_high, 5)}
        return [
            f'<text x="{x:.1f}" y="{bottom + 16}" text-anchor="middle">{name}</text>'
            for name, x in ticks.items()
        ]
    out = []
    # More names than this would touch each other.
    every = math.ceil(len(categories) / 16)
    for index, name in enumerate(categories):
        if index % every:
            continue
        x, y = place(index, 0)[0], bottom + 16
        turn = f' transform="rotate(-32 {x:.1f} {y})"' if slanted else ""
        anchor = "end" if slanted else "middle"
        out.append(
            f'<text x="{x:.1f}" y="{y}" text-anchor="{anchor}"{turn}>{html.escape(name)}</text>'
        )
    return out


def _line(series: Series, place, categories: Sequence[str]) -> str:
    x, y, error = _thinned(series)
    finite = np.isfinite(y)
    out = []
    for part in np.flatnonzero(np.diff(np.r_[False, finite, False])).reshape(-1, 2):
        run = slice(*part)
        points = [place(*point) for point in zip(x[run], y[run], strict=True)]
        band = np.nan_to_num(error[run])
        if band.any():
            upper = [place(*point) for point in zip(x[run], y[run] + band, strict=True)]
            lower = [place(*point) for point in zip(x[run], y[run] - band, strict=True)]
            out.append(f'<polygon class="band" points="{_points(upper + lower[::-1])}"/>')
        out.append(f'<polyline points="{_points(points)}"/>')
    if finite.sum() <= _MOST_MARKS:
        for at, value, spread in zip(x[finite], y[finite], error[finite], strict=True):
            where = categories[int(at)] if categories else f"{at:,.0f}"
            told = f"{value:.4g}" + (f" ± {spread:.2g}" if math.isfinite(spread) else "")
            cx, cy = place(at, value)
            out.append(
                f'<circle cx="{cx:.1f}" cy="{cy:.1f}" r="3"><title>{html.escape(series.name)}, '
                f"{html.escape(where)}: {told}</title></circle>"
            )
    name = html.escape(series.name)
    return (
        f'<g class="s {style_of(series.index)}" data-e="{series.index}"><title>{name}</title>'
        f"{''.join(out)}</g>"
    )


def _points(points) -> str:
    return " ".join(f"{x:.1f},{y:.1f}" for x, y in points)


def _thinned(series: Series):
    """A line of many points, as means of runs of them; then without marks."""
    if len(series.x) <= _MOST_POINTS:
        return series.x, series.y, series.error
    starts = np.linspace(0, len(series.x), _MOST_POINTS + 1).astype(int)[:-1]
    sizes = np.diff(np.r_[starts, len(series.x)])
    return tuple(np.add.reduceat(v, starts) / sizes for v in (series.x, series.y, series.error))


def _range(series: Sequence[Series]) -> tuple[float, float]:
    ends = [s.y + sign * np.nan_to_num(s.error) for s in series for sign in (-1, 1)]
    values = np.concatenate(ends)
    values = values[np.isfinite(values)]
    low, high = float(values.min()), float(values.max())
    margin = 0.04 * (high - low) or abs(high) * 0.05 or 1.0
    return low - margin, high + margin


def _ticks(low: float, high: float, count: int) -> list[float]:
    """Multiples of 1, 2 or 5 times a power of ten between the ends, about `count` of them."""
    raw = (high - low) / count
    unit = 10 ** math.floor(math.log10(raw))
    step = next(m * unit for m in (1, 2, 5, 10) if m * unit >= raw * 0.999)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [i * step for i in range(first, last + 1)]


def _tick(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
