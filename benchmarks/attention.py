"""SparseK attention on a GPU beside JAX's cuDNN attention: time, memory, and where the time goes.

    python -m benchmarks.attention --out=results                  # all shapes, T = 4k to 128k
    python -m benchmarks.attention --shapes=D --lengths=1048576 --dense_limit=0

For every shape and length, bfloat16, batch 1, gaussian scores or those of a trained model
(`--scores`, from benchmarks/trained_scores.py): forward, and forward + backward, of SparseK
(selection included), of dense causal attention (cuDNN), and of cuDNN attention to a window of the
same budget k + w, which is what attention without any selection would cost. Nothing is timed before
output and gradients of the shape equal the float32 reference at a small length. Programs are
compiled side by side, then timed one at a time: each figure is the median of five runs of several
calls. Where the time goes: "kernels" are the attention kernels, from a profile; "selection" is
timed alone; the rest is gathering lists, padding and launches. Writes attention.json and
attention.png; `--plot_only` draws the latter again.
"""

import concurrent.futures
import functools
import json
import pathlib
import tempfile
from typing import NamedTuple

import jax
import numpy as np
from absl import app, flags, logging

from benchmarks.inputs import largest_error, median_milliseconds, random_inputs, with_gradients
from sparsek_jax import causal_selection, sparsek_attention

_SHAPES = flags.DEFINE_list("shapes", list("ABCDE"), "Which of the shapes.")
_LENGTHS = flags.DEFINE_list("lengths", ["4096", "8192", "16384", "65536", "131072"], "T.")
_DENSE_LIMIT = flags.DEFINE_integer("dense_limit", 262144, "Longest T for dense attention.")
_SCORES = flags.DEFINE_string(
    "scores", None, "A .npy file of scores, a row of at least T for every head; gaussian without."
)
_IMPLEMENTATION = flags.DEFINE_string("implementation", "mosaic_gpu", "What is measured.")
_OUT = flags.DEFINE_string("out", "results", "Directory to write to.")
_PLOT_ONLY = flags.DEFINE_bool("plot_only", False, "Draw the results in --out again.")


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
    """Random query, key, value, scores and output cotangent; scores from --scores if given."""
    heads = (shape.num_heads, shape.num_kv_heads, shape.head_dim)
    inputs = random_inputs(1, length, *heads, "bfloat16")
    if _SCORES.value:
        rows = np.load(_SCORES.value, mmap_mode="r")
        if rows.ndim != 2 or rows.shape[1] < length:
            raise app.UsageError(
                f"--scores={_SCORES.value} holds shape {rows.shape}; expected [heads, T], T at "
                f"least {length}"
            )
        spread = np.linspace(0, len(rows) - 1, shape.num_kv_heads).round().astype(int)
        inputs[3] = jax.numpy.asarray(rows[spread, :length].T[None], jax.numpy.float32)
    return inputs


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
        functools.partial(sparse, small, name) for name in (_IMPLEMENTATION.value, "reference")
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
    attend = functools.partial(sparse, shape, _IMPLEMENTATION.value)
    select = functools.partial(
        causal_selection, num_selected=shape.num_selected, sliding_window=shape.sliding_window
    )
    attentions = {"sparsek": attend, "window": functools.partial(window, shape)}
    if length <= _DENSE_LIMIT.value:
        attentions["dense"] = dense
    result = {"selection": lambda q, k, v, scores, d: select(scores)}
    for name, function in attentions.items():
        result[f"{name} forward"] = lambda *x, f=function: f(*x[:4])
        result[f"{name} forward+backward"] = with_gradients(function)
    return result


def milliseconds(compiled, inputs) -> float:
    """Median time of a call."""
    return median_milliseconds(lambda: compiled(*inputs), jax.block_until_ready)


