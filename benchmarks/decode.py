"""Generation on a GPU: time per token and cache size by context, beside a dense cache.

    python -m benchmarks.decode --out=results
    python -m benchmarks.decode --models=135M --contexts=4096,65536 --batches=1,16

Two model shapes with random weights in bfloat16 decode greedily, a block of tokens in one jit,
after contexts of several lengths, once with SparseK attention (k = w = 512, soft gates) and once
with dense attention over a cache of all tokens (XLA, extended in place). SparseK's cache is that of
a prompt of the whole context, prefilled in chunks, one member copied over the batch; what a dense
cache holds does not change its time, so it holds zeros. Each figure is the median of five blocks.
Nothing is timed before prefill and decode give the hidden states of the whole forward pass. Writes
decode.json and decode.png; `--plot_only` draws the latter again.
"""

import dataclasses
import functools
import json
import pathlib
import time

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags, logging
from flax import nnx

from benchmarks.inputs import compile_side_by_side, median_milliseconds, reason
from sparsek_jax.generation.statistics import dense_cache_bytes
from sparsek_jax.nn import AttentionConfig, Decoder, DecoderConfig

_MODELS = flags.DEFINE_list("models", ["135M", "1.1B"], "Which model shapes.")
_CONTEXTS = flags.DEFINE_list("contexts", ["4096", "65536", "262144", "1048576"], "Tokens before.")
_BATCHES = flags.DEFINE_list("batches", ["1", "16", "64"], "Sequences at a time.")
_BLOCK = flags.DEFINE_integer("block", 32, "Tokens per timed call.")
_CHUNK = flags.DEFINE_integer("chunk", 4096, "Tokens of the prompt per call.")
_OUT = flags.DEFINE_string("out", "results", "Directory to write to.")
_PLOT_ONLY = flags.DEFINE_bool("plot_only", False, "Draw the results in --out again.")

_SHAPES = {
    "135M": {
        "vocab_size": 49_152,
        "num_layers": 30,
        "d_model": 576,
        "mlp_dim": 1536,
        "attention": {"num_heads": 9, "num_kv_heads": 3, "head_dim": 64},
    },
    "1.1B": {
        "vocab_size": 32_000,
        "num_layers": 22,
        "d_model": 2048,
        "mlp_dim": 5632,
        "attention": {"num_heads": 32, "num_kv_heads": 4, "head_dim": 64},
    },
}


def config_of(name: str, kind: str) -> DecoderConfig:
    """A model's configuration."""
    shape = dict(_SHAPES[name])
    attention = AttentionConfig(kind=kind, **shape.pop("attention"))
    return DecoderConfig(attention=attention, scan_layers=True, dtype="bfloat16", **shape)


def make_model(config: DecoderConfig) -> tuple[nnx.GraphDef, nnx.State]:
    """A model with random weights; products take bfloat16 ones, the scorer its float32 ones."""

    @jax.jit
    def params():
        state = nnx.state(Decoder(config, rngs=nnx.Rngs(0)))

        def stored(path, x):
            is_product = x.ndim >= 2 and "norm" not in str(path) and "scorer" not in str(path)
            return x.astype(config.dtype) if is_product else x

        return jax.tree_util.tree_map_with_path(stored, state)

    graphdef = nnx.graphdef(nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0))))
    return graphdef, params()


def decode(graphdef, params, cache, tokens):
    """Appends a block of tokens, each the likeliest after the last; returns cache and last ones."""
    model = nnx.merge(graphdef, params).unstacked()

    def step(carry, _):
        cache, tokens = carry
        cache, hidden = model.extend(tokens[:, None], cache)
        return (cache, jnp.argmax(model.logits(hidden[:, 0]), axis=-1).astype(jnp.int32)), None

    return jax.lax.scan(step, (cache, tokens), length=_BLOCK.value)[0]


def prefill(graphdef, params, cache, tokens):
    """Appends a chunk of a prompt; returns cache and likeliest next tokens."""
    model = nnx.merge(graphdef, params)
    cache, hidden = model.extend(tokens, cache)
    return cache, jnp.argmax(model.logits(hidden[:, -1]), axis=-1).astype(jnp.int32)


