"""What runs and imports hold on disk about themselves, read and checked."""

from __future__ import annotations

import collections
import dataclasses
import json
import math
import os
from collections.abc import Hashable, Iterator
from pathlib import Path
from typing import Any

import ml_collections
import numpy as np
from flax import nnx
from jaxtyping import Float64

from sparsek_jax.evaluation.gates import LayerGates
from sparsek_jax.evaluation.perplexity import Bucket, HeldOutLoss
from sparsek_jax.evaluation.report import attention_sizes
from sparsek_jax.evaluation.tasks.grid import Cell
from sparsek_jax.nn import Decoder, DecoderConfig
from sparsek_jax.training.config import ConfigError, decoder_config
from sparsek_jax.training.parameters import define
from sparsek_jax.training.workdir import (
    imported_from,
    load_config,
    load_run_tokenizer,
    read_json,
    run_record,
)

_REMEDY = "it to be removed or made anew"
_ANY_VOCABULARY = 2**30  # to check the rest of a configuration


@dataclasses.dataclass(frozen=True)
class Setting:
    """What a measurement was made on; only those with an equal one can be compared.

    Attributes:
      key: Equal where the measurement is the same.
      text: For people.
    """

    key: Hashable
    text: str = dataclasses.field(compare=False)


@dataclasses.dataclass(frozen=True)
class HeldOut:
    """A file that eval.py wrote about held-out documents.

    Attributes:
      step: Of the checkpoint.
      sizes: Of the attention, as of `attention_sizes`.
      kinds: Of layers, such as "window+sparsek".
      notes: What differs from training.
      setting: The text and how it was read.
      loss: On it.
      gates: Of the SparseK layers.
    """

    step: int
    sizes: dict[str, int]
    kinds: str
    notes: tuple[str, ...]
    setting: Setting
    loss: HeldOutLoss
    gates: tuple[LayerGates, ...]


@dataclasses.dataclass(frozen=True)
class TaskResult:
    """A file that eval.py wrote about a task; fields as of `HeldOut`.

    Attributes:
      step: Of the checkpoint.
      sizes: Of the attention.
      kinds: Of layers.
      notes: What differs from training.
      setting: What was asked.
      measure: What accuracy means, for people.
      cells: Results by length and depth.
    """

    step: int
    sizes: dict[str, int]
    kinds: str
    notes: tuple[str, ...]
    setting: Setting
    measure: str
    cells: tuple[Cell, ...]


@dataclasses.dataclass(frozen=True)
class TextNats:
    """A file that benchmarks/text_nats.py wrote: nats by position, of several kinds of text.

    Attributes:
      step: Of the checkpoint.
      setting: The files, and how they were cut.
      edges: Of the buckets of positions.
      kinds: Nats of every bucket, by directory of the files; pieces count alike.
    """

    step: int
    setting: Setting
    edges: tuple[int, ...]
    kinds: dict[str, Float64[np.ndarray, " buckets"]]

    def mean(self, kind: str) -> float:
        """Nats per token of a kind of text."""
        targets = np.diff(self.edges)
        targets[-1] -= 1  # The first token of a piece is only read.
        return float(np.average(self.kinds[kind], weights=np.maximum(targets, 1)))


@dataclasses.dataclass(frozen=True)
class Record:
    """A directory of a run, or of an imported model.

    Attributes:
      directory: As it was named.
      config: That it was trained with.
      imported: Whether it is an import, which was not trained.
      corpus: Name of the prepared text; empty for an import.
      kinds: Of the trained layers, which is the label of an evaluation without changes.
      sizes: Of the trained attention.
      parameters: How many; None if the tokenizer is gone, on which they depend.
      metrics: Values by step, of the names in metrics.jsonl.
      held_out: By label.
      tasks: By label and task.
      nats: In the order of their files' names.
      remarks: What was left out, and why.
    """

    directory: Path
    config: ml_collections.ConfigDict
    imported: bool
    corpus: str
    kinds: str
    sizes: dict[str, int]
    parameters: int | None
    metrics: dict[str, dict[int, float]]
    held_out: dict[str, HeldOut]
    tasks: dict[tuple[str, str], TaskResult]
    nats: tuple[TextNats, ...]
    remarks: tuple[str, ...]

    @property
    def last_step(self) -> int | None:
        """Of training, as far as it was logged."""
        return max((max(values) for values in self.metrics.values()), default=None)


