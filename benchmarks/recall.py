r"""Which attention learns associative recall, and what of SparseK it takes.

    python -m benchmarks.recall --to=runs/recall_study --seeds=3 [--jobs=6] [--arm=sparsek ...]

Every arm is trained by train.py and configs/recall.py: a run on short rows with dense attention,
which arms share, and then one on long rows. Runs that are finished are not repeated, and
interrupted ones resume. At last it prints a table of the accuracy on held-out rows, and writes it
as results.json and results.png. `--jobs` runs share the devices; times mean nothing then.
`--notrain` reports what there is.
"""

import dataclasses
import json
import pathlib

import numpy as np
from absl import app, flags
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from benchmarks.jobs import Job, last_measured, program, run_jobs


@dataclasses.dataclass(frozen=True)
class Arm:
    """What is trained.

    Attributes:
      group: Arms that are shown together.
      kind: Attention of the second layer.
      fields: Fields of the configuration that differ from the recipe's, in both runs.
      long_fields: In the run on long rows only.
    """

    group: str
    kind: str = "sparsek"
    fields: dict[str, object] = dataclasses.field(default_factory=dict)
    long_fields: dict[str, object] = dataclasses.field(default_factory=dict)

    @property
    def short_name(self) -> str:
        """Of the run on short rows: what is not as in the recipe."""
        parts = [f"{name.split('.')[-1]}={value}" for name, value in self.fields.items()]
        return ",".join(["short", *parts]).replace(":", "-")

    def short_command(self, workdir, seed):
        """Of train.py."""
        return program("train.py", "configs/recall.py", workdir, {**self.fields, "seed": seed})

    def command(self, start, workdir, seed):
        """Of train.py, from the run on short rows in `start`."""
        pattern = {"attention.pattern": ("window", self.kind)}
        fields = {**pattern, **self.fields, **self.long_fields, "seed": seed}
        return program("train.py", f"configs/recall.py:{start}", workdir, fields)


def _attention(**fields):
    return {f"attention.{name}": value for name, value in fields.items()}


# Filler that cannot be told from pairs: any token but the row's keys, as Zoology has it.
_ALIKE = {"data.tokenizer": "ids:128", "data.recall.num_fillers": 0}
_KINDS, _ABLATIONS, _FILLER = "attention", "SparseK", "filler that could be pairs"

ARMS = {
    "dense": Arm(_KINDS, "dense"),
    "sparsek": Arm(_KINDS),
    "random": Arm(_KINDS, "random"),
    "key_norm": Arm(_KINDS, "key_norm"),
    "strided": Arm(_KINDS, "strided"),
    "sinks": Arm(_KINDS, "sinks"),
    "window": Arm(_KINDS, "window", long_fields=_attention(sliding_window=128)),
    "gated_linear": Arm(_KINDS, "gated_linear"),
    "sparsek_linear": Arm(_KINDS, "sparsek_linear"),
    "nsa": Arm(_KINDS, "nsa", long_fields=_attention(block_size=14)),
    "moba": Arm(_KINDS, "moba", long_fields=_attention(block_size=16)),
    "bigbird": Arm(_KINDS, "bigbird", long_fields=_attention(block_size=14)),
    "lsh": Arm(_KINDS, "lsh", long_fields=_attention(num_selected=124)),
    "k = 30": Arm(_ABLATIONS, long_fields=_attention(num_selected=30)),
    "k = 62": Arm(_ABLATIONS, long_fields=_attention(num_selected=62)),
    "k = 254": Arm(_ABLATIONS, long_fields=_attention(num_selected=254)),
    "k = 510": Arm(_ABLATIONS, long_fields=_attention(num_selected=510)),
    "w = 8": Arm(_ABLATIONS, long_fields=_attention(sliding_window=8)),
    "w = 32": Arm(_ABLATIONS, long_fields=_attention(sliding_window=32)),
    "gates on values": Arm(_ABLATIONS, long_fields=_attention(gating="soft_values")),
    "gates on weights": Arm(_ABLATIONS, long_fields=_attention(gating="soft_weights")),
    "straight-through": Arm(_ABLATIONS, long_fields=_attention(gating="straight_through")),
    "score scale 1/4": Arm(_ABLATIONS, long_fields=_attention(score_scale=0.25)),
    "score scale 4": Arm(_ABLATIONS, long_fields=_attention(score_scale=4.0)),
    "no TimestepNorm": Arm(_ABLATIONS, long_fields=_attention(timestep_norm=False)),
    "no slope": Arm(_ABLATIONS, long_fields=_attention(slope=0.0)),
    "slope 1e-3": Arm(_ABLATIONS, long_fields=_attention(slope=1e-3)),
    "learned slope": Arm(_ABLATIONS, long_fields=_attention(learned_slope=True)),
    "shared scores": Arm(_ABLATIONS, long_fields=_attention(shared_scores=True)),
    "scorer rate 1e-3": Arm(_ABLATIONS, long_fields={"optimizer.scorer_learning_rate": 1e-3}),
    "scorer rate 1e-1": Arm(_ABLATIONS, long_fields={"optimizer.scorer_learning_rate": 1e-1}),
}
ARMS |= {
    f"{name}, any filler": dataclasses.replace(arm, group=_FILLER, fields=arm.fields | _ALIKE)
    for name, arm in ARMS.items()
    if name in ("dense", "sparsek", "random") or arm.group == _ABLATIONS
}

