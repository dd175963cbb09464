"""SparseK attention on a GPU beside JAX's cuDNN attention: time, memory, and where the time goes.

    python -m benchmarks.attention --out=results                  # all shapes, T = 4k to 1M
    python -m benchmarks.attention --shapes=D --lengths=65536 --scores=scores.npy

For every shape and length, bfloat16, batch 1, gaussian scores, and those of a trained model too
(`--scores`, from benchmarks/trained_scores.py): forward, and forward + backward, of SparseK
(selection included), of dense causal attention (cuDNN), and of cuDNN attention to a window of the
same budget k + w, which is what attention without any selection would cost. Nothing is timed before
output and gradients of the shape equal the float32 reference at a small length. Programs are
compiled side by side, then timed one at a time, in turn: each figure is the median of several
rounds, each of several runs of several calls. Where the forward pass spends its time, from a
profile: "kernels" are the attention kernels, "gather" is what else is not the selection (gathering
lists, padding), "selection" is the rest of the measured time, with all launches in it. A program
that does not compile or run, for want of memory say, has its reason in place of figures. Writes
attention.json and attention.png; `--plot_only` draws the latter again.
"""

import collections
import concurrent.futures
import functools
import json
import os
import pathlib
import re
import tempfile
from typing import NamedTuple

import jax
import numpy as np
from absl import app, flags, logging

from benchmarks.inputs import (
    compile_side_by_side,
    largest_error,
    median_milliseconds,
    random_inputs,
    reason,
    with_gradients,
)
from sparsek_jax import sparsek_attention
from sparsek_jax.ops.selection import SCOPE

_SHAPES = flags.DEFINE_list("shapes", list("ABCDE"), "Which of the shapes.")
_LENGTHS = flags.DEFINE_list(
    "lengths", ["4096", "8192", "65536", "131072", "262144", "1048576"], "T."
)
_DENSE_LIMIT = flags.DEFINE_integer("dense_limit", 262144, "Longest T for dense attention.")
_SCORES = flags.DEFINE_string(
    "scores", None, "A .npy file of scores, [heads, at least T], to be timed beside gaussian ones."
)
_OUT = flags.DEFINE_string("out", "results", "Directory to write to.")
_PLOT_ONLY = flags.DEFINE_bool("plot_only", False, "Draw the results in --out again.")


_PARTS = ("kernels", "gather")
_ROUNDS = 3  # in which programs take turns: now and then a host is slower for a while
# Kernels of the selection.
_OF_SELECTION = ("sort_pieces", "merge_pieces", "edges", "table", "walks", "chains")


class Shape(NamedTuple):
    """A model's attention."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    num_selected: int
    sliding_window: int


SHAPES = {
    "A": Shape(12, 12, 64, 512, 512),
    "B": Shape(16, 16, 128, 512, 512),
    "C": Shape(64, 4, 128, 1024, 512),
    "D": Shape(9, 3, 64, 512, 512),
    "E": Shape(32, 8, 128, 1024, 512),
}


def make_inputs(shape: Shape, length: int) -> list[jax.Array]:
    """Random query, key, value, scores and output cotangent."""
    return random_inputs(1, length, shape.num_heads, shape.num_kv_heads, shape.head_dim, "bfloat16")


def given_scores(shape: Shape, length: int) -> jax.Array | None:
    """Scores from --scores, of heads spread over those in the file; None if it has fewer tokens."""
    rows = np.load(_SCORES.value, mmap_mode="r")
    if rows.shape[1] < length:
        return None
    spread = np.linspace(0, len(rows) - 1, shape.num_kv_heads).round().astype(int)
    return jax.numpy.asarray(rows[spread, :length].T[None], jax.numpy.float32)


def sparse(shape: Shape, implementation: str, query, key, value, scores):
    """The measured operator."""
    return sparsek_attention(
        query,
        key,
        value,
        scores,
        num_selected=shape.num_selected,
        sliding_window=shape.sliding_window,
        implementation=implementation,
    )


def dense(query, key, value, scores):
    """Dense causal attention; ignores the scores."""
    del scores
    return jax.nn.dot_product_attention(query, key, value, is_causal=True, implementation="cudnn")


def window(shape: Shape, query, key, value, scores):
    """Attention to the newest k + w keys; ignores the scores."""
    del scores
    budget = shape.num_selected + shape.sliding_window
    return jax.nn.dot_product_attention(
        query,
        key,
        value,
        is_causal=True,
        local_window_size=(budget - 1, 0),
        implementation="cudnn",
    )


def error(shape: Shape) -> float:
    """Largest relative error of output and gradients against the float32 reference."""
    small = shape._replace(num_selected=300, sliding_window=200)
    implementations = (
        functools.partial(sparse, small, name) for name in ("mosaic_gpu", "reference")
    )
    return largest_error(*implementations, make_inputs(small, 1001))


def attended_pairs(shape: Shape, length: int) -> int:
    """(query, key) pairs that one head attends to."""
    position = np.arange(length, dtype=np.int64)
    in_window = np.minimum(position + 1, shape.sliding_window)
    pool = np.maximum(position + 1 - shape.sliding_window, 0)
    return int(np.sum(in_window + np.minimum(pool, shape.num_selected)))


def programs(shape: Shape, length: int) -> dict:
    """Functions of `make_inputs`' arrays, by name."""
    attentions = {
        "sparsek": functools.partial(sparse, shape, "mosaic_gpu"),
        "window": functools.partial(window, shape),
    }
    if length <= _DENSE_LIMIT.value:
        attentions["dense"] = dense
    result = {}
    for name, function in attentions.items():
        result[f"{name} forward"] = lambda *x, f=function: f(*x[:4])
        result[f"{name} forward+backward"] = with_gradients(function)
    return result


