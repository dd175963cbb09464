"""How time and memory of SparseK attention grow with the context.

    python -m benchmarks.scaling                          # T = 8,192 and 32,768
    python -m benchmarks.scaling --length=8192,65536 --heads=12 --kv_heads=12 --dtype=bfloat16

For every length it compiles forward and forward + backward, reads the peak temporary memory from
the compiler's analysis and takes the fastest of a few synchronised calls on random data; the
lengths are called in turn, so that a busy machine disturbs their ratio little.
Correctness comes first: nothing is timed before the implementation equals the dense reference at a
small length. Dense attention of JAX runs beside it where asked (`--dense`).
"""

import functools
import json
import time

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags, logging

from benchmarks.inputs import largest_error, random_inputs, with_gradients
from sparsek_jax import sparsek_attention

_LENGTH = flags.DEFINE_list("length", ["8192", "32768"], "Context lengths T, shortest first.")
_BATCH = flags.DEFINE_integer("batch", 1, "Batch size B.")
_HEADS = flags.DEFINE_integer("heads", 4, "Query heads N.")
_KV_HEADS = flags.DEFINE_integer("kv_heads", 2, "KV heads K.")
_HEAD_DIM = flags.DEFINE_integer("head_dim", 64, "Head size H.")
_NUM_SELECTED = flags.DEFINE_integer("num_selected", 512, "Selected keys k.")
_WINDOW = flags.DEFINE_integer("sliding_window", 512, "Sliding window w.")
_DTYPE = flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "Dtype of q, k and v.")
_IMPLEMENTATION = flags.DEFINE_string("implementation", "xla", "What is measured.")
_DENSE = flags.DEFINE_bool("dense", False, "Also time jax.nn.dot_product_attention.")
_REPEATS = flags.DEFINE_integer("repeats", 5, "Timed calls; the fastest counts.")


def make_inputs(length: int) -> list[jax.Array]:
    """Random query, key, value, scores and output cotangent."""
    heads = (_HEADS.value, _KV_HEADS.value, _HEAD_DIM.value)
    return random_inputs(_BATCH.value, length, *heads, _DTYPE.value)


def sparse(query, key, value, scores, implementation):
    """The measured operator."""
    return sparsek_attention(
        query,
        key,
        value,
        scores,
        num_selected=_NUM_SELECTED.value,
        sliding_window=_WINDOW.value,
        implementation=implementation,
    )


def dense(query, key, value, scores):
    """JAX's dense causal attention; ignores the scores."""
    del scores
    cudnn = jax.default_backend() == "gpu" and query.dtype == jnp.bfloat16
    implementation = "cudnn" if cudnn else "xla"
    return jax.nn.dot_product_attention(
        query, key, value, is_causal=True, implementation=implementation
    )


def check() -> float:
    """Largest relative error of output and gradients against the float32 reference, T = 2k + w."""
    implementations = (
        functools.partial(sparse, implementation=name)
        for name in (_IMPLEMENTATION.value, "reference")
    )
    return largest_error(*implementations, make_inputs(2 * _NUM_SELECTED.value + _WINDOW.value))


def compile_mode(function, mode: str, length: int):
    """The compiled program of a mode at a length, and its arguments."""
    inputs = make_inputs(length)
    if mode == "forward":
        inputs = inputs[:4]
    else:
        function = with_gradients(function)
    return jax.jit(function).lower(*inputs).compile(), inputs


def fastest(programs) -> list[float]:
    """Seconds of the fastest call of each program, all called in turn so that all see one load."""
    times = []
    for _ in range(_REPEATS.value + 1):
        for compiled, arguments in programs:
            start = time.perf_counter()
            jax.block_until_ready(compiled(*arguments))
            times.append(time.perf_counter() - start)
    # The first call of each warms it up.
    return np.reshape(times, (-1, len(programs)))[1:].min(axis=0).tolist()


def main(argv):
    """Checks, measures and prints one line of JSON per measurement."""
    if len(argv) > 1:
        raise app.UsageError(f"unexpected argument {argv[1]!r}")
    logging.set_verbosity(logging.WARNING)
    tolerance = 1e-5 if _DTYPE.value == "float32" else 5e-3
    error = check()
    if not error <= tolerance:
        raise SystemExit(f"error {error:.1e} exceeds {tolerance:.0e}: nothing is timed")
    device = jax.devices()[0].device_kind
    print(f"jax {jax.__version__}, {device}, error {error:.1e} (at most {tolerance:.0e})")

    functions = {"sparsek": functools.partial(sparse, implementation=_IMPLEMENTATION.value)}
    if _DENSE.value:
        functions["dense"] = dense
    for name, function in functions.items():
        for mode in ("forward", "forward+backward"):
            lengths = [int(x) for x in _LENGTH.value]
            programs = [compile_mode(function, mode, length) for length in lengths]
            memory = [x.memory_analysis().temp_size_in_bytes for x, _ in programs]
            seconds = fastest(programs)
            for i, length in enumerate(lengths):
                row = {
                    "attention": name,
                    "mode": mode,
                    "length": length,
                    "ms": round(1e3 * seconds[i], 3),
                    "temporary_MiB": round(memory[i] / 2**20, 1),
                    "time_ratio": round(seconds[i] / seconds[0], 2),
                    "memory_ratio": round(memory[i] / memory[0], 2) if memory[0] else None,
                }
                print(json.dumps(row), flush=True)


if __name__ == "__main__":
    app.run(main)
