"""Which tile sizes of the GPU kernels are fastest, for the table in ops/block_config.py.

    python -m benchmarks.tune --tuned_shapes=A,C --length=65536

Times the operator with each candidate for one kernel at a time, everything else as tuned. All
programs are compiled side by side, then timed one at a time, in turns, so that a drift of the clock
meets all alike.
"""

import dataclasses
import functools

import jax
import numpy as np
from absl import app, flags

from benchmarks.attention import SHAPES, make_inputs, milliseconds
from benchmarks.inputs import compile_side_by_side, reason, with_gradients
from sparsek_jax.ops.block_config import BlockConfig, tuned
from sparsek_jax.ops.mosaic_gpu import sparsek_attention_mosaic_gpu

_TUNED_SHAPES = flags.DEFINE_list("tuned_shapes", ["A", "C"], "Which of the shapes.")
_LENGTH = flags.DEFINE_integer("length", 65536, "T.")

_CANDIDATES = {
    "forward": [(128, 2), (128, 3), (64, 2), (64, 3), (64, 4)],
    "by_query": [(64, 2), (64, 3), (128, 2)],
    "by_key": [(64, 2), (64, 3), (128, 2)],
}


def attend(shape, query, key, value, scores, configs):
    """The operator with given tile sizes."""
    out, _ = sparsek_attention_mosaic_gpu(
        query,
        key,
        value,
        scores,
        num_selected=shape.num_selected,
        sliding_window=shape.sliding_window,
        gating="soft",
        scale=shape.head_dim**-0.5,
        segment_ids=None,
        configs=configs,
    )
    return out


def candidates(shape) -> dict:
    """What is timed, as functions of the inputs, by kernel and config."""
    programs = {}
    for kernel, sizes in _CANDIDATES.items():
        for size in sizes:
            change = {kernel: BlockConfig(*size)}
            configs = dataclasses.replace(tuned(shape.head_dim), **change)

            def run(query, key, value, scores, d_out, kernel=kernel, configs=configs):
                function = functools.partial(attend, shape, configs=configs)
                if kernel == "forward":
                    return function(query, key, value, scores)
                return with_gradients(function)(query, key, value, scores, d_out)

            programs[kernel, size] = run
    return programs


def main(argv):
    """Prints a line a candidate."""
    if len(argv) > 1:
        raise app.UsageError(f"unexpected argument {argv[1]!r}")
    print(f"{jax.devices()[0].device_kind}, jax {jax.__version__}, T={_LENGTH.value}", flush=True)
    for name in _TUNED_SHAPES.value:
        inputs = make_inputs(SHAPES[name], _LENGTH.value)
        programs = candidates(SHAPES[name])
        compiled = compile_side_by_side(
            {
                key: functools.partial(jax.jit(function, keep_unused=True).lower, *inputs)
                for key, function in programs.items()
            }
        )
        times = {key: [] for key in programs}
        for _ in range(3):
            for key, executable in compiled.items():
                if not isinstance(executable, str):
                    try:
                        times[key].append(milliseconds(executable, inputs))
                    except jax.errors.JaxRuntimeError as error:
                        compiled[key] = reason(error)
        for (kernel, size), executable in compiled.items():
            told = executable
            if not isinstance(executable, str):
                told = f"{np.median(times[kernel, size]):.3f} ms"
            print(f"{name} {kernel} columns={size[0]} stages={size[1]}: {told}", flush=True)


if __name__ == "__main__":
    app.run(main)