def milliseconds(compiled, inputs) -> float:
    """Median time of a call."""
    return median_milliseconds(lambda: compiled(*inputs), jax.block_until_ready)


def where_time_goes(compiled, inputs) -> tuple[float, float]:
    """Device milliseconds of a call's kernels, and of what else is not the selection.

    From a profile of three calls, in which operations have the names of the compiled program's
    instructions, whose metadata tells which function they come from.
    """
    instruction = re.compile(r'^ *(?:ROOT )?%(\S+) = .* metadata={op_name="([^"]*)"', re.MULTILINE)
    outside = {
        name.replace(".", "_")
        for name, source in instruction.findall(compiled.as_text())
        if source.startswith("jit(") and f"/{SCOPE}/" not in source
    }
    with tempfile.TemporaryDirectory() as directory:
        with jax.profiler.trace(directory):
            for _ in range(3):
                out = compiled(*inputs)
            jax.block_until_ready(out)
        (path,) = pathlib.Path(directory).rglob("*.xplane.pb")
        profile = jax.profiler.ProfileData.from_file(str(path))
    kernels = rest = 0
    for plane in profile.planes:
        for line in plane.lines:
            if "GPU" in plane.name and line.name.startswith("Stream"):
                for event in line.events:
                    if "mosaic" in event.name and not event.name.startswith(_OF_SELECTION):
                        kernels += event.duration_ns
                    elif event.name in outside:
                        rest += event.duration_ns
    return kernels / 3e6, rest / 3e6


def compile_all(cases: list[tuple[str, int]]) -> dict:
    """Compiled programs by (shape, length, program); where one fails, its reason instead."""

    def lower(function, name, length):
        inputs = jax.eval_shape(functools.partial(make_inputs, SHAPES[name], length))
        return jax.jit(function, keep_unused=True).lower(*inputs)

    return compile_side_by_side(
        {
            (name, length, program): functools.partial(lower, function, name, length)
            for name, length in cases
            for program, function in programs(SHAPES[name], length).items()
        }
    )


def measure(row: dict, compiled: dict, inputs: list[jax.Array]) -> None:
    """Adds figures of the compiled programs, which take turns, to a row."""
    times, parts = collections.defaultdict(list), []
    for program, executable in [*compiled.items()] * _ROUNDS:
        if isinstance(executable, str):
            row[f"{program} failed"] = executable
        if f"{program} failed" in row:
            continue
        try:
            times[program].append(milliseconds(executable, inputs))
            if program == "sparsek forward":
                parts.append(where_time_goes(executable, inputs))
        except jax.errors.JaxRuntimeError as error:
            row[f"{program} failed"] = reason(error)
            times.pop(program, None)
    for program, of_rounds in times.items():
        row[f"{program} ms"] = round(float(np.median(of_rounds)), 3)
        if program == "sparsek forward":
            for part, spent in zip(_PARTS, np.median(parts, axis=0), strict=True):
                row[f"{part} forward ms"] = round(float(spent), 3)
        memory = compiled[program].memory_analysis()
        used = (
            memory.temp_size_in_bytes + memory.output_size_in_bytes + memory.argument_size_in_bytes
        )
        row[f"{program} MiB"] = round(used / 2**20, 1)


def summarise(row: dict, shape: Shape) -> None:
    """Adds what follows from a row's figures."""
    if (forward := row.get("sparsek forward ms")) is None:
        return
    flops = 4 * shape.head_dim * shape.num_heads * attended_pairs(shape, row["length"])
    row["useful TFLOP/s forward"] = round(flops / forward / 1e9, 1)
    parts = {part: row[f"{part} forward ms"] for part in _PARTS}
    parts["selection"] = forward - sum(parts.values())
    for part, spent in parts.items():
        row[f"{part} share of forward"] = round(spent / forward, 3)
    for mode in ("forward", "forward+backward"):
        times = [row.get(f"{name} {mode} ms") for name in ("dense", "sparsek")]
        if None not in times:
            row[f"speed-up {mode}"] = round(times[0] / times[1], 2)


