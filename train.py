r"""Trains a language model.

python train.py --config=configs/quickstart.py --workdir=runs/quickstart \
    [--config.train.steps=100 ...]

The same command resumes a stopped or killed run.
"""

import jax
from absl import flags
from ml_collections import config_flags

from sparsek_jax.generation.engine import Engine
from sparsek_jax.generation.sampling import Sampling
from sparsek_jax.training.cli import run
from sparsek_jax.training.config import ConfigError
from sparsek_jax.training.trainer import train

_CONFIG = config_flags.DEFINE_config_file("config", None, "A recipe of configs/.")
_WORKDIR = flags.DEFINE_string("workdir", None, "Directory of the run; created if needed.")
_DISTRIBUTED = flags.DEFINE_bool(
    "distributed",
    False,
    "This is one of several processes. On a cluster that JAX knows (Cloud TPU, Slurm, ...) nothing "
    "else is needed; elsewhere the following three are.",
)
_COORDINATOR = flags.DEFINE_string("coordinator", None, "HOST:PORT of process 0.")
_NUM_PROCESSES = flags.DEFINE_integer("num_processes", None, "Number of processes.", lower_bound=1)
_PROCESS_ID = flags.DEFINE_integer("process_id", None, "Of this process.", lower_bound=0)
flags.mark_flags_as_required(["config", "workdir"])
flags.register_validator("workdir", lambda path: path != "", "expected a directory")


def main() -> None:
    """Trains, then prints a sample of what the model writes."""
    if _DISTRIBUTED.value:
        try:
            jax.distributed.initialize(_COORDINATOR.value, _NUM_PROCESSES.value, _PROCESS_ID.value)
        except (ValueError, RuntimeError) as error:
            raise ConfigError(
                f"--distributed: {error} Expected a cluster that JAX knows, or --coordinator, "
                "--num_processes and --process_id"
            ) from error
    else:
        for flag in (_COORDINATOR, _NUM_PROCESSES, _PROCESS_ID):
            if flag.value is not None:
                raise ConfigError(
                    f"--{flag.name}={flag.value!r} without --distributed; expected both, or neither"
                )
    config = _CONFIG.value
    result = train(config, _WORKDIR.value)
    if result.finished and config.sample.length:
        # Every process takes part in computing it.
        prompt = config.sample.prompt
        (completion,) = Engine(result.model, result.corpus.tokenizer).generate(
            [prompt],
            max_tokens=config.sample.length,
            sampling=Sampling(temperature=config.sample.temperature, seed=config.seed),
        )
        if jax.process_index() == 0:
            text = prompt + completion.text
            print(f"--- sample at step {result.step} ---\n{text}\n---")


if __name__ == "__main__":
    run(main)
