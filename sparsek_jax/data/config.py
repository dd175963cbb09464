"""The `config.data` section: fields, defaults and checks."""

from __future__ import annotations

import re
from pathlib import Path

import ml_collections

PACKINGS = ("segments", "continuous")
MIN_BPE_VOCAB = 258  # 256 bytes, <|bos|> and <|eos|>


def default_data_config() -> ml_collections.ConfigDict:
    """Returns every field of `config.data` with its default value.

    The corpus is the running Python's standard library unless `glob` or `tfds` is set.
    """
    config = ml_collections.ConfigDict()
    # Local text files, one document each; "**" is recursive: "~/books/**/*.txt".
    config.glob = ""
    # A TensorFlow Datasets name, "name/config:version", or the directory of a prepared dataset.
    config.tfds = ""
    config.tfds_split = "train"
    config.tfds_text_field = "text"
    config.tfds_data_dir = ""  # "": TFDS' own default ($TFDS_DATA_DIR or ~/tensorflow_datasets)
    # Where prepared corpora are kept, each in a directory named by a hash of its content.
    config.root = "~/.cache/sparsek_jax"
    # "bytes", "bpe:<vocab_size>" (trained on the training split), or a Hugging Face tokenizer.json.
    config.tokenizer = "bytes"
    # Tokens in a row of a batch.
    config.seq_len = 1024
    # Documents are concatenated and the stream is cut every seq_len tokens, so rows are full.
    # "segments": a document attends only to itself; segment ids and positions start anew with each
    # document and each row. "continuous": a row is one segment, attending across documents.
    config.packing = "segments"
    # Expected share of whole documents held out for validation, chosen by a hash of their content.
    config.validation_fraction = 0.05
    # Use only the first documents, in name order; 0 = all.
    config.max_documents = 0
    # Rows shuffled together before batching (1 = off). Documents are shuffled in any case.
    config.shuffle_window = 256
    return config


def validate_data_config(config: ml_collections.ConfigDict) -> None:
    """Checks the fields of `config.data`; reads no text and writes nothing.

    Raises:
      ValueError: a field is impossible; the message names it, its value and what was expected.
    """
    if config.glob and config.tfds:
        raise ValueError(
            f"data.glob={config.glob!r} and data.tfds={config.tfds!r} are both set; "
            "expected at most one of them"
        )
    _check_set(config, "root", "a directory")
    if config.tfds:
        _check_set(config, "tfds_split", "a split such as 'train'")
        _check_set(config, "tfds_text_field", "the name of a text feature")
    _check_integer(config, "seq_len", 1)
    _check_integer(config, "max_documents", 0)
    _check_integer(config, "shuffle_window", 1)
    if config.packing not in PACKINGS:
        raise ValueError(f"data.packing={config.packing!r}; expected one of {', '.join(PACKINGS)}")
    if not 0.0 < config.validation_fraction < 1.0:
        raise ValueError(
            f"data.validation_fraction={config.validation_fraction!r}; "
            "expected a number above 0 and below 1"
        )
    validate_tokenizer_spec(config.tokenizer)


def validate_tokenizer_spec(spec: str) -> None:
    """Checks that `spec` is "bytes", "bpe:<vocab_size>" or the path of an existing file.

    Raises:
      ValueError: it is none of them; the message names data.tokenizer.
    """
    if spec == "bytes":
        return
    if spec.startswith("bpe:"):
        if not re.fullmatch(r"bpe:\d+", spec) or int(spec[4:]) < MIN_BPE_VOCAB:
            raise ValueError(
                f"data.tokenizer={spec!r}; expected 'bpe:<vocab_size>' with a vocab_size of "
                f"at least {MIN_BPE_VOCAB}"
            )
        return
    if not spec or not Path(spec).expanduser().is_file():
        raise ValueError(
            f"data.tokenizer={spec!r}; expected 'bytes', 'bpe:<vocab_size>' or the path of an "
            "existing tokenizer.json"
        )


def _check_integer(config: ml_collections.ConfigDict, field: str, minimum: int) -> None:
    value = config[field]
    if not isinstance(value, int) or isinstance(value, bool) or value < minimum:
        raise ValueError(f"data.{field}={value!r}; expected an integer >= {minimum}")


def _check_set(config: ml_collections.ConfigDict, field: str, expected: str) -> None:
    if not config[field]:
        raise ValueError(f"data.{field}={config[field]!r}; expected {expected}")
