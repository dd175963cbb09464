"""A run's directory: the configuration and the text that the run was started with.

`config.json` is the whole configuration; `run.json` names the prepared corpus, and with it the
content of the text, tells the tokenizer by a hash, and counts the processes, each of which reads
documents of its own.
"""

import json
import os
from pathlib import Path
from typing import Any

import jax
import ml_collections

from sparsek_jax.data import Corpus, Tokenizer, load_tokenizer
from sparsek_jax.data.tokenizer import TRAINED_TOKENIZER, tokenizer_fingerprint
from sparsek_jax.training.config import ConfigError, default_config, flat_fields

# What a run may not change when it resumes: the model, the order of its data, and what the
# optimizer's state consists of.
_FIXED_SECTIONS = ("model", "attention", "data")
_FIXED_FIELDS = (
    *("seed", "init_from", "optimizer.freeze_steps"),
    *("train.batch_size", "train.recurrent", "train.recurrent_gradient"),
)
# No model can be loaded without them.
_NEEDED_FIELDS = (
    *("model.vocab_size", "model.num_layers", "model.d_model", "model.mlp_dim"),
    *("attention.num_heads", "attention.num_kv_heads", "attention.head_dim"),
    *("attention.pattern", "attention.implementation", "data.root", "data.tokenizer"),
)
_FREE_FIELDS = ("data.root", "attention.implementation", "model.remat")


