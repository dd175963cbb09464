"""From a run's directory to one of Hugging Face."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

import jax
import ml_collections
import numpy as np
import tokenizers
from flax import nnx
from tokenizers import decoders, models, pre_tokenizers

from sparsek_jax import nn
from sparsek_jax.data import Tokenizer
from sparsek_jax.data.tokenizer import TRAINED_TOKENIZER
from sparsek_jax.pretrained.directories import check_new, staged, write_files
from sparsek_jax.pretrained.families import huggingface_config
from sparsek_jax.pretrained.huggingface import TOKENIZER_FILES, write_json, write_weights
from sparsek_jax.pretrained.layout import Tensor, layout
from sparsek_jax.training.checkpoint import restore_params
from sparsek_jax.training.config import ConfigError, decoder_config
from sparsek_jax.training.parameters import Params, define, unstack_layers
from sparsek_jax.training.workdir import (
    corpus_directory,
    imported_from,
    load_config,
    load_run_tokenizer,
)


def export_model(workdir: str | os.PathLike, to: Path, *, dtype: str = "float32") -> int:
    """Writes a run's newest weights as a directory that transformers loads.

    Args:
      workdir: Directory of a run, or of an imported model.
      to: Directory to make.
      dtype: Of the weights, a key of `huggingface.DTYPES`. Only "float32" keeps every bit of a
        trained weight.

    Returns:
      The step that the weights are from.

    Raises:
      ConversionError: No family of Hugging Face has such blocks, or a weight is too large for
        `dtype`.
      FileNotFoundError: `workdir` holds no run or no checkpoint.
      ConfigError: The tokenizer is missing or another.
      CheckpointError: Checkpoints exist but none is intact.
    """
    check_new("to", to)
    config = load_config(workdir)
    tokenizer = load_run_tokenizer(workdir, config)
    model_config = decoder_config(config, tokenizer.vocab_size)
    fields = huggingface_config(model_config, trained_context(workdir, config)) | {
        "torch_dtype": dtype,
        "bos_token_id": tokenizer.bos_id,
        "eos_token_id": tokenizer.eos_id,
    }
    files = tokenizer_files(workdir, config, tokenizer)
    params, step = restore_on_host(workdir, model_config)
    # NumPy's slices are views.
    params = unstack_layers({name: np.asarray(x) for name, x in params.items()}, model_config)
    tensors = layout(model_config)
    with staged(to) as staging:
        write_json(staging / "config.json", fields)
        write_files(staging, files)
        shapes = {tensor.name: tensor.shape for tensor in tensors}
        write_weights(staging, shapes, dtype, _joined(tensors, params))
    return step


def _joined(tensors: Iterable[Tensor], params: Params) -> Iterator[np.ndarray]:
    """Tensors of a file, made of parameters that are given up one by one."""
    for tensor in tensors:
        yield tensor.join(*(params.pop(name) for name in tensor.params))


def restore_on_host(workdir: str | os.PathLike, config: nn.DecoderConfig) -> tuple[Params, int]:
    """Loads the newest weights to the host, and the step they are from.

    Args:
      workdir: Directory of the run or import.
      config: Of its decoder.

    Raises:
      FileNotFoundError: It holds no checkpoint.
      ConfigError: The weights are those of another decoder.
      CheckpointError: Checkpoints exist but none is intact.
    """
    definition = define(lambda: nn.Decoder(config, rngs=nnx.Rngs(0)))
    host = jax.sharding.SingleDeviceSharding(jax.local_devices(backend="cpu")[0])
    abstract = {
        name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=host)
        for name, x in definition.abstract.items()
    }
    try:
        return restore_params(workdir, abstract)
    except ValueError as error:
        raise ConfigError(str(error)) from error


def trained_context(workdir: str | os.PathLike, config: ml_collections.ConfigDict) -> int:
    """Tokens in a row that the weights have seen, in this run or where it started from."""
    lengths = [config.data.seq_len]
    origin = imported_from(workdir)
    if origin:
        lengths.append(origin["context_length"])
    # What a run started from may be gone.
    if config.init_from and (Path(config.init_from) / "config.json").is_file():
        lengths.append(trained_context(config.init_from, load_config(config.init_from)))
    return max(lengths)


def tokenizer_files(
    workdir: str | os.PathLike, config: ml_collections.ConfigDict, tokenizer: Tokenizer
) -> dict[str, bytes]:
    """Contents, by name, of the files of a Hugging Face tokenizer with the ids of a run's.

    Args:
      workdir: Directory of the run or import.
      config: Its configuration.
      tokenizer: Its tokenizer.
    """
    spec = config.data.tokenizer
    if spec == "bytes":
        return _byte_tokenizer(tokenizer)
    if spec.startswith("bpe:"):
        path = corpus_directory(workdir, config) / TRAINED_TOKENIZER
        vocab = tokenizers.Tokenizer.from_file(str(path))
        names = (vocab.id_to_token(tokenizer.bos_id), vocab.id_to_token(tokenizer.eos_id))
        return {"tokenizer.json": path.read_bytes(), **_tokenizer_config(*names)}
    directory = Path(spec).expanduser().parent
    files = {
        name: (directory / name).read_bytes()
        for name in TOKENIZER_FILES
        if (directory / name).is_file()
    }
    return files | {"tokenizer.json": Path(spec).expanduser().read_bytes()}


def _byte_tokenizer(tokenizer: Tokenizer) -> dict[str, bytes]:
    """Bytes as a BPE without merges, in the characters with which byte-level BPE writes them."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    characters = {byte: chr(byte) for byte in printable}
    characters |= {byte: chr(256 + i) for i, byte in enumerate(others)}
    names = ("<|bos|>", "<|eos|>")
    vocab = {character: byte for byte, character in characters.items()}
    vocab |= dict(zip(names, (tokenizer.bos_id, tokenizer.eos_id), strict=True))
    result = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=[]))
    result.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    result.decoder = decoders.ByteLevel()
    result.add_special_tokens(list(names))
    return {"tokenizer.json": result.to_str().encode(), **_tokenizer_config(*names)}


def _tokenizer_config(bos: str, eos: str) -> dict[str, bytes]:
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": bos, "eos_token": eos}
    return {"tokenizer_config.json": (json.dumps(config, indent=2) + "\n").encode()}
