"""A run for the harness, with the attention that its arguments ask for."""

from __future__ import annotations

import dataclasses
import difflib
import os
from collections.abc import Mapping
from typing import Any

from sparsek_jax.evaluation.settings import FREE_ATTENTION, evaluation_settings
from sparsek_jax.generation.loading import LoadedRun, load_run
from sparsek_jax.training.config import ConfigError
from sparsek_jax.training.workdir import current_config, imported_from, load_config

_ATTENTION_FIELDS = tuple(field.split(".")[1] for field in FREE_ATTENTION)


@dataclasses.dataclass(frozen=True)
class HarnessRun:
    """A run with its own or another attention.

    Attributes:
      run: Model, tokenizer and step.
      notes: What differs from training, one sentence each.
      trained_length: Tokens of a row in training; None for an import, which does not know it.
    """

    run: LoadedRun
    notes: tuple[str, ...]
    trained_length: int | None


def load_for_harness(
    workdir: str | os.PathLike, attention: Mapping[str, Any], *, step: int | None = None
) -> HarnessRun:
    """Loads a run's or an import's weights.

    Args:
      workdir: Its directory.
      attention: Fields of `config.attention` that the same weights can be used with, as for
        `eval.py`. A pattern is written "window+sparsek". Without `implementation`, attention is
        computed as suits this machine.
      step: The checkpoint; None for the newest that is intact.

    Raises:
      ConfigError: A field is unknown or impossible, or the tokenizer is missing or another.
      FileNotFoundError: The directory holds no run or no checkpoint.
      CheckpointError: Checkpoints exist but none is intact.
    """
    config, saved = current_config(workdir), load_config(workdir)
    asked = {"implementation": "", **attention}
    for name, value in asked.items():
        if name not in _ATTENTION_FIELDS:
            nearest = difflib.get_close_matches(name, _ATTENTION_FIELDS, n=1)
            raise ConfigError(
                f"{name}={value!r} is not an argument of the model; expected one of attention, "
                f"{', '.join(_ATTENTION_FIELDS)}"
                + (f"; did you mean {nearest[0]}?" if nearest else "")
            )
        if name == "pattern" and isinstance(value, str):
            value = tuple(value.split("+"))
        try:
            config.attention[name] = value
        except TypeError as error:
            raise ConfigError(
                f"attention.{name}={value!r}; expected a value like {config.attention[name]!r}"
            ) from error
    overrides = [f"attention.{name}" for name in asked]
    settings = evaluation_settings(config, saved, overrides).without_data()
    return HarnessRun(
        load_run(workdir, settings.config, step=step),
        tuple(settings.notes()),
        None if imported_from(workdir) is not None else config.data.seq_len,
    )