def rows_of_case(name: str, length: int, compiled: dict) -> list[dict]:
    """Measures one shape and length: with gaussian scores, and with those of --scores."""
    shape = SHAPES[name]
    row = {"shape": name, "length": length, "scores": "gaussian"}
    try:
        inputs = jax.block_until_ready(make_inputs(shape, length))
    except jax.errors.JaxRuntimeError as error:
        return [{**row, "failed": reason(error)}]
    measure(row, compiled, inputs)
    rows = [row]
    if _SCORES.value and (scores := given_scores(shape, length)) is not None:
        inputs[3] = scores
        # The others do not see the scores.
        kept = {x: y for x, y in row.items() if not x.startswith(("sparsek", *_PARTS))}
        rows.append({**kept, "scores": pathlib.Path(_SCORES.value).name})
        measure(rows[-1], {x: y for x, y in compiled.items() if x.startswith("sparsek")}, inputs)
    for row in rows:
        summarise(row, shape)
    return rows


def run(cases: list[tuple[str, int]], out: pathlib.Path) -> None:
    """Checks and measures cases, prints a line for each, and writes both files."""
    results = {"device": jax.devices()[0].device_kind, "jax": jax.__version__, "rows": []}
    names = sorted({name for name, _ in cases})
    with concurrent.futures.ThreadPoolExecutor(len(names)) as pool:
        errors = dict(zip(names, pool.map(lambda name: error(SHAPES[name]), names), strict=True))
    for name, found in errors.items():
        if not found <= 5e-3:
            raise SystemExit(f"shape {name}: error {found:.1e} exceeds 5e-3: nothing is timed")
    results["errors"] = {name: float(f"{found:.2e}") for name, found in errors.items()}
    print(", ".join(f"{x}: {y}" for x, y in results.items() if x != "rows"), flush=True)
    out.mkdir(parents=True, exist_ok=True)
    # Few at a time: a run that is cut short has most of its figures.
    size = max(os.cpu_count() // 2, 1)
    for batch in (cases[i : i + size] for i in range(0, len(cases), size)):
        compiled = compile_all(batch)
        for case in batch:
            of_case = {key[2]: program for key, program in compiled.items() if key[:2] == case}
            for row in rows_of_case(*case, of_case):
                results["rows"].append(row)
                print(json.dumps(row), flush=True)
            (out / "attention.json").write_text(json.dumps(results, indent=1) + "\n")
    plot(results, out / "attention.png")


def plot(results: dict, path: pathlib.Path) -> None:
    """Draws time over length, one panel a shape."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    rows = [row for row in results["rows"] if row["scores"] == "gaussian"]
    names = sorted({row["shape"] for row in rows})
    figure, axes = plt.subplots(
        2, len(names), figsize=(3.6 * len(names), 6.4), sharex=True, squeeze=False
    )
    colours = {"sparsek": "C0", "dense": "C3", "window": "C7"}
    labels = {
        "sparsek": "SparseK, selection included",
        "dense": "dense causal, cuDNN",
        "window": "window of k + w, cuDNN",
    }
    for column, name in enumerate(names):
        for line, mode in enumerate(("forward", "forward+backward")):
            axis = axes[line, column]
            for kind, colour in colours.items():
                points = [
                    (row["length"], row[f"{kind} {mode} ms"])
                    for row in rows
                    if row["shape"] == name and f"{kind} {mode} ms" in row
                ]
                if points:
                    axis.plot(*zip(*sorted(points), strict=True), "o-", color=colour,
                              label=labels[kind], markersize=4)  # fmt: skip
            axis.set_xscale("log", base=2)
            axis.set_yscale("log")
            axis.grid(alpha=0.3)
            shape = SHAPES[name]
            if line == 0:
                axis.set_title(
                    f"{name}: {shape.num_heads}/{shape.num_kv_heads} heads of {shape.head_dim},\n"
                    f"k={shape.num_selected} w={shape.sliding_window}",
                    fontsize=10,
                )
            else:
                axis.set_xlabel("context T")
            if column == 0:
                axis.set_ylabel(f"{mode}, ms")
    axes[0, 0].legend(fontsize=8)
    figure.suptitle(
        f"{results['device']}, jax {results['jax']}, bfloat16, batch 1, gaussian scores"
    )
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main(argv):
    """Measures, or draws what was measured."""
    if len(argv) > 1:
        raise app.UsageError(f"unexpected argument {argv[1]!r}")
    logging.set_verbosity(logging.WARNING)
    out = pathlib.Path(_OUT.value)
    if _PLOT_ONLY.value:
        plot(json.loads((out / "attention.json").read_text()), out / "attention.png")
        return
    for name in _SHAPES.value:
        if name not in SHAPES:
            raise app.UsageError(f"--shapes has {name!r}; expected some of {list(SHAPES)}")
    if _SCORES.value and np.load(_SCORES.value, mmap_mode="r").ndim != 2:
        raise app.UsageError(f"--scores={_SCORES.value} must hold an array [heads, T]")
    run([(name, int(length)) for length in _LENGTHS.value for name in _SHAPES.value], out)


if __name__ == "__main__":
    app.run(main)
