"""How long a layer of each kind of attention takes, forward and backward, and its memory.

    python -m benchmarks.kinds --length=16384 --batch=4 [--kind=sparsek --kind=lsh ...]

By default of the width, heads and budget of configs/long_code.py with all layers alike: 512 keys a
query. One line of JSON for each kind; where a profile of the device's kernels is asked for
(`--profile`, on a GPU), also which took the longest, and how often they were launched.
"""

import collections
import json
import pathlib
import tempfile
import time

import jax
import jax.numpy as jnp
from absl import app, flags, logging
from flax import nnx

from benchmarks.inputs import median_milliseconds
from sparsek_jax.nn import AttentionConfig
from sparsek_jax.nn.alternatives import LAYERS

_KIND = flags.DEFINE_multi_enum("kind", list(LAYERS), list(LAYERS), "Kinds of attention.")
_LENGTH = flags.DEFINE_integer("length", 16384, "T.")
_BATCH = flags.DEFINE_integer("batch", 4, "B.")
_D_MODEL = flags.DEFINE_integer("d_model", 512, "Width of the residual stream.")
_HEADS = flags.DEFINE_integer("heads", 8, "Query heads N.")
_KV_HEADS = flags.DEFINE_integer("kv_heads", 4, "KV heads K.")
_HEAD_DIM = flags.DEFINE_integer("head_dim", 64, "Head size H.")
_NUM_SELECTED = flags.DEFINE_integer("num_selected", 256, "Selected keys k.")
_WINDOW = flags.DEFINE_integer("sliding_window", 256, "Sliding window w.")
_BLOCK_SIZE = flags.DEFINE_integer("block_size", 64, "Keys of a block.")
_DTYPE = flags.DEFINE_enum("dtype", "bfloat16", ["float32", "bfloat16"], "Dtype of activations.")
_PROFILE = flags.DEFINE_bool("profile", False, "Also list the kernels that take the longest.")
_LISTED = 20  # kernels


def layer_config(kind: str) -> AttentionConfig:
    """A layer of this kind; those that select nothing have all keys in their window."""
    window = _WINDOW.value
    if kind in ("window", "gated_linear"):
        window += _NUM_SELECTED.value
    return AttentionConfig(
        kind=kind,
        num_heads=_HEADS.value,
        num_kv_heads=_KV_HEADS.value,
        head_dim=_HEAD_DIM.value,
        num_selected=_NUM_SELECTED.value,
        sliding_window=window,
        block_size=_BLOCK_SIZE.value,
        qk_norm=True,
    )


def compile_layer(kind: str):
    """The compiled gradient of a layer with random weights, and its arguments."""
    layer = LAYERS[kind](
        layer_config(kind), _D_MODEL.value, dtype=jnp.dtype(_DTYPE.value), rngs=nnx.Rngs(0)
    )
    graphdef, params = nnx.split(layer)
    shape = (_BATCH.value, _LENGTH.value, _D_MODEL.value)
    x = jax.random.normal(jax.random.key(1), shape, _DTYPE.value)

    def loss(params, x):
        return jnp.sum(nnx.merge(graphdef, params)(x).astype(jnp.float32) ** 2)

    return jax.jit(jax.grad(loss, argnums=(0, 1))).lower(params, x).compile(), (params, x)


def longest_kernels(compiled, arguments) -> list[tuple[str, int, float]]:
    """Name, launches and milliseconds of the kernels of one call that take the longest."""
    with tempfile.TemporaryDirectory() as directory:
        with jax.profiler.trace(directory):
            jax.block_until_ready(compiled(*arguments))
        (path,) = pathlib.Path(directory).rglob("*.xplane.pb")
        data = jax.profiler.ProfileData.from_file(str(path))
    launches, nanoseconds = collections.Counter(), collections.Counter()
    for plane in data.planes:
        for line in plane.lines if "GPU" in plane.name else ():
            for event in line.events if "Stream" in line.name else ():
                launches[event.name] += 1
                nanoseconds[event.name] += event.duration_ns
    longest = nanoseconds.most_common(_LISTED)
    return [(name, launches[name], time / 1e6) for name, time in longest]


def main(argv):
    """Measures and prints."""
    if len(argv) > 1:
        raise app.UsageError(f"unexpected argument {argv[1]!r}")
    logging.set_verbosity(logging.WARNING)
    print(f"jax {jax.__version__}, {jax.devices()[0].device_kind}")
    for kind in _KIND.value:
        start = time.perf_counter()
        compiled, arguments = compile_layer(kind)
        row = {
            "kind": kind,
            "length": _LENGTH.value,
            "batch": _BATCH.value,
            "compile_s": round(time.perf_counter() - start, 1),
            "temporary_MiB": round(compiled.memory_analysis().temp_size_in_bytes / 2**20, 1),
            "ms": round(
                median_milliseconds(
                    lambda call=compiled, given=arguments: call(*given), jax.block_until_ready
                ),
                2,
            ),
        }
        print(json.dumps(row), flush=True)
        if _PROFILE.value:
            for name, count, milliseconds in longest_kernels(compiled, arguments):
                print(f"  {milliseconds:8.2f} ms {count:5d} x {name[:80]}", flush=True)


if __name__ == "__main__":
    app.run(main)
