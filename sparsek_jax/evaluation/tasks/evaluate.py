"""Evaluates a trained run or an imported model on tasks. No text of a corpus is read."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import os
from collections.abc import Callable, Collection, Iterator, Sequence
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
from sparsek_jax.evaluation.tasks.scoring import Predict, Score, score
from sparsek_jax.evaluation.tasks.task import Example
from sparsek_jax.evaluation.tasks.written import written_credits
from sparsek_jax.generation.engine import Engine, NonFiniteLogitsError
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
      measure: What accuracy means in it, for people.
      cells: Results by length and then by depth.
    """

    workdir: Path
    step: int
    label: str
    notes: tuple[str, ...]
    attention: AttentionConfig
    config: ml_collections.ConfigDict
    task: str
    measure: str
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
    each task and length, and a few more for tasks that let the model write, on one device.

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
      ConfigError: A task is unknown, a length too short for it, a field impossible or in
        contradiction to the run, or the model's logits are not finite where it writes.
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
    scores_of = functools.partial(
        _scores,
        functools.partial(score, _predict(graphdef, rows), params, rows=rows),
        Engine(model, tokenizer),
        batch_size=config.eval.batch_size,
    )
    notes = _notes(settings, Path(workdir))
    for task, by_length in zip(tasks, examples, strict=True):
        scores = itertools.chain.from_iterable(scores_of(part) for part in by_length)
        total = sum(len(part) for part in by_length)
        try:
            shown = list(track(scores, task.name, total=total, transient=True))
        except NonFiniteLogitsError as error:
            raise ConfigError(str(error)) from error
        per_length = itertools.batched(shown, total // len(grid.lengths))
        cells = (
            grid.cells(task, length, part, length_scores)
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
            measure=task.measure,
            cells=tuple(itertools.chain.from_iterable(cells)),
        )


def _scores(
    score_all: Callable[..., Iterator[Score]],
    engine: Engine,
    examples: Sequence[Example],
    *,
    batch_size: int,
) -> Iterator[Score]:
    scores = score_all(examples, batch_size=batch_size)
    if not examples[0].references:
        return scores
    credits = written_credits(engine, examples, batch_size=batch_size)
    return (
        dataclasses.replace(score, credit=credit)
        for score, credit in zip(scores, credits, strict=True)
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
