"""The harness's own command line, `lm_eval`, with the model `sparsek`.

python -m sparsek_jax.evaluation.harness --model=sparsek --model_args=workdir=runs/mine --tasks=TASK
"""

from sparsek_jax.evaluation.harness import register
from sparsek_jax.training.cli import clear_errors


def main() -> None:
    """Runs the harness; a mistake about the run is one clear line."""
    with clear_errors():
        register()
        from lm_eval.__main__ import cli_evaluate

        cli_evaluate()


if __name__ == "__main__":
    main()
