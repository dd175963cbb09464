"""A trained run, ready to generate from."""

from __future__ import annotations

import dataclasses
import os

import ml_collections

from sparsek_jax.data import Tokenizer
from sparsek_jax.nn import Decoder
from sparsek_jax.training.checkpoint import restore_model
from sparsek_jax.training.config import ConfigError, decoder_config
from sparsek_jax.training.workdir import load_config, load_run_tokenizer


@dataclasses.dataclass(frozen=True)
class LoadedRun:
    """A run's newest intact checkpoint.

    Attributes:
      model: On one device.
      tokenizer: The one it was trained with.
      step: Of the checkpoint.
    """

    model: Decoder
    tokenizer: Tokenizer
    step: int


def load_run(
    workdir: str | os.PathLike,
    config: ml_collections.ConfigDict | None = None,
    *,
    step: int | None = None,
) -> LoadedRun:
    """Loads a run's model and tokenizer; the text it was trained on is not needed.

    Args:
      workdir: The run's directory.
      config: What the weights are used with; None: as the run was trained, but attention is
        computed as suits this machine, whichever implementation that was.
      step: The checkpoint; None for the newest that is intact.

    Raises:
      FileNotFoundError: The directory holds no run or no checkpoint.
      ConfigError: The tokenizer is missing or another, or does not fit the checkpoint.
      CheckpointError: Checkpoints exist but none is intact.
    """
    if config is None:
        config = load_config(workdir)
        config.attention.implementation = ""
    tokenizer = load_run_tokenizer(workdir, config)
    try:
        model, step = restore_model(
            workdir, decoder_config(config, tokenizer.vocab_size), step=step
        )
    except ValueError as error:
        raise ConfigError(
            f"{error}; data.tokenizer={config.data.tokenizer!r} has {tokenizer.vocab_size} ids"
        ) from error
    return LoadedRun(model, tokenizer, step)