_TO = flags.DEFINE_string("to", None, "Directory of the runs and results.")
_SEEDS = flags.DEFINE_integer("seeds", 3, "Runs of each arm.", lower_bound=1)
_JOBS = flags.DEFINE_integer("jobs", 1, "Runs at a time.", lower_bound=1)
_ARMS = flags.DEFINE_multi_enum("arm", list(ARMS), list(ARMS), "Arms to train.")
_TRAIN = flags.DEFINE_bool("train", True, "Train what is missing.")
flags.mark_flag_as_required("to")


def last_accuracy(workdir: pathlib.Path) -> tuple[float, list[tuple[int, float]]] | None:
    """Accuracy on held-out rows when the run ended, and by step; None if it has not ended."""
    return last_measured(workdir, "validation_accuracy")


def _job(command, workdir):
    return Job([command], workdir / "train.log", lambda: last_accuracy(workdir) is not None)


def _picture(rows, path):
    """Bars of the means and dots of the seeds; what has the other filler stands beside the rest."""
    sides = [
        {name: x for name, x in rows.items() if (ARMS[name].group == _FILLER) == on_the_right}
        for on_the_right in (False, True)
    ]
    sides = [side for side in sides if side]
    figure = Figure(
        figsize=(5.5 * len(sides), 0.21 * max(map(len, sides)) + 0.9), layout="constrained"
    )
    colours = {_KINDS: "C0", _ABLATIONS: "C1", _FILLER: "C2"}
    for axes, side in zip(figure.subplots(1, len(sides), squeeze=False)[0], sides, strict=True):
        for i, (name, values) in enumerate(side.items()):
            colour = colours[ARMS[name].group]
            axes.barh(i, np.mean(values), color=colour, alpha=0.45)
            axes.plot(values, np.full(len(values), i), "o", color=colour, markersize=3.5)
        axes.set_yticks(range(len(side)), side)
        axes.set_ylim(max(map(len, sides)) - 0.4, -0.6)
        axes.set(xlim=(0, 1.02), xlabel="share of the values recalled; dots: seeds")
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="x", alpha=0.3)
    FigureCanvasAgg(figure).print_png(str(path))


def main(_):
    """Trains what is missing, and reports."""
    to = pathlib.Path(_TO.value)
    runs = [(name, ARMS[name], seed) for seed in range(_SEEDS.value) for name in _ARMS.value]

    def short(arm, seed):
        return to / f"{arm.short_name},seed={seed}"

    def place(name, seed):
        return to / f"{name.replace(' ', '').replace('/', '-')},seed={seed}"

    starts = {short(arm, seed): (arm, seed) for _, arm, seed in runs}
    all_ended = True
    if _TRAIN.value:
        short_jobs = [
            _job(arm.short_command(path, seed), path) for path, (arm, seed) in starts.items()
        ]
        jobs = [
            _job(arm.command(short(arm, seed), place(name, seed), seed), place(name, seed))
            for name, arm, seed in runs
        ]
        short_ended = run_jobs(short_jobs, _JOBS.value)
        all_ended = run_jobs(jobs, _JOBS.value) and short_ended
    found = {
        name: [last_accuracy(place(name, seed)) for seed in range(_SEEDS.value)]
        for name in _ARMS.value
    }
    found = {name: [x for x in results if x] for name, results in found.items()}
    rows = {name: [x[0] for x in results] for name, results in found.items() if results}
    print("| | accuracy | by seed |\n| --- | --- | --- |")
    for name, values in rows.items():
        print(f"| {name} | {np.mean(values):.1%} | {', '.join(f'{x:.1%}' for x in values)} |")
    record = {
        "short": {path.name: last_accuracy(path) for path in starts},
        "long": {name: [{"accuracy": a, "curve": c} for a, c in found[name]] for name in rows},
    }
    (to / "results.json").write_text(json.dumps(record) + "\n")
    if rows:
        _picture(rows, to / "results.png")
    if not all_ended:
        raise SystemExit("some runs have failed: see above")


if __name__ == "__main__":
    app.run(main)
