"""From a foreign file to a directory that is used like a run's."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import ml_collections

from sparsek_jax import nn
from sparsek_jax.data.tokenizer import HuggingFaceTokenizer
from sparsek_jax.pretrained.directories import check_new, staged, write_files
from sparsek_jax.pretrained.families import (
    DEFAULT_OPTIONS,
    AttentionOptions,
    context_length,
    decoder_fields,
)
from sparsek_jax.pretrained.gguf_file import open_gguf
from sparsek_jax.pretrained.huggingface import open_huggingface
from sparsek_jax.pretrained.source import ConversionError, Source
from sparsek_jax.pretrained.weights import Plan, plan, read_parameters
from sparsek_jax.training.checkpoint import save_params
from sparsek_jax.training.config import decoder_config, default_config
from sparsek_jax.training.workdir import save_import


@dataclasses.dataclass(frozen=True)
class Imported:
    """What an import did.

    Attributes:
      source: What was imported.
      config: Of the decoder.
      num_stored: Tensors that were read.
      new: Names of the tensors that were initialised.
      dropped: Names of the tensors that were left out.
    """

    source: Source
    config: nn.DecoderConfig
    num_stored: int
    new: tuple[str, ...]
    dropped: tuple[str, ...]


def open_source(path: Path) -> Source:
    """Opens a Hugging Face directory or a GGUF file.

    Raises:
      ConversionError: It is neither, or damaged.
    """
    if path.is_dir():
        return open_huggingface(path)
    if path.is_file() and path.suffix == ".gguf":
        return open_gguf(path)
    what = "is neither" if path.exists() else "does not exist"
    raise ConversionError(
        f"--from={str(path)!r} {what}; expected a Hugging Face directory or a .gguf file"
    )


def import_model(
    path: Path, workdir: Path, *, options: AttentionOptions = DEFAULT_OPTIONS, seed: int = 0
) -> Imported:
    """Converts a pretrained model; writes nothing unless all of it is right.

    Args:
      path: A Hugging Face directory, or a GGUF file of Llama's architecture.
      workdir: Directory to make; docs/pretrained.md says what it holds.
      options: The attention to use.
      seed: Of the new scorers.

    Returns:
      What was done.

    Raises:
      ConversionError: The model is damaged, incomplete, or one that a decoder cannot be.
      ConfigError: An option is impossible.
      OSError: `workdir` cannot be written.
    """
    check_new("workdir", workdir)
    source = open_source(path)
    config, model_config, tensors = planned(source, options)
    with staged(workdir) as staging:
        tokenizer = write_files(staging / "tokenizer", source.tokenizer) / "tokenizer.json"
        _check_tokenizer(source, tokenizer, config.model.vocab_size)
        record = {
            "path": str(path.absolute()),
            "model_type": source.config["model_type"],
            "context_length": context_length(source.config),
        }
        save_import(staging, config, tokenizer=tokenizer, source=record)
        save_params(staging, read_parameters(source, model_config, tensors, seed=seed))
    return Imported(
        source=source,
        config=model_config,
        num_stored=len(tensors.stored),
        new=tuple(tensor.name for tensor in tensors.new),
        dropped=tuple(tensors.dropped),
    )


def planned(
    source: Source, options: AttentionOptions
) -> tuple[ml_collections.ConfigDict, nn.DecoderConfig, Plan]:
    """Checks whatever can be checked before weights are read.

    Args:
      source: The model.
      options: The attention to use.

    Returns:
      Configuration of a run, that of its decoder, and what becomes of the tensors.

    Raises:
      ConversionError: The model is incomplete, or one that a decoder cannot be.
      ConfigError: An option is impossible.
    """
    config = _run_config(source, options)
    model_config = decoder_config(config, config.model.vocab_size)
    tensors = plan(source, model_config)
    if "tokenizer.json" not in source.tokenizer:
        raise ConversionError(f"{source.path} holds no tokenizer; expected a tokenizer.json")
    return config, model_config, tensors


def _run_config(source: Source, options: AttentionOptions) -> ml_collections.ConfigDict:
    config = default_config()
    try:
        model, attention = decoder_fields(source.config, options)
        context = context_length(source.config)
    except ConversionError as error:
        raise ConversionError(f"{source.config_path}: {error}") from error
    for section, fields in (("model", model), ("attention", attention)):
        for name, value in fields.items():
            try:
                config[section][name] = value
            except TypeError as error:
                raise ConversionError(
                    f"{source.config_path}: {section}.{name}={value!r}; {error}"
                ) from error
    config.data.seq_len = min(config.data.seq_len, context)
    return config


def _check_tokenizer(source: Source, path: Path, vocab_size: int) -> None:
    try:
        tokenizer = HuggingFaceTokenizer(path)
    except ValueError as error:
        # The file that is read lies where nobody will find it.
        message = str(error).replace(str(path.parent), str(source.path))
        raise ConversionError(message) from error
    if tokenizer.vocab_size > vocab_size:
        raise ConversionError(
            f"{source.path}: the tokenizer has {tokenizer.vocab_size} ids; expected at most the "
            f"model's vocab_size={vocab_size}"
        )