def read_record(directory: str | os.PathLike) -> Record:
    """Reads a directory.

    Raises:
      FileNotFoundError: It holds no run.
      ConfigError: A file is damaged.
    """
    directory = Path(directory)
    config = load_config(directory)
    remarks = []
    try:
        attention = _model(config, _ANY_VOCABULARY).attention
    except ConfigError as error:
        raise ConfigError(
            f"{directory / 'config.json'} is no configuration of a run ({error}); expected one of "
            "this version"
        ) from error
    metrics, cut = _read_metrics(directory / "metrics.jsonl")
    if cut:
        remarks.append("the last line of metrics.jsonl, which is not whole")
    held_out, tasks = {}, {}
    for path, content in _json_files(directory / "eval"):
        if "loss" in content:
            held_out[_label(path, content)] = _checked(path, _held_out, content, directory)
        elif "cells" in content:
            key = _label(path, content), str(content.get("task"))
            tasks[key] = _checked(path, _task, content, directory)
        else:
            remarks.append(f"eval/{path.name}, which is no evaluation")
    nats = [
        _checked(path, _nats, content, directory)
        for path, content in _json_files(directory)
        if content.keys() >= {"step", "edges", "files"}
    ]
    return Record(
        directory=directory,
        config=config,
        imported=imported_from(directory) is not None,
        corpus=run_record(directory).get("corpus", ""),
        kinds="+".join(attention.pattern) or attention.kind,
        sizes=attention_sizes(attention),
        parameters=_parameters(directory, config),
        metrics=metrics,
        held_out=held_out,
        tasks=tasks,
        nats=tuple(nats),
        remarks=tuple(remarks),
    )


def _model(config: ml_collections.ConfigDict, vocab_size: int) -> DecoderConfig:
    config = ml_collections.ConfigDict(config.to_dict())
    if vocab_size > config.model.vocab_size:
        config.model.vocab_size = vocab_size
    return decoder_config(config, vocab_size)


def _parameters(directory: Path, config: ml_collections.ConfigDict) -> int | None:
    vocab_size = config.model.vocab_size
    if not vocab_size:
        try:
            vocab_size = load_run_tokenizer(directory, config).vocab_size
        except (ConfigError, OSError):
            return None
    model = _model(config, vocab_size)
    definition = define(lambda: Decoder(model, rngs=nnx.Rngs(0)))
    return sum(math.prod(x.shape) for x in definition.abstract.values())


def _read_metrics(path: Path) -> tuple[dict[str, dict[int, float]], bool]:
    """Values by name and step, and whether the last line is cut off, as after a kill."""
    metrics = collections.defaultdict(dict)
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []
    for number, line in enumerate(lines, 1):
        try:
            values = json.loads(line)
            step = int(values.pop("step"))
            for name, value in values.items():
                metrics[name][step] = math.nan if value is None else float(value)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            if number == len(lines):
                return dict(metrics), True
            raise ConfigError(
                f"line {number} of {path} is damaged ({error}); expected it to be removed"
            ) from error
    return dict(metrics), False


def _json_files(directory: Path) -> Iterator[tuple[Path, dict[str, Any]]]:
    for path in sorted(directory.glob("*.json")):
        # What is being written has a name that begins with a dot.
        if not path.name.startswith("."):
            yield path, read_json(path, expected=_REMEDY)


def _label(path: Path, content: dict[str, Any]) -> str:
    return str(content.get("label", path.stem))


def _checked(path: Path, make, content: dict[str, Any], directory: Path) -> Any:
    try:
        return make(content, directory)
    except (AttributeError, KeyError, IndexError, TypeError, ValueError) as error:
        raise ConfigError(
            f"{path} is damaged, or from another version ({type(error).__name__}: {error}); "
            f"expected {_REMEDY}"
        ) from error


