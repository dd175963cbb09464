"""The `config.data` section: fields, defaults and checks."""

from __future__ import annotations

import operator
import re
from pathlib import Path

import ml_collections

from sparsek_jax.data.recall import check_mqar

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
    # "bytes", "bpe:<vocab_size>" (trained on the training split), a Hugging Face tokenizer.json, or
    # of data.recall "ids:<vocab_size>".
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
    # Rows of associative recall instead of text; sparsek_jax.data.recall says what the fields are.
    config.recall = ml_collections.ConfigDict()
    config.recall.num_pairs = 0  # 0: text
    config.recall.power = 1.0
    config.recall.spread = 0
    config.recall.gap = 0
    config.recall.num_fillers = 0
    config.recall.validation_rows = 256
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
    _validate_recall(config)


def _validate_recall(config: ml_collections.ConfigDict) -> None:
    recall, has_ids = config.recall, config.tokenizer.startswith("ids:")
    if not recall.num_pairs:
        if has_ids:
            raise ValueError(
                f"data.tokenizer={config.tokenizer!r} with data.recall.num_pairs=0; expected a "
                "tokenizer of text, or pairs to recall"
            )
        return
    if config.glob or config.tfds:
        name = "glob" if config.glob else "tfds"
        raise ValueError(
            f"data.recall.num_pairs={recall.num_pairs} and data.{name}={config[name]!r} are both "
            "set; expected one of them"
        )
    if not has_ids:
        raise ValueError(
            f"data.tokenizer={config.tokenizer!r} with data.recall.num_pairs={recall.num_pairs}; "
            "expected 'ids:<vocab_size>', since what is recalled is no text"
        )
    for name, minimum in (("num_pairs", 1), ("spread", 0), ("gap", 0), ("num_fillers", 0)):
        _check_integer(config, f"recall.{name}", minimum)
    _check_integer(config, "recall.validation_rows", 1)
    sizes = {name: recall[name] for name in recall if name != "validation_rows"}
    vocab_size = int(config.tokenizer.removeprefix("ids:"))
    try:
        check_mqar(batch_size=1, length=config.seq_len, vocab_size=vocab_size, **sizes)
    except ValueError as error:
        raise ValueError(f"data.recall: {error}") from error


def validate_tokenizer_spec(spec: str) -> None:
    """Checks that `spec` is "bytes", "bpe:<n>", "ids:<n>" or the path of an existing file.

    Raises:
      ValueError: it is none of them; the message names data.tokenizer.
    """
    if spec == "bytes":
        return
    if spec.startswith("ids:"):
        if not re.fullmatch(r"ids:[1-9]\d*", spec):
            raise ValueError(f"data.tokenizer={spec!r}; expected 'ids:<vocab_size>'")
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
            f"data.tokenizer={spec!r}; expected 'bytes', 'bpe:<vocab_size>', 'ids:<vocab_size>' or "
            "the path of an existing tokenizer.json"
        )


def _check_integer(config: ml_collections.ConfigDict, field: str, minimum: int) -> None:
    value = operator.attrgetter(field)(config)
    if not isinstance(value, int) or isinstance(value, bool) or value < minimum:
        raise ValueError(f"data.{field}={value!r}; expected an integer >= {minimum}")


def _check_set(config: ml_collections.ConfigDict, field: str, expected: str) -> None:
    if not config[field]:
        raise ValueError(f"data.{field}={config[field]!r}; expected {expected}")
