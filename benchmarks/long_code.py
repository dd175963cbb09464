"""Which attention models long code best: configs/long_code.py with each, against dense attention.

    python -m sparsek_jax.data.long_documents ...    # as configs/long_code.py has it; texts/
    python -m benchmarks.long_code --to=runs/long_code [--jobs=4 --gpus=0,1] [--arm=dense ...]

First comes the run on short rows that all arms start from, on several GPUs, then every arm with
every seed is trained on rows of `--length` tokens and evaluated: on such rows, and on those of
`--read` where that is given. Runs that are finished are not repeated, and interrupted ones resume.
At last it prints by how much each arm's nats exceed those of dense attention with the same seed,
and puts what eval.py wrote in TO/ARM_SEED.json (lengths that are not the recipe's are in the name),
for `python -m benchmarks.context_plot` to draw. `--notrain` reports what there is.
"""

import itertools
import json
import pathlib
import shutil

from absl import app, flags

from benchmarks.jobs import Job, last_measured, program, run_jobs

_CONFIG = "configs/long_code.py"
_LENGTH_OF_RECIPE, _TOKENS = 4096, 1 << 16  # a row; a batch


def _layers(kind, k=256, w=256, **fields):
    """All layers alike."""
    alike = {"pattern": (), "kind": kind, "num_selected": k, "sliding_window": w, "gating": "soft"}
    return alike | fields


def _last(kind, k, w, **fields):
    """The last layer of this kind, windows in the others."""
    return {"pattern": ("window",) * 5 + (kind,), "num_selected": k, "sliding_window": w} | fields


# Fields of `attention` that differ from the recipe's.
ARMS = {
    "dense": _layers("dense"),
    "last_layer_2304_128": {},
    "last_layer_1536_256": _last("sparsek", 1536, 256),
    "every_third_768_256": {
        "pattern": ("window", "window", "sparsek"),
        "num_selected": 768,
        "sliding_window": 256,
    },
    "soft_256_256": _layers("sparsek"),
    "values_384_128": _layers("sparsek", 384, 128, gating="soft_values"),
    "sparsek_linear": _layers("sparsek_linear"),
    "lsh": _layers("lsh", num_sinks=0),
    "window": _layers("window", w=512),
    "sinks": _layers("sinks", 4, 508),
    "gated_linear": _layers("gated_linear", w=512),
    "random": _layers("random", num_sinks=0),
    "strided": _layers("strided", num_sinks=0),
    "key_norm": _layers("key_norm", num_sinks=0),
    "moba": _layers("moba", num_sinks=0),
    "nsa": _layers("nsa", num_sinks=0),
    "bigbird": _layers("bigbird", num_sinks=0),
    "last_layer_lsh": _last("lsh", 1536, 256, num_sinks=0),
    "last_layer_random": _last("random", 1536, 256, num_sinks=0),
    "last_layer_key_norm": _last("key_norm", 1536, 256, num_sinks=0),
}

_TO = flags.DEFINE_string("to", None, "Directory of the runs and results.")
_ARMS = flags.DEFINE_multi_enum("arm", list(ARMS), list(ARMS), "What to train.")
_SEEDS = flags.DEFINE_integer("seeds", 3, "Runs of each arm.", lower_bound=1)
_FIRST = flags.DEFINE_integer("first_seed", 0, "Seed of the first of them.", lower_bound=0)
_LENGTH = flags.DEFINE_integer("length", _LENGTH_OF_RECIPE, "Tokens of a row.", lower_bound=1)
_READ = flags.DEFINE_integer("read", None, "Tokens of a row in a second evaluation.", lower_bound=1)
_FIELDS = flags.DEFINE_multi_string("field", [], "NAME=VALUE of the recipe, for all runs.")
_JOBS = flags.DEFINE_integer("jobs", 1, "Runs at a time, on each GPU.", lower_bound=1)
_GPUS = flags.DEFINE_list("gpus", [], "GPUs, of which each arm sees one. Without, it sees all.")
_TRAIN = flags.DEFINE_bool("train", True, "Train what is missing.")
flags.mark_flag_as_required("to")
flags.register_validator(
    "field", lambda fields: all("=" in x for x in fields), "expected NAME=VALUE"
)


