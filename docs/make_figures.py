"""Draws the pictures of docs/, most of them from what the operators return: make figures."""

import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.colors import ListedColormap
from matplotlib.patches import Patch, Rectangle

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY))

from sparsek_jax import causal_selection, sparsek  # noqa: E402

IMAGES = REPOSITORY / "docs" / "images"

# Colours that stay apart for colour-blind readers.
BLUE, ORANGE, GREEN, GREY, RED = "#0072B2", "#E69F00", "#009E73", "#BBBBBB", "#D55E00"

# The sequence that every causal picture shows.
LENGTH, NUM_SELECTED, WINDOW = 48, 6, 8


def main() -> None:
    """Writes every picture to docs/images/."""
    plt.rcParams.update(
        {
            "font.size": 11,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "legend.frameon": False,
            "figure.constrained_layout.use": True,
        }
    )
    IMAGES.mkdir(exist_ok=True)
    pictures = {
        "projection": projection,
        "thresholds": thresholds,
        "pattern": pattern,
        "runs": runs,
        "descent": descent,
        "chunk": chunk,
        "prefix_sums": prefix_sums,
    }
    for name, draw in pictures.items():
        figure = draw()
        figure.savefig(IMAGES / f"{name}.png", dpi=110, metadata={"Software": None})
        plt.close(figure)


def projection() -> plt.Figure:
    """Scores, the clip between tau and tau + 1, and the mass as a function of tau."""
    z, k = np.array([2.3, 1.9, 1.45, 1.2, 0.95, 0.6, 0.1, -0.3], np.float32), 3
    p = np.asarray(sparsek(jnp.asarray(z), k))
    interior = (p > 0) & (p < 1)
    tau = float(np.mean((z - p)[interior]))
    rank = np.arange(1, len(z) + 1)

    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4))
    left.axhspan(tau, tau + 1, color=GREY, alpha=0.35, lw=0)
    colours = np.where(p >= 1, GREEN, np.where(p > 0, BLUE, GREY))
    for i, score, gate, colour in zip(rank, z, p, colours, strict=True):
        left.plot([i, i], [tau, tau + gate], color=colour, lw=9, solid_capstyle="butt")
        left.plot(i, score, "o", color="black", ms=5, zorder=3)
        left.annotate(
            f"{gate:.2f}", (i, max(score, tau)), (0, 7), textcoords="offset points", ha="center"
        )
    for y, text in ((tau, r"$\tau$"), (tau + 1, r"$\tau+1$")):
        left.axhline(y, color=RED, lw=1.2)
        left.annotate(text, (8.55, y), color=RED, va="bottom", ha="left")
    left.set(
        xlim=(0.4, 9.4),
        ylim=(-0.5, 2.75),
        xticks=rank,
        xlabel="rank of the score",
        ylabel="score $z$ (dots)",
        title=rf"bars: $p = \mathrm{{clip}}(z-\tau, 0, 1)$, sum {p.sum():.0f}",
    )

    x = np.linspace(-1.5, 2.5, 400)
    mass = np.clip(z[:, None] - x, 0, 1).sum(0)
    right.plot(x, mass, color=BLUE, lw=2)
    right.axhline(k, color=GREY, lw=1)
    right.plot([tau, tau], [0, k], color=RED, lw=1.2, ls="--")
    right.plot(tau, k, "o", color=RED)
    right.annotate(rf"$f(\tau) = k = {k}$", (tau, k), (10, 8), textcoords="offset points")
    right.annotate(r"$\tau$", (tau, 0.1), (5, 0), textcoords="offset points", color=RED)
    right.set(
        xlabel="$x$",
        ylabel="mass $f(x)$",
        ylim=(0, 8.3),
        title=r"$f(x) = \Sigma_i\,\mathrm{clip}(z_i - x, 0, 1)$ falls with $x$",
    )
    return figure


