"""Rows of the page: runs under one attention each, those of several seeds as one."""

from __future__ import annotations

import collections
import dataclasses
import json
import math
from collections.abc import Hashable, Iterable, Sequence

import numpy as np
from jaxtyping import Float, Float64

from sparsek_jax.evaluation.page.records import HeldOut, Record, Setting, TaskResult, TextNats


@dataclasses.dataclass(frozen=True)
class Spread:
    """A mean and what it varies by.

    Attributes:
      mean: Over seeds.
      error: Standard deviation over seeds; of one run the standard error of its value, if any.
    """

    mean: float
    error: float = math.nan


@dataclasses.dataclass(frozen=True)
class Entry:
    """A row of the page.

    Attributes:
      index: Place among the rows, which chooses its colour.
      name: Of its directories.
      label: Of its evaluations.
      records: One run, or several that differ in nothing but `seed`.
    """

    index: int
    name: str
    label: str
    records: tuple[Record, ...]

    @property
    def is_trained(self) -> bool:
        """Whether the attention is the one of training, and nothing else differs from it."""
        return self.label == self.records[0].kinds

    @property
    def title(self) -> str:
        """Name, and what it was evaluated as."""
        return self.name if self.is_trained else f"{self.name} as {self.label}"

    @property
    def held_out(self) -> tuple[HeldOut, ...]:
        """Of the runs that have one."""
        return tuple(r.held_out[self.label] for r in self.records if self.label in r.held_out)

    def task(self, name: str) -> tuple[TaskResult, ...]:
        """Of the runs that have one."""
        key = self.label, name
        return tuple(record.tasks[key] for record in self.records if key in record.tasks)

    @property
    def tasks(self) -> dict[str, tuple[TaskResult, ...]]:
        """Results by task."""
        names = {n: None for r in self.records for label, n in r.tasks if label == self.label}
        return {name: self.task(name) for name in names}

    @property
    def nats(self) -> dict[Setting, tuple[TextNats, ...]]:
        """Nats of text files, which are always those of the trained attention."""
        found = collections.defaultdict(list)
        for record in self.records if self.is_trained else ():
            for nats in record.nats:
                found[nats.setting].append(nats)
        return {setting: tuple(nats) for setting, nats in found.items()}

    @property
    def step(self) -> int | None:
        """Of the held-out loss, else of training, else of a task or of text files."""
        if self.held_out:
            return self.held_out[0].step
        if self.records[0].last_step is not None:
            return self.records[0].last_step
        others = (*self.tasks.values(), *self.nats.values())
        return others[0][0].step if others else None

    def curve(
        self, name: str
    ) -> tuple[Float64[np.ndarray, " n"], Float64[np.ndarray, " n"], Float64[np.ndarray, " n"]]:
        """A value of training: steps that all runs have, means, standard deviations over seeds."""
        curves = [record.metrics.get(name, {}) for record in self.records if self.is_trained]
        curves = [curve for curve in curves if curve]
        steps = sorted(set.intersection(*(set(curve) for curve in curves))) if curves else []
        values = np.array([[curve[step] for step in steps] for curve in curves])
        return np.array(steps, float), *mean_and_deviation(values.reshape(len(curves), len(steps)))


def mean_and_deviation(
    values: Float[np.ndarray, "runs ..."],
) -> tuple[Float64[np.ndarray, " ..."], Float64[np.ndarray, " ..."]]:
    """Mean over runs and standard deviation of a sample; NaN with fewer than two runs."""
    if not len(values):
        return np.zeros(values.shape[1:]), np.full(values.shape[1:], np.nan)
    deviation = values.std(0, ddof=1) if len(values) > 1 else np.full(values.shape[1:], np.nan)
    return values.mean(0), deviation


def spread(values: Sequence[float], error: float = math.nan) -> Spread:
    """Sums up a value of the runs of an entry; `error` is that of the one value."""
    mean, deviation = mean_and_deviation(np.array(values, float))
    return Spread(float(mean), error if len(values) == 1 else float(deviation))


def make_entries(records: Sequence[Record]) -> list[Entry]:
    """Makes the rows, in the order of the runs; labels of a run as its files' names.

    Runs are one row if their configurations differ in `seed` alone, no seed is there twice, and
    whatever several of them were measured on is the same, at the same step.
    """
    groups = collections.defaultdict(list)
    for record in records:
        for label in _labels(record):
            groups[_recipe(record), label].append(record)
    names = _names(records)
    entries = []
    for (_, label), members in groups.items():
        whole = Entry(0, "", label, tuple(members))
        for part in [members] if _is_one(whole) else [[member] for member in members]:
            name = ", ".join(names[record.directory] for record in part)
            entries.append(Entry(len(entries), name, label, tuple(part)))
    return entries


def _labels(record: Record) -> list[str]:
    labels = dict.fromkeys([*record.held_out, *(label for label, _ in record.tasks)])
    if record.metrics or record.nats or not labels:
        labels = {record.kinds: None} | labels
    return list(labels)


def _recipe(record: Record) -> Hashable:
    config = json.loads(record.config.to_json())
    config.pop("seed", None)
    # An import has no seed of its own.
    own = record.directory if record.imported else None
    return json.dumps(config, sort_keys=True), record.corpus, own


def _is_one(entry: Entry) -> bool:
    seeds = [record.config.get("seed") for record in entry.records]
    measured = (entry.held_out, *entry.tasks.values(), *entry.nats.values())
    return (
        len(set(seeds)) == len(seeds)
        and len({record.last_step for record in entry.records}) == 1
        and all(_same((each.setting, each.step) for each in group) for group in measured)
    )


def _same(values: Iterable[Hashable]) -> bool:
    return len(set(values)) <= 1


def _names(records: Sequence[Record]) -> dict:
    short = {record.directory: record.directory.absolute().name for record in records}
    counts = collections.Counter(short.values())
    return {path: name if counts[name] == 1 else str(path) for path, name in short.items()}
