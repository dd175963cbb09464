r"""Evaluates a run on its held-out documents, or on tasks.

python eval.py --config=configs/quickstart.py --workdir=runs/quickstart \
    [--config.attention.kind=dense ...] [--tasks=passkey,key_value]

Prints a table and writes WORKDIR/eval/NAME.json and NAME.png, where NAME tells the attention, and
the task if there is one. With tasks the held-out documents are not read.
"""

from collections.abc import Iterable
from pathlib import Path

from absl import flags
from ml_collections import config_flags

from sparsek_jax.evaluation.evaluate import evaluate
from sparsek_jax.evaluation.report import print_report, write_report
from sparsek_jax.evaluation.tasks import TASKS
from sparsek_jax.evaluation.tasks.evaluate import evaluate_tasks
from sparsek_jax.evaluation.tasks.report import print_task, write_task
from sparsek_jax.training.cli import run

_CONFIG = config_flags.DEFINE_config_file("config", None, "The recipe that the run was made with.")
_WORKDIR = flags.DEFINE_string("workdir", None, "Directory of the run.")
_TASKS = flags.DEFINE_list(
    "tasks", None, f"Instead of the held-out documents, some of {', '.join(TASKS)}."
)
flags.mark_flags_as_required(["config", "workdir"])
flags.register_validator("workdir", lambda path: path != "", "expected a directory")


def main() -> None:
    """Evaluates the newest good checkpoint and reports."""
    overrides = flags.FLAGS["config"].override_values
    if _TASKS.value is None:
        evaluation = evaluate(_CONFIG.value, _WORKDIR.value, overrides=overrides)
        print_report(evaluation)
        _print_paths(write_report(evaluation))
        return
    for evaluation in evaluate_tasks(
        _CONFIG.value, _WORKDIR.value, _TASKS.value, overrides=overrides
    ):
        print_task(evaluation)
        _print_paths(write_task(evaluation))


def _print_paths(paths: Iterable[Path]) -> None:
    for path in paths:
        print(f"wrote {path}")


if __name__ == "__main__":
    run(main)
