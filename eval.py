r"""Evaluates a trained model on held-out text.

python eval.py --config=configs/quickstart.py --workdir=runs/quickstart \
    [--config.attention.kind=dense ...]

Attention (kind, pattern, k, w, gating, implementation), data and eval fields may differ from what
the run was trained with; the model's structure may not. Writes tables to the screen, and JSON and a
plot to WORKDIR/eval/.
"""

from pathlib import Path

import ml_collections
from absl import flags
from ml_collections import config_flags

from sparsek_jax.data import prepare
from sparsek_jax.evaluation.evaluate import evaluate
from sparsek_jax.evaluation.report import Evaluation, print_report, write_report
from sparsek_jax.training.checkpoint import load_config, restore_model
from sparsek_jax.training.cli import run
from sparsek_jax.training.config import ConfigError, decoder_config, validate_config

_CONFIG = config_flags.DEFINE_config_file("config", None, "The recipe of the run.")
_WORKDIR = flags.DEFINE_string("workdir", None, "Directory of the run.")
_STEP = flags.DEFINE_integer("step", None, "Checkpoint to evaluate; the newest by default.")
flags.mark_flags_as_required(["config", "workdir"])

_FREE_ATTENTION = (
    "kind",
    "pattern",
    "num_selected",
    "sliding_window",
    "gating",
    "implementation",
)
_FREE_MODEL = ("dtype", "remat")
# A byte-pair encoding is trained on the corpus, so another corpus has other tokens.
_CORPUS = ("glob", "tfds", "tfds_split", "validation_fraction", "max_documents")


def check_same_model(config: ml_collections.ConfigDict, trained: ml_collections.ConfigDict) -> None:
    """Raises ConfigError if `config` describes another model than `trained`."""
    fields = [f"model.{name}" for name in trained.model if name not in _FREE_MODEL]
    fields += [f"attention.{name}" for name in trained.attention if name not in _FREE_ATTENTION]
    fields += ["data.tokenizer"]
    if trained.data.tokenizer.startswith("bpe:"):
        fields += [f"data.{name}" for name in _CORPUS]
    for field in fields:
        section, name = field.split(".")
        old, new = trained[section][name], config[section][name]
        if old != new:
            raise ConfigError(
                f"{field}={new!r}, but the model was trained with {old!r}; expected the same value"
            )


def describe(attention: ml_collections.ConfigDict) -> str:
    """Names an attention by what decides its cost."""
    kinds = "+".join(attention.pattern) or attention.kind
    sizes = []
    if "sparsek" in kinds:
        sizes.append(f"k={attention.num_selected}")
    if "sparsek" in kinds or "window" in kinds:
        sizes.append(f"w={attention.sliding_window}")
    gating = " straight-through" if attention.gating != "soft" and "sparsek" in kinds else ""
    return " ".join([kinds, *sizes]) + gating


def main(argv: list[str]) -> None:
    """Evaluates and reports."""
    del argv
    config, workdir = _CONFIG.value, Path(_WORKDIR.value)
    trained = load_config(workdir)
    config.mesh.update(data=1, fsdp=1, tensor=1)
    validate_config(config, device_count=1)
    check_same_model(config, trained)
    corpus = prepare(config.data)
    model_config = decoder_config(config, corpus.tokenizer.vocab_size)
    model, step = restore_model(workdir, model_config, step=_STEP.value)
    loss, gates = evaluate(model, corpus, config)
    evaluation = Evaluation(
        step=step,
        attention=describe(config.attention),
        trained_attention=describe(trained.attention),
        corpus=corpus.description,
        seq_len=config.data.seq_len,
        loss=loss,
        gates=gates,
    )
    print_report(evaluation)
    name = "_".join(describe(config.attention).replace("=", "").split())
    paths = write_report(evaluation, workdir / "eval", f"{name}_step{step}")
    print(f"written: {paths[0]} and {paths[1]}")


if __name__ == "__main__":
    run(main)
