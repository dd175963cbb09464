"""Benchmarks run as users run them, small, and recall's commands start where they should."""

import itertools
import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import attention


def call(module, *arguments):
    command = [sys.executable, "-m", f"benchmarks.{module}", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def run(module, *arguments):
    result = call(module, *arguments)
    assert result.returncode == 0, result.stderr[-2000:]
    return result.stdout


def test_recall_reports_the_runs_that_ended(tmp_path):
    for run_name, accuracies in {
        "nsa,seed=0": {100: 0.25, 400: 0.5},
        "scorescale1-4,anyfiller,seed=0": {400: 1.0},
        "dense,seed=0": {100: 1.0},  # not at its end
    }.items():
        workdir = tmp_path / run_name
        workdir.mkdir()
        (workdir / "config.json").write_text(json.dumps({"train": {"steps": 400}}))
        lines = [json.dumps({"step": s, "validation_accuracy": a}) for s, a in accuracies.items()]
        (workdir / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    arms = ("nsa", "dense", "score scale 1/4, any filler")
    out = run(
        "recall", "--notrain", "--seeds=1", f"--to={tmp_path}", *(f"--arm={arm}" for arm in arms)
    )
    assert "| nsa | 50.0% | 50.0% |" in out
    assert "| score scale 1/4, any filler | 100.0% | 100.0% |" in out
    assert "dense" not in out
    record = json.loads((tmp_path / "results.json").read_text())
    # Also a kind with parameters of its own starts from the dense run, one for each corpus.
    assert set(record["short"]) == {"short,seed=0", "short,tokenizer=ids-128,num_fillers=0,seed=0"}
    assert record["long"]["nsa"] == [{"accuracy": 0.5, "curve": [[100, 0.25], [400, 0.5]]}]
    assert (tmp_path / "results.png").read_bytes().startswith(b"\x89PNG")


def test_recall_fails_with_a_run(tmp_path):
    # The run on short rows has ended, but it left no model to start from.
    short = tmp_path / "short,seed=0"
    short.mkdir()
    (short / "config.json").write_text(json.dumps({"train": {"steps": 400}}))
    (short / "metrics.jsonl").write_text('{"step": 400, "validation_accuracy": 1.0}\n')
    result = call("recall", "--seeds=1", "--arm=dense", f"--to={tmp_path}")
    assert result.returncode == 1
    assert f"see {tmp_path}/dense,seed=0/train.log" in result.stdout
    assert "some runs have failed" in result.stderr


def test_attention_times_programs_in_turn():
    calls = []

    class Program:
        def __init__(self, name, fails_after=np.inf):
            self.name, self.left = name, fails_after

        def __call__(self, x):
            self.left -= 1
            if self.left < 0:
                raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: no memory")
            calls.append(self.name)
            return x

        def memory_analysis(self):
            return jax.jit(jnp.sin).lower(1.0).compile().memory_analysis()

    compiled = {
        "window forward": Program("window"),
        "window forward+backward": Program("failing", fails_after=10),
        "dense forward": "does not fit",
        "sparsek forward": jax.jit(jnp.sin).lower(jnp.zeros(())).compile(),
        "dense forward+backward": Program("dense"),
    }
    row = {}
    attention.measure(row, compiled, [jnp.zeros(())])
    turns = [name for name, _ in itertools.groupby(calls) if name != "failing"]
    assert turns == ["window", "dense"] * 3
    assert row["dense forward failed"] == "does not fit"
    assert "no memory" in row["window forward+backward failed"]
    timed = {
        f"{name} {unit}"
        for name in ("window forward", "dense forward+backward", "sparsek forward")
        for unit in ("ms", "MiB")
    }
    timed |= {"kernels forward ms", "gather forward ms"}
    assert {x for x in row if not x.endswith("failed")} == timed


def test_scaling_times_each_length():
    out = run(
        "scaling", "--length=96,192", "--num_selected=8", "--sliding_window=16", "--repeats=1"
    )
    records = [json.loads(line) for line in out.splitlines() if line.startswith("{")]
    assert [(x["mode"], x["length"]) for x in records] == [
        (mode, length) for mode in ("forward", "forward+backward") for length in (96, 192)
    ]
    assert all(x["ms"] > 0 for x in records)


def test_kinds_times_each_kind():
    sizes = ("--length=48", "--batch=1", "--d_model=16", "--heads=2", "--kv_heads=1")
    sizes += ("--head_dim=8", "--num_selected=8", "--sliding_window=8", "--block_size=4")
    out = run("kinds", *sizes, "--dtype=float32", "--kind=window", "--kind=moba")
    rows = [json.loads(line) for line in out.splitlines() if line.startswith("{")]
    assert [row["kind"] for row in rows] == ["window", "moba"]
    assert all(row["ms"] > 0 and row["temporary_MiB"] > 0 for row in rows)


def test_long_code_reports_what_exceeds_dense_attention_of_the_same_seed(tmp_path):
    for run_name, nats, length, step in (
        ("dense_0", 1.0, 4096, 800),
        ("window_0", 1.25, 4096, 800),
        ("window_0", 2.0, 65536, 800),
        ("window_1", 1.5, 4096, 800),
        ("lsh_0", 9.0, 4096, 400),  # interrupted
        ("lsh_0_16384", 9.0, 16384, 800),  # of other rows
    ):
        directory = tmp_path / run_name / "eval"
        directory.mkdir(parents=True, exist_ok=True)
        loss = {"nats_per_token": nats, "buckets": [{"stop": 512}, {"stop": length}]}
        record = {"loss": loss, "step": step, "config": {"train": {"steps": 800}}}
        (directory / f"of_{length}.json").write_text(json.dumps(record))
        del record["loss"]
        (directory / "of_a_task.json").write_text(json.dumps(record))
    arms = [f"--arm={arm}" for arm in ("lsh", "window")]
    out = run("long_code", "--notrain", "--seeds=2", "--read=65536", f"--to={tmp_path}", *arms)
    assert "| window | +25.00% | 1.250, 1.500 |" in out
    assert "| window |  | 2.000 |" in out
    assert "lsh" not in out
    assert json.loads((tmp_path / "window_0_read_at_65536.json").read_text())["loss"] == {
        "nats_per_token": 2.0,
        "buckets": [{"stop": 512}, {"stop": 65536}],
    }


def test_long_code_fails_with_a_run(tmp_path):
    short = tmp_path / "short"
    short.mkdir()
    (short / "config.json").write_text(json.dumps({"train": {"steps": 2400}}))
    (short / "metrics.jsonl").write_text(json.dumps({"step": 2400, "validation_loss": 2.1}) + "\n")
    nothing = f"--field=data.glob={tmp_path}/*.txt"
    result = call("long_code", "--seeds=1", "--arm=window", f"--to={tmp_path}", nothing)
    assert result.returncode == 1
    log = tmp_path / "window_0/log.txt"
    assert f"exit status 2, see {log}" in result.stdout
    assert "some runs have failed" in result.stderr
    assert "matches no file" in log.read_text()