def write_text(path: Path, text: str) -> None:
    """Writes a text file atomically, in UTF-8."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """Writes a JSON file atomically."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def read_json(path: Path, *, expected: str = "another --workdir") -> dict[str, Any]:
    """Reads a JSON file that holds an object.

    Args:
      path: The file.
      expected: What the message of the error asks for.

    Raises:
      ConfigError: It is damaged.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"{path} is damaged ({error}); expected {expected}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path} is damaged (no JSON object); expected {expected}")
    return content


def save_run(workdir: Path, config: ml_collections.ConfigDict, corpus: Corpus) -> None:
    """Writes what a run is started or resumed with.

    Args:
      workdir: The run's directory.
      config: The run's configuration.
      corpus: The text that it reads.
    """
    write_json(workdir / "config.json", json.loads(config.to_json()))
    record = {
        "corpus": corpus.directory.name,
        "tokenizer": _tokenizer_fingerprint(config, corpus.directory),
        "processes": jax.process_count(),
    }
    write_json(workdir / "run.json", record)


def save_import(
    workdir: Path, config: ml_collections.ConfigDict, *, tokenizer: Path, source: dict[str, Any]
) -> None:
    """Writes what an imported model needs to be used like a run.

    Args:
      workdir: Its directory.
      config: The configuration; `data.tokenizer` becomes that of the directory.
      tokenizer: A tokenizer.json in the directory.
      source: What the model was before.
    """
    # Relative, so that the directory can be moved.
    config.data.tokenizer = str(tokenizer.relative_to(workdir))
    write_json(workdir / "config.json", json.loads(config.to_json()))
    record = {"imported": source, "tokenizer": tokenizer_fingerprint(str(tokenizer))}
    write_json(workdir / "run.json", record)


def imported_from(workdir: str | os.PathLike) -> dict[str, Any] | None:
    """What a model was before it was imported into a directory; None if it was not."""
    return run_record(workdir).get("imported")


def load_config(workdir: str | os.PathLike) -> ml_collections.ConfigDict:
    """Reads the configuration that a run was last started or resumed with, or that of an import.

    Raises:
      FileNotFoundError: The directory holds no run.
      ConfigError: The file is damaged, or a field is missing, unknown or of a wrong type.
    """
    path = Path(workdir) / "config.json"
    if not path.exists():
        raise FileNotFoundError(
            f"workdir={str(workdir)!r} holds no run (no config.json); train one first: "
            f"python train.py --config=CONFIG --workdir={workdir}"
        )
    config = ml_collections.ConfigDict(read_json(path))
    _check_fields(path, config)
    if imported_from(workdir) is not None:
        # Beside the weights; a path that is absolute stays as it is.
        config.data.tokenizer = str(Path(workdir).absolute() / config.data.tokenizer)
    return config


def _check_fields(path: Path, config: ml_collections.ConfigDict) -> None:
    """Checks types, and that nothing is missing but what an older version did not write."""
    saved, defaults = flat_fields(config), flat_fields(default_config())
    wrong = f"{path} is no configuration of a run"
    for name, value in saved.items():
        if any(field.startswith(f"{name}.") for field in defaults):
            raise ConfigError(f"{wrong}: {name}={value!r}; expected fields {name}.*")
        if name not in defaults:
            raise ConfigError(f"{wrong}: {name}={value!r}, a field that this version has not")
        default = defaults[name]
        # JSON does not always tell floats from integers.
        if type(value) is not type(default) and (type(value), type(default)) != (int, float):
            raise ConfigError(
                f"{wrong}: {name}={value!r}; expected {type(default).__name__}, as in {default!r}"
            )
    if missing := sorted({*_NEEDED_FIELDS} - {*saved}):
        raise ConfigError(f"{wrong}: it has no {', '.join(missing)}; expected another --workdir")


def current_config(workdir: str | os.PathLike) -> ml_collections.ConfigDict:
    """Reads `load_config` as this version would write it: with defaults for fields that came later.

    Raises:
      FileNotFoundError: The directory holds no run.
      ConfigError: The file is damaged.
    """
    config = default_config()
    saved = json.loads(load_config(workdir).to_json())
    for section in filter(lambda value: isinstance(value, dict), saved.values()):
        # JSON has no tuples.
        lists = {name: tuple(x) for name, x in section.items() if isinstance(x, list)}
        section.update(lists)
    config.update(saved)
    return config


def corpus_directory(workdir: str | os.PathLike, config: ml_collections.ConfigDict) -> Path:
    """Where the prepared text of a run lies, and the tokenizer if it was trained on it."""
    corpus = run_record(workdir).get("corpus", "")
    return Path(config.data.root).expanduser() / corpus


def load_run_tokenizer(workdir: str | os.PathLike, config: ml_collections.ConfigDict) -> Tokenizer:
    """Loads the tokenizer that a run was trained with, without reading its text.

    Args:
      workdir: The run's directory.
      config: The run's configuration.

    Raises:
      ConfigError: It is not where it was, or is another now.
    """
    record = run_record(workdir)
    directory = corpus_directory(workdir, config)
    try:
        tokenizer = load_tokenizer(config.data.tokenizer, directory=directory)
    except ValueError as error:
        raise ConfigError(f"the tokenizer of workdir={str(workdir)!r}: {error}") from error
    fingerprint = _tokenizer_fingerprint(config, directory)
    if record.get("tokenizer", fingerprint) != fingerprint:
        raise ConfigError(
            f"data.tokenizer={config.data.tokenizer!r} is not the tokenizer that the run in "
            f"workdir={str(workdir)!r} was trained with: the file has changed, or the "
            "configuration has; expected them as they were"
        )
    return tokenizer


def check_same_run(config: ml_collections.ConfigDict, workdir: Path) -> None:
    """Checks that `config` can continue the run that `workdir` holds, if any.

    Raises:
      ConfigError: A field is another, or the number of processes is.
    """
    if not (workdir / "config.json").exists():
        return
    if imported_from(workdir) is not None:
        raise ConfigError(
            f"workdir={str(workdir)!r} holds an imported model and no run; expected another "
            f"--workdir, and --config.init_from={workdir} to start from its weights"
        )
    saved, defaults = flat_fields(load_config(workdir)), flat_fields(default_config())
    for field, new in flat_fields(config).items():
        fixed = field.split(".")[0] in _FIXED_SECTIONS or field in _FIXED_FIELDS
        if not fixed or field in _FREE_FIELDS:
            continue
        # A field that came with a later version had its default value all along.
        old = saved.get(field, defaults.get(field))
        if old != new:
            raise ConfigError(
                f"{field}={new!r}, but the run in workdir={str(workdir)!r} was started with "
                f"{old!r}; expected the same value, or another --workdir"
            )
    processes = run_record(workdir).get("processes", jax.process_count())
    if processes != jax.process_count():
        raise ConfigError(
            f"this is one of {jax.process_count()} processes, but the run in "
            f"workdir={str(workdir)!r} was started with {processes}, each of which reads documents "
            "of its own; expected the same number, or another --workdir"
        )


def check_start(initial: str | os.PathLike) -> None:
    """Checks that a directory holds a run or an import, to start another run from.

    Raises:
      ConfigError: It holds neither.
    """
    if not (Path(initial) / "config.json").exists():
        raise ConfigError(
            f"init_from={str(initial)!r} holds neither a run nor an import (no config.json); "
            "expected the directory of one"
        )


def check_same_tokenizer(
    config: ml_collections.ConfigDict, corpus: Corpus, initial: str | os.PathLike
) -> None:
    """Checks that a run reads the tokens that the weights it starts from were trained on.

    Args:
      config: The run's configuration.
      corpus: The text that it reads.
      initial: Directory of the run or import that it starts from.

    Raises:
      ConfigError: The tokenizers differ.
    """
    saved = load_config(initial)
    fingerprint = _tokenizer_fingerprint(config, corpus.directory)
    if run_record(initial).get("tokenizer", fingerprint) != fingerprint:
        raise ConfigError(
            f"data.tokenizer={config.data.tokenizer!r}, but init_from={str(initial)!r} was trained "
            f"with {saved.data.tokenizer!r}; expected the same"
        )


def check_same_corpus(corpus: Corpus, workdir: Path) -> None:
    """Checks that the text behind unchanged data fields is the one that the run began with.

    Raises:
      ConfigError: It is another.
    """
    name = run_record(workdir).get("corpus", corpus.directory.name)
    if corpus.directory.name != name:
        raise ConfigError(
            f"the text that config.data describes is now {corpus.directory.name}, but the run in "
            f"workdir={str(workdir)!r} was started with {name}: files were changed, added or "
            "removed; expected the same text, or another --workdir"
        )


def _tokenizer_fingerprint(config: ml_collections.ConfigDict, corpus_directory: Path) -> str:
    spec = config.data.tokenizer
    if spec.startswith("bpe:"):
        spec = str(corpus_directory / TRAINED_TOKENIZER)
    return tokenizer_fingerprint(spec)


def run_record(workdir: str | os.PathLike) -> dict[str, Any]:
    """Which text and tokenizer a run or an import has; empty where that was not written down.

    Raises:
      ConfigError: The file is damaged.
    """
    path = Path(workdir) / "run.json"
    return read_json(path) if path.exists() else {}