def _example():
    """Scores `[T]` and the selection of the sequence that the causal pictures show."""
    scores = jnp.asarray(np.random.default_rng(3).normal(size=LENGTH).cumsum() * 0.12, jnp.float32)
    scores += jax.random.normal(jax.random.key(1), (LENGTH,)) * 0.55
    selection = causal_selection(
        scores[None, :, None], num_selected=NUM_SELECTED, sliding_window=WINDOW
    )
    cutoff_score, cutoff_index, tau = (
        np.asarray(x)[0, :, 0]
        for x in (selection.cutoff_score, selection.cutoff_index, selection.tau)
    )
    return np.asarray(scores), cutoff_score, cutoff_index, tau


def _dense_gates():
    """For every (query, key): gate, whether selected, whether in the window, whether interior."""
    scores, cutoff_score, cutoff_index, tau = _example()
    query, key = np.arange(LENGTH)[:, None], np.arange(LENGTH)[None, :]
    pool = key <= query - WINDOW
    window = (key <= query) & ~pool
    ahead = (scores > cutoff_score[:, None]) | (
        (scores == cutoff_score[:, None]) & (key <= cutoff_index[:, None])
    )
    distance = scores - tau[:, None]
    interior = pool & (distance > 0) & (distance < 1)
    return np.clip(distance, 0, 1), pool & ahead, window, interior


def thresholds() -> plt.Figure:
    """Scores by position, and the cutoff and tau that rise with the query."""
    scores, cutoff_score, _, tau = _example()
    t = np.arange(LENGTH)
    finite = np.isfinite(tau)
    figure, axis = plt.subplots(figsize=(10, 4.2))
    axis.plot(t + WINDOW, scores, "o", color="black", ms=4.5, label="key's score, where it enters")
    axis.step(t[finite], cutoff_score[finite], where="post", color=BLUE, lw=2, label="cutoff score")
    axis.step(t[finite], tau[finite], where="post", color=RED, lw=2, label=r"$\tau_t$")
    axis.step(
        t[finite], tau[finite] + 1, where="post", color=RED, lw=1, ls="--", label=r"$\tau_t+1$"
    )
    first = int(t[finite][0])
    axis.axvspan(0, first, color=GREY, alpha=0.2, lw=0)
    axis.text(
        first / 2,
        scores.max() + 0.42,
        f"pool holds at most {NUM_SELECTED}:\nall selected, gates 1",
        ha="center",
        va="top",
    )
    axis.set(
        xlim=(0, LENGTH - 0.5),
        ylim=(scores.min() - 0.2, scores.max() + 0.5),
        xlabel="query $t$",
        ylabel="score",
        title=f"both thresholds only rise (k = {NUM_SELECTED}, w = {WINDOW})",
    )
    axis.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure


def pattern() -> plt.Figure:
    """The attention pattern: window, selected keys by gate, nothing else."""
    gate, selected, window, _ = _dense_gates()
    figure, axis = plt.subplots(figsize=(7.6, 6))
    image = axis.imshow(np.where(selected, gate, np.nan), cmap="viridis_r", vmin=0, vmax=1)
    axis.imshow(np.where(window, 1.0, np.nan), cmap=ListedColormap([ORANGE]))
    figure.colorbar(image, ax=axis, label="gate of a selected key", shrink=0.8)
    axis.legend(
        handles=[
            Patch(color=ORANGE, label=f"window, w = {WINDOW}"),
            Patch(facecolor="white", edgecolor=GREY, label="not attended"),
        ],
        loc="upper right",
    )
    axis.set(
        xlabel="key $j$",
        ylabel="query $t$",
        title=f"at most w + k = {WINDOW + NUM_SELECTED} keys a query",
    )
    return figure


