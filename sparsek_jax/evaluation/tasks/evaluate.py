"""Evaluates a trained run or an imported model on tasks. No text of a corpus is read."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import os
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_collections
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec
from rich.progress import track

from sparsek_jax.evaluation.evaluate import row_sharding
from sparsek_jax.evaluation.settings import Settings, evaluation_settings
from sparsek_jax.evaluation.tasks import find_tasks
from sparsek_jax.evaluation.tasks.grid import Cell, Grid
from sparsek_jax.evaluation.tasks.scoring import Predict, score
from sparsek_jax.nn import AttentionConfig
from sparsek_jax.training.checkpoint import restore_model
from sparsek_jax.training.config import ConfigError, decoder_config
from sparsek_jax.training.workdir import imported_from, load_config, load_run_tokenizer


@dataclasses.dataclass(frozen=True)
class TaskEvaluation:
    """How a run does on a task.

    Attributes:
      workdir: The run's directory.
      step: Of the checkpoint.
      label: Name of the attention, and what of it differs from training.
      notes: What a reader has to know, one sentence each.
      attention: The attention that was evaluated.
      config: All fields that were evaluated with.
      task: Name of the task.
      cells: Results by length and then by depth.
    """

    workdir: Path
    step: int
    label: str
    notes: tuple[str, ...]
    attention: AttentionConfig
    config: ml_collections.ConfigDict
    task: str
    cells: tuple[Cell, ...]


def evaluate_tasks(
    config: ml_collections.ConfigDict,
    workdir: str | os.PathLike,
    names: Sequence[str],
    *,
    overrides: Collection[str] = (),
    step: int | None = None,
) -> Iterator[TaskEvaluation]:
    """Evaluates a checkpoint on tasks; writes nothing.

    The prompts are made, and so checked, before the model is loaded. One program is compiled for
    each task and length.

    Args:
      config: The recipe with the command line's overrides; see `evaluation_settings`. Fields
        `eval.task_...` say what is asked.
      workdir: Directory of the run, or of an import.
      names: Of tasks.
      overrides: Fields given on the command line.
      step: The checkpoint; None for the newest that is intact.

    Yields:
      The results of every task, when they are there.

    Raises:
      ConfigError: A task is unknown, a length too short for it, or a field impossible or in
        contradiction to the run.
      FileNotFoundError: The directory holds no run or no checkpoint.
      CheckpointError: No checkpoint is intact.
    """
    try:
        tasks = find_tasks(names)
        # The text of a run does not matter here, so neither does it if another one is named.
        settings = evaluation_settings(config, load_config(workdir), overrides).without_data()
        config = settings.config
        tokenizer = load_run_tokenizer(workdir, config)
        model_config = decoder_config(config, tokenizer.vocab_size)
        grid = Grid(
            lengths=tuple(sorted(set(config.eval.task_lengths))),
            depths=tuple(sorted(set(config.eval.task_depths))),
            samples=config.eval.task_samples,
            seed=config.eval.task_seed,
        )
        examples = [
            [grid.examples(task, tokenizer, length) for length in grid.lengths] for task in tasks
        ]
        model, step = restore_model(workdir, model_config, step=step)
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(str(error)) from error

    rows = row_sharding(config.eval.batch_size)
    graphdef, params = nnx.split(model)
    params = jax.device_put(params, NamedSharding(rows.mesh, PartitionSpec()))
    score_all = functools.partial(
        score, _predict(graphdef, rows), params, batch_size=config.eval.batch_size, rows=rows
    )
    notes = _notes(settings, Path(workdir))
    for task, by_length in zip(tasks, examples, strict=True):
        scores = itertools.chain.from_iterable(score_all(part) for part in by_length)
        total = sum(len(part) for part in by_length)
        shown = list(track(scores, task.name, total=total, transient=True))
        per_length = itertools.batched(shown, total // len(grid.lengths))
        cells = (
            grid.cells(length, part, length_scores)
            for length, part, length_scores in zip(grid.lengths, by_length, per_length, strict=True)
        )
        yield TaskEvaluation(
            workdir=Path(workdir),
            step=step,
            label=settings.label(""),
            notes=notes,
            attention=model_config.attention,
            config=config,
            task=task.name,
            cells=tuple(itertools.chain.from_iterable(cells)),
        )


def _predict(graphdef: nnx.GraphDef, rows: NamedSharding) -> Predict:
    def predict(params, tokens, at):
        model = nnx.merge(graphdef, params)
        hidden = model.hidden(tokens, sharding=rows)
        # The logits of all positions would be far larger than the model.
        return model.logits(jnp.take_along_axis(hidden, at[:, :, None], axis=1))

    return predict


def _notes(settings: Settings, workdir: Path) -> tuple[str, ...]:
    notes = settings.notes()
    seq_len, longest = settings.config.data.seq_len, max(settings.config.eval.task_lengths)
    if imported_from(workdir) is None and longest > seq_len:
        notes.append(f"Prompts have up to {longest:,} tokens; the run was trained on {seq_len:,}.")
    return tuple(notes)
