"""What a pretrained model loses when its attention becomes sparse, by how its scorers start.

    python -m benchmarks.start_study --workdir=runs/smollm2 --calibrate=FILE,FILE FILE [FILE ...]

Prints a line of a table for each start, of mean nats of the first tokens of every text (one
document each, as in `text_nats`), and by how much their mean exceeds that of dense attention.
docs/pretrained.md shows it for SmolLM2.
"""

import dataclasses
import functools
import pathlib
import time

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags
from flax import nnx

from sparsek_jax.generation.loading import load_run
from sparsek_jax.nn.decoder import Block, output_logits
from sparsek_jax.nn.scorer import SLOPE_UNIT
from sparsek_jax.pretrained.calibrating import calibration_rows
from sparsek_jax.pretrained.scorer_start import METHODS, Start, scorer_starts
from sparsek_jax.training.parameters import define, split

_WORKDIR = flags.DEFINE_string("workdir", None, "Directory of the model.")
_CALIBRATE = flags.DEFINE_list("calibrate", None, "Texts that scorers start from.")
_ROWS = flags.DEFINE_integer("rows", 4, "Most rows of a calibration text.", lower_bound=1)
_TOKENS = flags.DEFINE_integer("tokens", 2048, "Of each text, and in a row.", lower_bound=2)
_BUDGET = flags.DEFINE_integer("budget", 128, "k, and w.", lower_bound=4)
_PARTS = flags.DEFINE_multi_enum(
    "part", PARTS := ["starts", "gates", "layers", "budgets"], PARTS, "Tables to make."
)
flags.mark_flags_as_required(["workdir", "calibrate"])


class Study:
    """A model, applied to some texts block by block, so that few programs are compiled.

    Args:
      run: A `LoadedRun` without stacked layers.
      tokens: Of the texts, `[R, T]`.
    """

    def __init__(self, run, tokens):
        self.config = run.model.config
        _, self.params = split(run.model)
        self.tokens = jnp.asarray(tokens)
        self.norm = nnx.split(run.model.final_norm)
        self.table = run.model.output_table
        self.dense = self.nats(["dense"])

    def nats(self, kinds, starts=None, *, scale=1.0, gain=1.0, **fields):
        """Mean nats of every text.

        Args:
          kinds: Of the layers, repeated.
          starts: Of the scorers by layer.
          scale: Factor of what they score.
          gain: Of TimestepNorm.
          **fields: Of the attention.
        """
        x = jnp.take(self.params["embedding"], self.tokens, axis=0)
        attention = dataclasses.replace(self.config.attention, **fields)
        config = dataclasses.replace(self.config, attention=attention)
        for layer in range(config.num_layers):
            definition, apply = _block(config, kinds[layer % len(kinds)])
            weights = {}
            for name, shape in definition.abstract.items():
                if name.endswith("scorer.kernel"):
                    weights[name] = jnp.asarray(scale * starts[layer].kernel, jnp.float32)
                elif name.endswith("scorer.head_slope"):
                    slope = scale * SLOPE_UNIT * starts[layer].slope
                    weights[name] = jnp.asarray(slope, jnp.float32)
                elif name.endswith("scorer.norm.gain"):
                    weights[name] = jnp.full(shape.shape, gain, jnp.float32)
                else:
                    weights[name] = self.params[f"layers.{layer}.{name}"]
            x = apply(weights, x, layer)
        return np.asarray(_nats(*self.norm, self.table, x, self.tokens))

    def line(self, name, *arguments, **options):
        """Prints a line of the table."""
        begin = time.time()
        nats = self.nats(*arguments, **options)
        cells = [f"{value:.3f}" for value in nats]
        cells.append(f"{np.mean(nats - self.dense):+.3f}")
        print(f"| {name} | {' | '.join(cells)} | {time.time() - begin:.0f} s |", flush=True)


@functools.lru_cache
def _block(config, kind):
    definition = define(lambda: Block(config, kind, rngs=nnx.Rngs(0)))

    @jax.jit
    def apply(weights, x, layer):
        positions = jnp.broadcast_to(jnp.arange(x.shape[1]), x.shape[:2])
        block = definition.merge(weights)
        return block(x, positions=positions, segment_ids=None, sharding=None, layer=layer)[0]

    return definition, apply


@functools.partial(jax.jit, static_argnums=0)
def _nats(graphdef, state, table, hidden, tokens):
    def row(inputs):
        hidden, tokens = inputs
        logits = output_logits(table, nnx.merge(graphdef, state)(hidden)[:-1])
        right = jnp.take_along_axis(logits, tokens[1:, None], axis=-1)[:, 0]
        return jnp.mean(jax.nn.logsumexp(logits, axis=-1) - right)

    return jax.lax.map(row, (hidden, tokens))