def _given():
    return dict(field.split("=", 1) for field in _FIELDS.value)


def _rows(length):
    size = max(_TOKENS // length, 1)
    return {"data.seq_len": length, "train.batch_size": size, "eval.batch_size": size}


def _name(arm, seed):
    return f"{arm}_{seed}" + ("" if _LENGTH.value == _LENGTH_OF_RECIPE else f"_{_LENGTH.value}")


def evaluation_of(workdir: pathlib.Path, length: int) -> pathlib.Path | None:
    """What eval.py wrote of rows of so many tokens, after the last step of training."""
    for path in sorted(workdir.glob("eval/*.json")):
        found = json.loads(path.read_text())
        # Tasks have no loss, and a run that was interrupted has been evaluated too early.
        ended = found["step"] == found["config"]["train"]["steps"]
        if ended and "loss" in found and found["loss"]["buckets"][-1]["stop"] == length:
            return path
    return None


def has_ended(workdir: pathlib.Path) -> bool:
    """Whether training came to its last step, and not to a signal."""
    return last_measured(workdir, "validation_loss") is not None


def _lengths():
    return list(dict.fromkeys(x for x in (_LENGTH.value, _READ.value) if x))


def _job(arm, seed, start):
    """Trains an arm with a seed, and evaluates it."""
    workdir = pathlib.Path(_TO.value) / _name(arm, seed)
    fields = {f"attention.{name}": value for name, value in ARMS[arm].items()}
    fields |= {"seed": seed, "train.eval_every": 0} | _rows(_LENGTH.value)
    config = f"{_CONFIG}:{start}"
    commands = [program("train.py", config, workdir, fields | _given())]
    for length in _lengths():
        size = _rows(length)["eval.batch_size"]
        read = {"data.seq_len": length, "eval.batch_size": size}
        commands.append(program("eval.py", config, workdir, fields | read | _given()))
    return Job(
        commands,
        workdir / "log.txt",
        lambda: all(evaluation_of(workdir, length) for length in _lengths()),
    )


def _report(seeds):
    """Prints a table for each length, and keeps its files."""
    to = pathlib.Path(_TO.value)
    for length in _lengths():
        nats = {}
        for arm, seed in itertools.product(dict.fromkeys(["dense", *_ARMS.value]), seeds):
            name = _name(arm, seed)
            if path := evaluation_of(to / name, length):
                suffix = "" if length == _LENGTH.value else f"_read_at_{length}"
                shutil.copyfile(path, to / f"{name}{suffix}.json")
                nats[arm, seed] = json.loads(path.read_text())["loss"]["nats_per_token"]
        print(f"\nRows of {length:,} tokens\n| | over dense | nats |\n| --- | --- | --- |")
        for arm in _ARMS.value:
            found = [seed for seed in seeds if (arm, seed) in nats]
            over = [
                f"{nats[arm, seed] / nats['dense', seed] - 1:+.2%}"
                for seed in found
                if ("dense", seed) in nats
            ]
            if found:
                values = ", ".join(f"{nats[arm, seed]:.3f}" for seed in found)
                print(f"| {arm} | {', '.join(over)} | {values} |")


def main(argv):
    """Trains what is missing, and reports."""
    if len(argv) > 1:
        raise app.UsageError(f"unexpected argument {argv[1]!r}")
    seeds = range(_FIRST.value, _FIRST.value + _SEEDS.value)
    all_ended = True
    if _TRAIN.value:
        start = pathlib.Path(_TO.value) / "short"
        train = program("train.py", _CONFIG, start, {"train.eval_every": 0} | _given())
        short = Job([train], start / "log.txt", lambda: has_ended(start))
        # As many as share its batch equally.
        several = ",".join(_GPUS.value[: 1 << max(len(_GPUS.value), 1).bit_length() - 1])
        if not run_jobs([short], 1, [several] if several else []) or not has_ended(start):
            raise SystemExit(f"{start} has not come to its last step, from which arms start")
        jobs = [_job(arm, seed, start) for seed in seeds for arm in _ARMS.value]
        all_ended = run_jobs(jobs, _JOBS.value, _GPUS.value)
    _report(seeds)
    if not all_ended:
        raise SystemExit("some runs have failed: see above")


if __name__ == "__main__":
    app.run(main)