def runs() -> plt.Figure:
    """The life of a key: window, saturated, interior, dropped."""
    gate, selected, window, _ = _dense_gates()
    shown = np.arange(0, LENGTH - WINDOW, 2)
    figure, axis = plt.subplots(figsize=(10, 5.2))
    phases = (
        (window, ORANGE, "in the window"),
        (selected & (gate >= 1), GREEN, "selected, gate 1"),
        (selected & (gate < 1), BLUE, "selected, gate below 1"),
    )
    for mask, colour, label in phases:
        for row, key in enumerate(shown):
            queries = np.flatnonzero(mask[:, key])
            if len(queries):
                span = (queries[0], queries[-1] - queries[0] + 1)
                axis.broken_barh([span], (row - 0.36, 0.72), color=colour)
        axis.plot([], [], color=colour, lw=7, label=label)
    axis.set(
        xlim=(0, LENGTH),
        ylim=(len(shown) - 0.4, -0.6),
        yticks=np.arange(0, len(shown), 2),
        yticklabels=shown[::2],
        xlabel="query $t$",
        ylabel="key $j$",
        title="every key is attended by one unbroken run of queries",
    )
    axis.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure


def descent() -> plt.Figure:
    """One query's f over its breakpoints, and the halvings that find the piece crossing k."""
    pool = np.array([1.75, 1.0, 0.9, 0.55, -0.2, -0.6])
    k = 3
    breakpoints = np.sort(np.concatenate([pool, pool - 1]))[::-1]
    weight = np.where(np.isin(breakpoints, pool), 1, -1)
    mass = np.clip(pool[:, None] - breakpoints, 0, 1).sum(0)
    size = 1 << (len(breakpoints) - 1).bit_length()

    # The same walk as ops/selection.py: the half with the larger breakpoints, if f exceeds k
    # before its end, else the other one.
    node, spans = 0, [(0, size)]
    half = size // 2
    while half:
        middle = node + half
        if middle < len(breakpoints) and mass[middle] <= k:
            node = middle
        spans.append((node, half))
        half //= 2
    tau = np.interp(k, mass[node : node + 2], breakpoints[node : node + 2])

    figure, (top, bottom) = plt.subplots(
        2, 1, figsize=(10, 6), height_ratios=(2, 1.25), sharex=True
    )
    x = np.linspace(breakpoints[-1] - 0.55, breakpoints[0] + 0.15, 500)
    top.plot(x, np.clip(pool[:, None] - x, 0, 1).sum(0), color=BLUE, lw=2, label="$f_t(x)$")
    for sign, colour, label in ((1, GREEN, "$u_j$, weight +1"), (-1, ORANGE, "$u_j-1$, weight -1")):
        chosen = weight == sign
        top.plot(breakpoints[chosen], mass[chosen], "o", color=colour, ms=8, label=label)
    top.axhline(k, color=GREY, lw=1)
    top.plot(tau, k, "X", color=RED, ms=10, label=rf"$f_t(\tau)=k={k}$")
    top.set(ylabel="mass above $x$", title="the mass is linear between breakpoints")
    top.legend(loc="upper left")

    ends = np.append(breakpoints, breakpoints[-1] - 0.15)
    for level, (begin, width) in enumerate(spans):
        last = min(begin + width, len(breakpoints))
        right, left = ends[begin], ends[last]
        bottom.broken_barh([(left, right - left)], (level - 0.35, 0.7), color=BLUE, alpha=0.75)
        ranks = f"ranks {begin} to {last - 1}" if width > 1 else f"rank {begin}"
        bottom.text(left - 0.03, level, ranks, va="center")
    for axis in (top, bottom):
        axis.axvline(tau, color=RED, lw=1, ls="--")
    bottom.set(
        xlim=(breakpoints[0] + 0.15, breakpoints[-1] - 0.55),
        ylim=(len(spans) - 0.4, -0.6),
        yticks=range(len(spans)),
        ylabel="level",
        xlabel="$x$ (rank 0 is the largest breakpoint)",
        title="one bit of the rank a level",
    )
    return figure


