r"""Imports pretrained models, and exports models for other libraries.

python convert.py import --from=PATH --workdir=DIR [--num_selected=512 --sliding_window=512 ...]
python convert.py calibrate --workdir=DIR --to=DIR2 --text=FILE,FILE [--method=attention_mass ...]
python convert.py export --workdir=DIR --to=PATH [--dtype=bfloat16]
python convert.py inspect --from=PATH

PATH is a Hugging Face directory, or for import and inspect a GGUF file. What DIR holds after an
import is used like a run: with generate.py, with eval.py, and by train.py as --config.init_from.
So is DIR2, the same model with scorers that start from what it attends to in the texts.
"""

from pathlib import Path

from absl import flags

from sparsek_jax.nn.config import KINDS
from sparsek_jax.ops.gating import GATINGS
from sparsek_jax.pretrained.calibrating import calibrate_model
from sparsek_jax.pretrained.exporting import export_model
from sparsek_jax.pretrained.families import AttentionOptions
from sparsek_jax.pretrained.huggingface import DTYPES
from sparsek_jax.pretrained.importing import import_model
from sparsek_jax.pretrained.inspecting import describe
from sparsek_jax.pretrained.memory import unmap_freed_blocks
from sparsek_jax.pretrained.scorer_start import DEFAULT_SCALE, METHODS
from sparsek_jax.training.cli import run
from sparsek_jax.training.config import ConfigError

_FROM = flags.DEFINE_string("from", None, "Hugging Face directory or GGUF file to read.")
_TO = flags.DEFINE_string("to", None, "Directory to make: of Hugging Face, or like an import.")
_WORKDIR = flags.DEFINE_string("workdir", None, "Directory of the run; an import makes it.")
_KIND = flags.DEFINE_enum(
    "kind", None, KINDS, "Attention of every layer; an import's is sparsek by default."
)
_PATTERN = flags.DEFINE_list("pattern", None, "Kinds that repeat over the layers: window,sparsek.")
_NUM_SELECTED = flags.DEFINE_integer("num_selected", None, "Keys that a query selects.")
_SLIDING_WINDOW = flags.DEFINE_integer("sliding_window", None, "Newest keys that a query sees.")
_BLOCK_SIZE = flags.DEFINE_integer("block_size", None, "Keys selected together, where blocks are.")
_GATING = flags.DEFINE_enum("gating", None, GATINGS, "How gates act on keys and values.")
_SEED = flags.DEFINE_integer("seed", 0, "Of the new scorers' weights.", 0, 2**32 - 1)
_DTYPE = flags.DEFINE_enum("dtype", "float32", list(DTYPES), "Of the exported weights.")
_TEXT = flags.DEFINE_list("text", None, "Files to calibrate on, none of those to judge by.")
_METHOD = flags.DEFINE_enum("method", METHODS[0], METHODS, "What the scorers start from.")
_SCALE = flags.DEFINE_float("scale", DEFAULT_SCALE, "Standard deviation of the scores.")
_TIMESTEP_NORM = flags.DEFINE_boolean(
    "timestep_norm", False, "Whether the new scores are normalised over time."
)
_LEARNED_SLOPE = flags.DEFINE_boolean(
    "learned_slope", True, "Whether each head gets a rate at which it forgets."
)
_NUM_SINKS = flags.DEFINE_integer(
    "num_sinks", 4, "First tokens of a document that are always selected.", 0
)
_LENGTH = flags.DEFINE_integer("length", 2048, "Tokens in a row of a text.", 2)
_ROWS = flags.DEFINE_integer("rows", 4, "Most rows of a text, the first ones.", 1)

_ATTENTION = ("kind", "pattern", "num_selected", "sliding_window", "block_size", "gating", "seed")
# Flags of every command: those it needs, and those it may have.
_COMMANDS = {
    "import": (("from", "workdir"), _ATTENTION),
    "calibrate": (
        ("workdir", "to", "text"),
        (
            "method",
            "scale",
            "timestep_norm",
            "learned_slope",
            "num_sinks",
            "kind",
            "num_selected",
            "sliding_window",
            "gating",
            "length",
            "rows",
        ),
    ),
    "export": (("workdir", "to"), ("dtype",)),
    "inspect": (("from",), ()),
}


def main(command: str) -> None:
    """Runs a command and says what it did."""
    _check_flags(command)
    unmap_freed_blocks()
    if command == "inspect":
        print("\n".join(describe(Path(_FROM.value))))
    elif command == "calibrate":
        result = calibrate_model(
            _WORKDIR.value,
            Path(_TO.value),
            [Path(text) for text in _TEXT.value],
            method=_METHOD.value,
            scale=_SCALE.value,
            timestep_norm=_TIMESTEP_NORM.value,
            learned_slope=_LEARNED_SLOPE.value,
            num_sinks=_NUM_SINKS.value,
            kind=_KIND.value,
            num_selected=_NUM_SELECTED.value,
            sliding_window=_SLIDING_WINDOW.value,
            gating=_GATING.value,
            length=_LENGTH.value,
            max_rows=_ROWS.value,
        )
        print(
            f"wrote {_TO.value}: the weights of step {result.step} of {_WORKDIR.value}, with new "
            f"scorers in {len(result.layers)} layers from {result.num_tokens} tokens"
        )
    elif command == "export":
        step = export_model(_WORKDIR.value, Path(_TO.value), dtype=_DTYPE.value)
        print(f"wrote {_TO.value}: the weights of step {step} of {_WORKDIR.value}")
    else:
        options = AttentionOptions(
            kind=_KIND.value,
            pattern=None if _PATTERN.value is None else tuple(_PATTERN.value),
            num_selected=_NUM_SELECTED.value,
            sliding_window=_SLIDING_WINDOW.value,
            block_size=_BLOCK_SIZE.value,
            gating=_GATING.value,
        )
        result = import_model(
            Path(_FROM.value), Path(_WORKDIR.value), options=options, seed=_SEED.value
        )
        print(
            f"wrote {_WORKDIR.value}: {result.num_stored} tensors of {_FROM.value}, "
            f"{len(result.new)} new ones of scorers, {len(result.dropped)} left out"
        )


def _check_flags(command: str) -> None:
    needed, allowed = _COMMANDS[command]
    for name in needed:
        if not flags.FLAGS[name].value:
            raise ConfigError(f"--{name} is missing; {command} expects it")
    every = {name for pair in _COMMANDS.values() for names in pair for name in names}
    for name in sorted(every.difference(needed, allowed)):
        if flags.FLAGS[name].present:
            raise ConfigError(
                f"--{name} does not go with {command}; expected only "
                f"{', '.join(f'--{other}' for other in (*needed, *allowed))}"
            )


if __name__ == "__main__":
    run(main, commands=tuple(_COMMANDS))