def _starts(study, starts, size, hard):
    layers = range(study.config.num_layers)
    shape = starts["attention_mass"][0].kernel.shape
    rng = np.random.default_rng(0)

    def unsloped(kernel):
        return Start(kernel, np.zeros(shape[1]))

    zero = [unsloped(np.zeros(shape)) for _ in layers]
    bare = {"num_sinks": 0, "learned_slope": False}
    # A tie goes to the older key: without a slope, zero keeps what came first.
    study.line("window only, w = 2k", ["window"], sliding_window=2 * size)
    study.line(
        "window and the first 4 keys", ["sinks"], num_selected=4, sliding_window=2 * size - 4
    )
    study.line("zero without slope: the first k keys", ["sparsek"], zero, **hard | {"slope": 0.0})
    random = [unsloped(rng.normal(size=shape) / np.sqrt(shape[0])) for _ in layers]
    study.line("random, as imported (soft, TimestepNorm)", ["sparsek"], random, **bare)
    study.line("random", ["sparsek"], random, **hard | bare)
    study.line("random and sinks", ["sparsek"], random, **hard)
    for name, method in starts.items():
        study.line(name, ["sparsek"], method, **hard)
        study.line(f"{name}, no sinks", ["sparsek"], method, **hard | {"num_sinks": 0})
    mass = starts["attention_mass"]
    study.line("attention_mass, no slopes", ["sparsek"], mass, **hard | {"learned_slope": False})
    study.line("attention_mass, neither", ["sparsek"], mass, **hard | bare)
    longest = {layer: unsloped(-start.kernel) for layer, start in starts["key_norm"].items()}
    study.line("key_norm, the longest keys", ["sparsek"], longest, **hard)


def _gates(study, starts, size, hard):
    del size
    starts = starts["attention_mass"]
    for scale in (0.5, 1, 2, 4, 8, 16):
        soft = hard | {"gating": "soft", "scale": scale}
        study.line(f"soft, scale {scale}", ["sparsek"], starts, **soft)
    normed = hard | {"timestep_norm": True}
    study.line("straight-through, TimestepNorm", ["sparsek"], starts, **normed)
    for gain in (1, 4):
        study.line(
            f"soft, TimestepNorm with gain {gain}",
            ["sparsek"],
            starts,
            scale=gain,
            gain=gain,
            **normed | {"gating": "soft"},
        )


def _layers(study, starts, size, hard):
    del size
    starts = starts["attention_mass"]
    rest = study.config.num_layers - 2
    for name, kinds in (
        ("first two layers dense", ["dense"] * 2 + ["sparsek"] * rest),
        ("every fourth layer dense", ["sparsek", "sparsek", "sparsek", "dense"]),
        ("every other layer a window of w", ["sparsek", "window"]),
    ):
        study.line(name, kinds, starts, **hard)


def _budgets(study, starts, size, hard):
    starts = starts["attention_mass"]
    half = size // 2
    for selected, window in ((half, 3 * half), (3 * half, half), (half, half), (2 * size,) * 2):
        budget = {"num_selected": selected, "sliding_window": window}
        study.line(f"k = {selected}, w = {window}", ["sparsek"], starts, **hard | budget)
    study.line(f"window only, w = {4 * size}", ["window"], sliding_window=4 * size)


_TABLES = {"starts": _starts, "gates": _gates, "layers": _layers, "budgets": _budgets}


def main(arguments):
    """Prints the tables."""
    run = load_run(_WORKDIR.value)
    size, length = _BUDGET.value, _TOKENS.value
    rows = functools.partial(calibration_rows, run.tokenizer, length=length)
    texts = [pathlib.Path(path) for path in arguments[1:]]
    study = Study(run, rows(texts, max_rows=1))
    attention = dataclasses.replace(
        study.config.attention,
        kind="sparsek",
        pattern=(),
        num_selected=size,
        sliding_window=size,
        learned_slope=True,
        num_sinks=4,
    )
    study.config = dataclasses.replace(study.config, attention=attention)
    names = " | ".join(path.name for path in texts)
    print(f"| start | {names} | mean over dense | time |\n|{' --- |' * (len(texts) + 3)}")
    print(f"| dense | {' | '.join(f'{x:.3f}' for x in study.dense)} | | |", flush=True)
    tokens = rows([pathlib.Path(path) for path in _CALIBRATE.value], max_rows=_ROWS.value)
    starts = {method: {} for method in METHODS}
    begin = time.time()
    # Of scale 1, so that the table of gates can have any.
    for layer, found in scorer_starts(
        study.params, study.config, tokens, methods=METHODS, scale=1.0
    ):
        for method, start in found.items():
            starts[method][layer] = start
    print(f"calibrated on {tokens.size} tokens in {time.time() - begin:.0f} s", flush=True)
    hard = {"gating": "straight_through", "timestep_norm": False}
    for part in _PARTS.value:
        print(f"{part}: k = w = {size} unless said", flush=True)
        _TABLES[part](study, starts, size, hard)


if __name__ == "__main__":
    app.run(main)