def error() -> float:
    """Largest relative error of hidden states by prefill and decode against one forward pass."""
    config = config_of("135M", "sparsek")
    attention = dataclasses.replace(config.attention, num_selected=100, sliding_window=60)
    config = dataclasses.replace(config, attention=attention, num_layers=2, dtype="float32")
    graphdef, params = make_model(config)
    tokens = jax.random.randint(jax.random.key(1), (1, 700), 0, config.vocab_size)

    @jax.jit
    def by_cache(params, tokens):
        model = nnx.merge(graphdef, params)
        cache, first = model.extend(tokens[:, :500], model.init_cache(1))

        def step(cache, token):
            cache, hidden = model.extend(token[:, None], cache)
            return cache, hidden[:, 0]

        _, others = jax.lax.scan(step, cache, tokens[:, 500:].T)
        return jnp.concatenate([first, jnp.moveaxis(others, 0, 1)], axis=1)

    with jax.default_matmul_precision("highest"):
        whole = jax.jit(lambda params, tokens: nnx.merge(graphdef, params).hidden(tokens))
        expected, found = whole(params, tokens), by_cache(params, tokens)
    return float(jnp.linalg.norm(found - expected) / jnp.linalg.norm(expected))


def num_bytes(tree) -> int:
    """Bytes of all arrays."""
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


def room(context: int) -> int:
    """Tokens of a dense cache: the context, and what timing appends to it."""
    return context + 10 * _BLOCK.value


def compile_all(names, contexts, batches) -> dict:
    """Compiles everything, by (model, kind, what); where that fails, keeps the reason."""
    lowered = {}
    limit = 0.75 * jax.devices()[0].memory_stats()["bytes_limit"]
    tokens = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.int32)
    for name in names:
        for kind in ("sparsek", "dense"):
            config = config_of(name, kind)
            graphdef, params = jax.eval_shape(functools.partial(make_model, config))

            def lower(function, *arguments, graphdef=graphdef, params=params):
                jitted = jax.jit(functools.partial(function, graphdef), donate_argnums=1)
                return functools.partial(jitted.lower, params, *arguments)

            def empty(batch, max_length=None, graphdef=graphdef, params=params):
                def init(params):
                    return nnx.merge(graphdef, params).init_cache(batch, max_length=max_length)

                return jax.eval_shape(init, params)

            if kind == "sparsek":
                chunk = tokens((1, _CHUNK.value))
                lowered[name, kind, "prefill"] = lower(prefill, empty(1), chunk)
                for batch in batches:
                    cache = empty(batch)
                    lowered[name, kind, batch] = lower(decode, cache, tokens((batch,)))
                continue
            for context in contexts:
                for batch in batches:
                    case = name, kind, (batch, context)
                    needed = dense_cache_bytes(config, batch * room(context))
                    if needed > limit:
                        lowered[case] = f"{needed / 2**30:.0f} GiB of cache do not fit"
                        continue
                    cache = empty(batch, room(context))
                    lowered[case] = lower(decode, cache, tokens((batch,)))

    return compile_side_by_side(lowered)


def time_decode(row: dict, executable, params, cache) -> None:
    """Adds milliseconds per token of the batch, and sizes, to a row."""
    if isinstance(executable, str):
        row["failed"] = executable
        return
    row["cache MiB"] = round(num_bytes(cache) / 2**20, 1)
    state = [cache, jnp.zeros((row["batch"],), jnp.int32)]

    def call():
        state[:] = executable(params, *state)
        return state[1]

    # Every call appends a block: few enough for the room of a dense cache.
    milliseconds = median_milliseconds(call, jax.block_until_ready, calls=1) / _BLOCK.value
    row["ms per token"] = round(milliseconds, 3)
    row["tokens/s"] = round(1e3 * row["batch"] / milliseconds)
    memory = executable.memory_analysis()
    row["temporary MiB"] = round(memory.temp_size_in_bytes / 2**20, 1)