def chunk() -> plt.Figure:
    """One chunk's rows of the pattern: the gathered list and the contiguous slab."""
    _, selected, window, _ = _dense_gates()
    first, size = 32, 8
    queries = slice(first, first + size)
    listed = selected[first]
    slab = np.zeros(LENGTH, bool)
    slab[first - WINDOW + 1 : first + size] = True
    kind = np.select([window[queries], selected[queries]], [2.0, 1.0], np.nan)

    figure, axis = plt.subplots(figsize=(10, 3.6))
    axis.imshow(
        kind,
        cmap=ListedColormap([BLUE, ORANGE]),
        vmin=1,
        vmax=2,
        extent=(-0.5, LENGTH - 0.5, first + size - 0.5, first - 0.5),
        aspect="auto",
    )
    for j in np.flatnonzero(listed):
        axis.add_patch(
            Rectangle((j - 0.5, first - 0.5), 1, size, fill=False, edgecolor=BLUE, lw=1.4)
        )
    axis.add_patch(
        Rectangle(
            (first - WINDOW + 0.5, first - 0.5),
            WINDOW + size - 1,
            size,
            fill=False,
            edgecolor=ORANGE,
            lw=1.8,
        )
    )
    axis.annotate(
        "list: the k keys of the first query",
        (np.flatnonzero(listed).mean(), first - 0.6),
        (0, 10),
        textcoords="offset points",
        ha="center",
        color=BLUE,
        annotation_clip=False,
    )
    axis.annotate(
        "slab: $w + C - 1$ rows",
        (first - WINDOW + 0.5 + (WINDOW + size - 1) / 2, first - 0.6),
        (0, 10),
        textcoords="offset points",
        ha="center",
        color=ORANGE,
        annotation_clip=False,
    )
    axis.set(
        xlim=(-0.5, LENGTH - 0.5),
        ylim=(first + size - 0.4, first - 0.6),
        yticks=range(first, first + size, 2),
        xlabel="key $j$",
        ylabel="query $t$",
    )
    axis.legend(
        handles=[
            Patch(color=BLUE, label="selected"),
            Patch(color=ORANGE, label="window"),
            Patch(facecolor="white", edgecolor=GREY, label="masked"),
        ],
        loc="center left",
        bbox_to_anchor=(1.0, 0.5),
    )
    return figure


def prefix_sums() -> plt.Figure:
    """The gradient of every tau, shared among interior keys, summed over one key's interval."""
    *_, interior = _dense_gates()
    share = np.abs(np.random.default_rng(0).normal(size=LENGTH)) * interior.any(1)
    share /= np.maximum(interior.sum(1), 1)
    prefix = np.concatenate([[0], share.cumsum()])
    # The longest interval that both begins and ends well inside the picture.
    key = int(np.argmax(interior.sum(0) * ~interior[:20].any(0) * ~interior[-3:].any(0)))
    queries = np.flatnonzero(interior[:, key])
    begin, end = queries[0], queries[-1] + 1

    figure, (top, bottom) = plt.subplots(2, 1, figsize=(10, 5), sharex=True)
    t = np.arange(LENGTH)
    inside = (t >= begin) & (t < end)
    top.bar(t, share, color=np.where(inside, BLUE, GREY), align="edge", width=0.9)
    top.set(
        ylabel="$G_t$", title=f"key {key} is interior for the queries from {begin} to {end - 1}"
    )
    bottom.plot(np.arange(LENGTH + 1), prefix, color="black", lw=1.2)
    for edge, name in ((begin, "b"), (end, "e")):
        for axis in (top, bottom):
            axis.axvline(edge, color=RED, lw=1, ls="--")
        bottom.plot([0, edge], [prefix[edge]] * 2, color=BLUE, lw=1)
        bottom.plot(edge, prefix[edge], "o", color=BLUE)
        bottom.annotate(
            f"$R_{{{name}_j}}$", (edge, prefix[edge]), (8, -14), textcoords="offset points"
        )
    bottom.annotate(
        "",
        (1.5, prefix[begin]),
        (1.5, prefix[end]),
        arrowprops={"arrowstyle": "<->", "color": BLUE},
    )
    bottom.text(2.2, prefix[[begin, end]].mean(), "sum of the blue bars", color=BLUE, va="center")
    bottom.set(
        xlim=(0, LENGTH),
        ylim=(-0.1, None),
        xlabel="query $t$",
        ylabel="$R_t$, sum of $G$ before $t$",
    )
    return figure


if __name__ == "__main__":
    main()
