"""What a run is evaluated with: its saved configuration and the few fields that may differ."""

from __future__ import annotations

import dataclasses
import operator
import re
from collections.abc import Collection
from typing import Any

import ml_collections

from sparsek_jax.data import default_data_config
from sparsek_jax.training.config import (
    ConfigError,
    flat_fields,
    validate_eval_config,
    validate_implementation,
)

# Attention that the same weights can be run with.
FREE_ATTENTION = (
    "attention.kind",
    "attention.pattern",
    "attention.num_selected",
    "attention.sliding_window",
    "attention.block_size",
    "attention.gating",
    "attention.implementation",
)
# What else the same weights can be run with.
_FREE_FIELDS = (*FREE_ATTENTION, "train.recurrent")
# Data fields that decide which text is read, as opposed to where it is kept or how it is cut.
_SOURCE = ("glob", "tfds", "tfds_split", "tfds_text_field", "tfds_data_dir")
_RECALL = tuple(f"recall.{name}" for name in default_data_config().recall)
_CORPUS = (*_SOURCE, *_RECALL, "tokenizer", "validation_fraction", "max_documents")
_ROWS = ("seq_len", "packing")


@dataclasses.dataclass(frozen=True)
class Settings:
    """How a run is evaluated.

    Attributes:
      config: All fields of a run.
      changes: Fields with another value than in training, as (value, value in training).
    """

    config: ml_collections.ConfigDict
    changes: dict[str, tuple[Any, Any]]

    @property
    def new_source(self) -> bool:
        """Whether the text is another than the run's, whose tokenizer must then be used."""
        return any(f"data.{name}" in self.changes for name in (*_SOURCE, "max_documents"))

    @property
    def new_corpus(self) -> bool:
        """Whether the text, its tokens or its split into documents held out are not the run's."""
        return any(f"data.{name}" in self.changes for name in _CORPUS)

    def without_data(self) -> Settings:
        """The same for an evaluation that reads no text: what `data` changes does not matter."""
        changes = {f: c for f, c in self.changes.items() if not f.startswith("data.")}
        return dataclasses.replace(self, changes=changes)

    def label(self, corpus_name: str) -> str:
        """File name that differs between evaluations of one run that can differ in their result.

        The kind of attention, then what else is not as in training.
        """
        attention = self.config.attention
        parts = ["+".join(attention.pattern) or attention.kind]
        fields = (*_FREE_FIELDS[2:], *(f"data.{name}" for name in _ROWS))
        parts += [
            f"{field.split('.')[1]}={self.changes[field][0]}"
            for field in fields
            if field in self.changes
        ]
        if self.config.eval.by_document:
            parts.append("by_document")
        if self.new_corpus:
            parts.append(corpus_name)
        return re.sub(r"[^\w.+=-]", "-", ",".join(parts).replace(",", "_"))

    def notes(self) -> list[str]:
        """Returns what a reader of the results has to know, one sentence each."""
        notes = [
            f"{field}={value!r}; the weights were trained with {trained!r}."
            for field, (value, trained) in self.changes.items()
        ]
        value, trained = self.changes.get("data.validation_fraction", (0, 0))
        if value > trained:
            notes.append(
                "With a larger data.validation_fraction than in training, documents that the model "
                "was trained on are among the held-out ones."
            )
        return notes


def evaluation_settings(
    config: ml_collections.ConfigDict,
    saved: ml_collections.ConfigDict,
    overrides: Collection[str] = (),
) -> Settings:
    """Combines a run's saved configuration with what is asked for.

    Fields of `eval` come from `config`, and those of `mesh`, which do not matter. Those of `data`
    and the attention's kind, pattern, num_selected, sliding_window, block_size, gating and
    implementation, and `train.recurrent`, come from `config` if they are named in `overrides`, else
    from the run. Any other field must be the same in both.

    Args:
      config: The recipe with the command line's overrides.
      saved: The run's configuration.
      overrides: Fields given on the command line, such as "attention.kind".

    Returns:
      The settings.

    Raises:
      ConfigError: `config` differs from `saved` in another field, or a value is impossible.
    """
    # Runs of versions without the field were trained as it says by default.
    asked, trained = flat_fields(config), {"train.recurrent": False, **flat_fields(saved)}
    unknown = sorted(trained.keys() - asked.keys())
    if unknown:
        raise ConfigError(
            f"{unknown[0]}={trained[unknown[0]]!r} of the saved configuration is not a field of "
            "--config; expected a recipe of the version that trained the run"
        )
    effective, changes, conflicts = dict(asked), {}, []
    for field, value in asked.items():
        # A field that came with a later version keeps the recipe's value, its default.
        old = trained.get(field, value)
        section = field.split(".")[0]
        if section in ("eval", "mesh") or value == old:
            continue
        if section != "data" and field not in _FREE_FIELDS:
            conflicts.append(f"{field}={value!r} (the run: {old!r})")
        elif field in overrides:
            changes[field] = (value, old)
        else:
            effective[field] = old
    if conflicts:
        raise ConfigError(
            f"--config differs from the run in {', '.join(conflicts)}; expected the values of the "
            "run, repeated on the command line"
        )
    if "attention.kind" in overrides and "attention.pattern" not in overrides:
        # The pattern would hide the kind.
        if effective["attention.pattern"]:
            changes["attention.pattern"] = ([], effective["attention.pattern"])
        effective["attention.pattern"] = []
    tokenizer, old = changes.get("data.tokenizer", ("", ""))
    # Only the place of a tokenizer.json may be another.
    if any(s == "bytes" or s.startswith(("bpe:", "ids:")) for s in (tokenizer, old)):
        raise ConfigError(
            f"data.tokenizer={tokenizer!r}, but the run was trained with {old!r}; expected the same"
        )
    result = ml_collections.ConfigDict(config.to_dict())
    for field, value in effective.items():
        parent, _, name = field.rpartition(".")
        section = operator.attrgetter(parent)(result) if parent else result
        section[name] = tuple(value) if isinstance(value, list) else value
    validate_eval_config(result.eval)
    validate_implementation(result)
    return Settings(result, changes)