def kernel_milliseconds(compiled, inputs) -> float:
    """Device time of a call's attention kernels, from a profile of three calls."""
    with tempfile.TemporaryDirectory() as directory:
        with jax.profiler.trace(directory):
            for _ in range(3):
                out = compiled(*inputs)
            jax.block_until_ready(out)
        (path,) = pathlib.Path(directory).rglob("*.xplane.pb")
        profile = jax.profiler.ProfileData.from_file(str(path))
    nanoseconds = sum(
        event.duration_ns
        for plane in profile.planes
        if "GPU" in plane.name
        for line in plane.lines
        if line.name.startswith("Stream")
        for event in line.events
        if "mosaic" in event.name
    )
    return nanoseconds / 3e6


def measure(name: str, length: int) -> dict:
    """Times every program of one shape and length."""
    shape = SHAPES[name]
    inputs = make_inputs(shape, length)
    lowered = {
        program: jax.jit(function, keep_unused=True).lower(*inputs)
        for program, function in programs(shape, length).items()
    }
    with concurrent.futures.ThreadPoolExecutor(len(lowered)) as pool:
        compiled = dict(
            zip(lowered, pool.map(lambda x: x.compile(), lowered.values()), strict=True)
        )
    scores = pathlib.Path(_SCORES.value).name if _SCORES.value else "gaussian"
    row = {"shape": name, "length": length, "scores": scores}
    for program, executable in compiled.items():
        row[f"{program} ms"] = round(milliseconds(executable, inputs), 3)
        memory = executable.memory_analysis()
        used = (
            memory.temp_size_in_bytes + memory.output_size_in_bytes + memory.argument_size_in_bytes
        )
        row[f"{program} MiB"] = round(used / 2**20, 1)
    if _IMPLEMENTATION.value == "mosaic_gpu":
        for mode in ("forward", "forward+backward"):
            spent = kernel_milliseconds(compiled[f"sparsek {mode}"], inputs)
            row[f"kernels {mode} ms"] = round(spent, 3)
    flops = 4 * shape.head_dim * shape.num_heads * attended_pairs(shape, length)
    row["useful TFLOP/s forward"] = round(flops / row["sparsek forward ms"] / 1e9, 1)
    row["selection share of forward"] = round(row["selection ms"] / row["sparsek forward ms"], 3)
    if length <= _DENSE_LIMIT.value:
        for mode in ("forward", "forward+backward"):
            ratio = row[f"dense {mode} ms"] / row[f"sparsek {mode} ms"]
            row[f"speed-up {mode}"] = round(ratio, 2)
    return row


def plot(results: dict, path: pathlib.Path) -> None:
    """Draws time over length, one panel a shape."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    rows = results["rows"]
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
    figure.suptitle(f"{results['device']}, jax {results['jax']}, bfloat16, batch 1")
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main(argv):
    """Checks, measures, prints a line a shape and length, and writes both files."""
    if len(argv) > 1:
        raise app.UsageError(f"unexpected argument {argv[1]!r}")
    logging.set_verbosity(logging.WARNING)
    out = pathlib.Path(_OUT.value)
    path = out / "attention.json"
    if _PLOT_ONLY.value:
        plot(json.loads(path.read_text()), out / "attention.png")
        return
    for name in _SHAPES.value:
        if name not in SHAPES:
            raise app.UsageError(f"--shapes has {name!r}; expected some of {list(SHAPES)}")
    out.mkdir(parents=True, exist_ok=True)
    device = jax.devices()[0].device_kind
    results = {"device": device, "jax": jax.__version__, "errors": {}, "rows": []}
    with concurrent.futures.ThreadPoolExecutor(len(_SHAPES.value)) as pool:
        errors = list(pool.map(lambda name: error(SHAPES[name]), _SHAPES.value))
    for name, found in zip(_SHAPES.value, errors, strict=True):
        if not found <= 5e-3:
            raise SystemExit(f"shape {name}: error {found:.1e} exceeds 5e-3: nothing is timed")
        results["errors"][name] = float(f"{found:.2e}")
    print(f"{device}, jax {jax.__version__}, errors {results['errors']}", flush=True)
    for name in _SHAPES.value:
        for length in map(int, _LENGTHS.value):
            row = measure(name, length)
            results["rows"].append(row)
            print(json.dumps(row), flush=True)
            path.write_text(json.dumps(results, indent=1) + "\n")
    plot(results, out / "attention.png")


if __name__ == "__main__":
    app.run(main)
