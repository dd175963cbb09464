"""The page: what runs hold on disk, on one HTML page that needs no network and no other file."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path

from sparsek_jax.evaluation.page.entries import make_entries
from sparsek_jax.evaluation.page.records import plural, read_record
from sparsek_jax.evaluation.page.sections import (
    diagnostics,
    heat_maps,
    loss_by_position,
    text_nats,
    training_curves,
)
from sparsek_jax.evaluation.page.selected import selected
from sparsek_jax.evaluation.page.tables import measured_settings, notes, runs_table
from sparsek_jax.training.config import ConfigError
from sparsek_jax.training.workdir import write_text

_TEMPLATE = Path(__file__).with_name("page.html")


def write_page(
    directories: Sequence[str | os.PathLike],
    to: str | os.PathLike,
    *,
    text: str | os.PathLike | None = None,
    max_tokens: int = 2048,
) -> Path:
    """Writes the page atomically, when all of it is made.

    Args:
      directories: Of runs and imports.
      to: The file.
      text: Of a text to show what was selected of; see `make_page`.
      max_tokens: Most tokens of it.

    Returns:
      The file.

    Raises:
      ConfigError: There is no run, a file is damaged, or the text is none.
      OSError: A directory holds no run, or a file cannot be read or written.
    """
    to = Path(to)
    if to.is_dir() or not to.absolute().parent.is_dir():
        raise ConfigError(f"--to={str(to)!r}; expected a file in a directory that exists")
    sample = None if text is None else _read_text(Path(text))
    write_text(to, make_page(directories, text=sample, max_tokens=max_tokens))
    return to


def make_page(
    directories: Sequence[str | os.PathLike], *, text: str | None = None, max_tokens: int = 2048
) -> str:
    """Makes the page.

    Args:
      directories: Of runs and imports; one that is named twice counts once.
      text: Of what was selected of it the page tells, for models with SparseK layers, which are
        loaded for this; None: nothing is loaded.
      max_tokens: Most tokens of it, the first ones.

    Returns:
      HTML.

    Raises:
      ConfigError: There is no directory, or a file is damaged.
      FileNotFoundError: A directory holds no run.
    """
    if not directories:
        raise ConfigError("no run is named; expected directories of runs, such as runs/*")
    distinct: dict[Path, str | os.PathLike] = {}
    for directory in directories:
        distinct.setdefault(Path(directory).resolve(), directory)
    records = [read_record(directory) for directory in distinct.values()]
    entries = make_entries(records)
    marks = measured_settings(entries)
    caption = (
        "<p>★ marks the best of a column. ± is the standard deviation over seeds where a row "
        "stands for several runs, else the standard error over documents. Tasks: mean over all "
        "lengths and depths. Tokens read: rows of training times their length.</p>"
    )
    table = runs_table(entries, marks) + caption + marks.legend() + notes(entries)
    sections = [
        ("Runs", table),
        ("Training", training_curves(entries)),
        ("Loss by position", loss_by_position(entries, marks)),
        ("Tasks", heat_maps(entries, marks)),
        ("Scorers", diagnostics(entries, marks)),
        ("Text files", text_nats(entries)),
    ]
    if text is not None:
        sections.append(("Selected in a sample text", selected(entries, text, max_tokens)))
    body = "".join(f"<section><h2>{name}</h2>{part}</section>" for name, part in sections if part)
    parts = {"TITLE": f"{plural(len(records), 'run')} of sparsek_jax", "BODY": body}
    template = _TEMPLATE.read_text(encoding="utf-8")
    return re.sub("__(TITLE|BODY)__", lambda match: parts[match[1]], template)


def _read_text(path: Path) -> str:
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(
            f"--text={str(path)!r}: {error.strerror}; expected a file that can be read"
        ) from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"--text={str(path)!r}: {error}; expected UTF-8 text") from error
    if not text:
        raise ConfigError(f"--text={str(path)!r} is empty; expected some text")
    return text