def measure_sparsek(name, contexts, batches, compiled, report) -> None:
    """Prefills to every context, and decodes from there."""
    graphdef, params = make_model(config_of(name, "sparsek"))
    cache = nnx.merge(graphdef, params).init_cache(1)
    step = compiled[name, "sparsek", "prefill"]
    if isinstance(step, str):
        report({"model": name, "kind": "sparsek", "failed": step})
        return
    rng = np.random.default_rng(0)
    vocab_size = _SHAPES[name]["vocab_size"]
    # The first call of a program takes longer.
    jax.block_until_ready(
        step(params, jax.tree.map(jnp.copy, cache), jnp.zeros((1, _CHUNK.value), jnp.int32))
    )
    length, seconds = 0, 0.0
    for context in contexts:
        shape = (-(-(context - length) // _CHUNK.value), 1, _CHUNK.value)
        chunks = list(jnp.asarray(rng.integers(0, vocab_size, shape, np.int32)))
        start = time.perf_counter()
        for chunk in chunks:
            cache, _ = step(params, cache, chunk)
        jax.block_until_ready(cache)
        seconds += time.perf_counter() - start
        length += shape[0] * _CHUNK.value
        memory = step.memory_analysis()
        report(
            {
                "model": name,
                "kind": "sparsek",
                "context": length,
                "prefill s": round(seconds, 3),
                "prefill tokens/s": round(length / seconds),
                "cache MiB": round(num_bytes(cache) / 2**20, 1),
                "prefill temporary MiB": round(memory.temp_size_in_bytes / 2**20, 1),
            }
        )
        for batch in batches:
            copies = jax.tree.map(lambda x, n=batch: jnp.repeat(x, n, axis=0), cache)
            row = {"model": name, "kind": "sparsek", "context": length, "batch": batch}
            time_decode(row, compiled[name, "sparsek", batch], params, copies)
            report(row)


def measure_dense(name, contexts, batches, compiled, report) -> None:
    """Decodes after every context that fits."""
    graphdef, params = make_model(config_of(name, "dense"))
    for context in contexts:
        for batch in batches:
            row = {"model": name, "kind": "dense", "context": context, "batch": batch}
            executable = compiled[name, "dense", (batch, context)]
            try:
                cache = None
                if not isinstance(executable, str):
                    model = nnx.merge(graphdef, params)
                    cache = model.init_cache(batch, max_length=room(context))
                    full = jnp.full((batch,), context, jnp.int32)
                    layers = tuple(
                        dataclasses.replace(x, length=jnp.copy(full)) for x in cache.layers
                    )
                    cache = dataclasses.replace(cache, layers=layers)
                time_decode(row, executable, params, cache)
            except jax.errors.JaxRuntimeError as error:
                row["failed"] = reason(error)
            report(row)


def plot(results: dict, path: pathlib.Path) -> None:
    """Draws time per token over the context, a panel a model."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    rows = [row for row in results["rows"] if "ms per token" in row]
    names = sorted({row["model"] for row in rows})
    figure, axes = plt.subplots(1, len(names), figsize=(5 * len(names), 4), squeeze=False)
    for axis, name in zip(axes[0], names, strict=True):
        for kind, colour in (("sparsek", "C0"), ("dense", "C3")):
            batches = sorted({row["batch"] for row in rows})
            for batch, style in zip(batches, ("o-", "s--", "^:", "v-."), strict=False):
                points = sorted(
                    (row["context"], row["ms per token"])
                    for row in rows
                    if (row["model"], row["kind"], row["batch"]) == (name, kind, batch)
                )
                if points:
                    axis.plot(*zip(*points, strict=True), style, color=colour, markersize=4,
                              label=f"{kind}, batch {batch}")  # fmt: skip
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
        axis.set_xlabel("context")
        axis.set_title(f"{name} parameters")
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    axes[0, 0].set_ylabel("ms per token of the batch")
    figure.suptitle(f"{results['device']}, jax {results['jax']}, bfloat16")
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main(argv):
    """Checks, measures, prints a line a figure, and writes both files."""
    if len(argv) > 1:
        raise app.UsageError(f"unexpected argument {argv[1]!r}")
    logging.set_verbosity(logging.WARNING)
    out = pathlib.Path(_OUT.value)
    path = out / "decode.json"
    if _PLOT_ONLY.value:
        plot(json.loads(path.read_text()), out / "decode.png")
        return
    for name in _MODELS.value:
        if name not in _SHAPES:
            raise app.UsageError(f"--models has {name!r}; expected some of {list(_SHAPES)}")
    contexts = sorted(int(x) for x in _CONTEXTS.value)
    batches = [int(x) for x in _BATCHES.value]
    results = {"device": jax.devices()[0].device_kind, "jax": jax.__version__, "rows": []}
    compiled = compile_all(_MODELS.value, contexts, batches)
    found = error()
    if not found <= 1e-4:
        raise SystemExit(f"error {found:.1e} exceeds 1e-4: nothing is timed")
    results["error"] = float(f"{found:.2e}")
    print(", ".join(f"{x}: {y}" for x, y in results.items() if x != "rows"), flush=True)
    out.mkdir(parents=True, exist_ok=True)

    def report(row):
        results["rows"].append(row)
        print(json.dumps(row), flush=True)
        path.write_text(json.dumps(results, indent=1) + "\n")

    for name in _MODELS.value:
        measure_sparsek(name, contexts, batches, compiled, report)
        measure_dense(name, contexts, batches, compiled, report)
    plot(results, out / "decode.png")


if __name__ == "__main__":
    app.run(main)
