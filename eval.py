r"""Evaluates a run on its held-out documents.

python eval.py --config=configs/quickstart.py --workdir=runs/quickstart \
    [--config.attention.kind=dense ...]

Prints a table and writes WORKDIR/eval/NAME.json and NAME.png, where NAME tells the attention.
"""

from absl import flags
from ml_collections import config_flags

from sparsek_jax.evaluation.evaluate import evaluate
from sparsek_jax.evaluation.report import print_report, write_report
from sparsek_jax.training.cli import run

_CONFIG = config_flags.DEFINE_config_file("config", None, "The recipe that the run was made with.")
_WORKDIR = flags.DEFINE_string("workdir", None, "Directory of the run.")
flags.mark_flags_as_required(["config", "workdir"])
flags.register_validator("workdir", lambda path: path != "", "expected a directory")


def main() -> None:
    """Evaluates the newest good checkpoint and reports."""
    overrides = flags.FLAGS["config"].override_values
    evaluation = evaluate(_CONFIG.value, _WORKDIR.value, overrides=overrides)
    print_report(evaluation)
    for path in write_report(evaluation):
        print(f"wrote {path}")


if __name__ == "__main__":
    run(main)