def _common(content: dict[str, Any]) -> dict[str, Any]:
    config = ml_collections.ConfigDict(content["config"])
    attention = _model(config, _ANY_VOCABULARY).attention
    return {
        "step": int(content["step"]),
        "sizes": attention_sizes(attention),
        "kinds": "+".join(attention.pattern) or attention.kind,
        "notes": tuple(str(note) for note in content["notes"]),
    }


def _tokenizer(content: dict[str, Any], directory: Path) -> tuple[str, str]:
    """How people call a tokenizer, and its fingerprint."""
    spec = content["config"]["data"]["tokenizer"]
    return spec, run_record(directory).get("tokenizer", spec)


def _held_out(content: dict[str, Any], directory: Path) -> HeldOut:
    data = content["config"]["data"]
    loss = _numbers(content["loss"])
    loss["buckets"] = tuple(Bucket(**bucket) for bucket in loss["buckets"])
    loss = HeldOutLoss(**loss)
    tokenizer, fingerprint = _tokenizer(content, directory)
    counts = (loss.documents, loss.tokens, loss.bytes)
    gates = []
    for layer in content["gates"]:
        arrays = {
            name: np.array(_numbers(value), float) if isinstance(value, list) else value
            for name, value in layer.items()
            if name != "verdicts"
        }
        gates.append(LayerGates(**arrays, verdicts=tuple(layer["verdicts"])))
    return HeldOut(
        **_common(content),
        setting=Setting(
            (content["corpus"], data["seq_len"], data["packing"], fingerprint, *counts),
            f"{content['corpus']}, tokenizer {tokenizer}, seq_len {data['seq_len']:,}, packing "
            f"{data['packing']}: {plural(counts[0], 'document')}, {counts[1]:,} tokens, "
            f"{counts[2]:,} bytes",
        ),
        loss=loss,
        gates=tuple(gates),
    )


def _task(content: dict[str, Any], directory: Path) -> TaskResult:
    cells = tuple(Cell(**_numbers(cell, keep=("depth",))) for cell in content["cells"])
    lengths, depths = ({getattr(c, name) for c in cells} for name in ("length", "depth"))
    if len(cells) != len(lengths) * len(depths) or not cells:
        raise ValueError("cells are no grid of length and depth")
    seed, samples = content["config"]["eval"]["task_seed"], cells[0].samples
    tokenizer, fingerprint = _tokenizer(content, directory)
    at = "" if depths == {None} else f", depths {', '.join(f'{d:g}' for d in sorted(depths))}"
    return TaskResult(
        **_common(content),
        setting=Setting(
            (content["task"], frozenset(lengths), frozenset(depths), samples, seed, fingerprint),
            f"{content['task']} in prompts of {', '.join(f'{n:,}' for n in sorted(lengths))} "
            f"tokens{at}, {samples:,} samples a cell, seed {seed}, tokenizer {tokenizer}",
        ),
        measure=str(content["measure"]),
        cells=cells,
    )


def _nats(content: dict[str, Any], directory: Path) -> TextNats:
    edges = tuple(int(edge) for edge in content["edges"])
    files = tuple((str(file["file"]), int(file["pieces"])) for file in content["files"])
    sums = collections.defaultdict(lambda: np.zeros(len(edges) - 1))
    pieces = collections.Counter()
    for file in content["files"]:
        kind = Path(file["file"]).parent.as_posix()
        sums[kind] += file["pieces"] * np.array(_numbers(file["nats"]), float)
        pieces[kind] += file["pieces"]
    tokenizer = run_record(directory).get("tokenizer", "")
    return TextNats(
        step=int(content["step"]),
        setting=Setting(
            (edges, files, tokenizer),
            f"{plural(len(files), 'file')}, {plural(sum(pieces.values()), 'piece')} of up to "
            f"{edges[-1]:,} tokens, without a token before",
        ),
        edges=edges,
        kinds={kind: total / pieces[kind] for kind, total in sums.items()},
    )


def plural(count: int, noun: str) -> str:
    """How many of what."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def _numbers(value: Any, keep: tuple[str, ...] = ()) -> Any:
    """The value with NaN where JSON had to hold null."""
    if isinstance(value, dict):
        return {k: v if k in keep else _numbers(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_numbers(child) for child in value]
    return math.nan if value is None else value
