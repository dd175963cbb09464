"""Prepared corpora: tokenized once into a directory named by a hash of everything that matters."""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import hashlib
import io
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Literal

import ml_collections
from absl import logging

from sparsek_jax.data.config import validate_data_config
from sparsek_jax.data.recall_corpus import RecallCorpus
from sparsek_jax.data.sources import Source, content_digest, resolve_source
from sparsek_jax.data.tokenizer import (
    TRAINED_TOKENIZER,
    Tokenizer,
    load_tokenizer,
    tokenizer_fingerprint,
    train_bpe,
)

_FORMAT = 1  # raise whenever the same source and config would be prepared differently
_MAX_BPE_TRAINING_BYTES = 32 * 2**20
_RECORDS = "records"

Split = Literal["train", "validation"]


@dataclasses.dataclass(frozen=True)
class SplitStats:
    """Size of a split; tokens without bos and eos, bytes of UTF-8."""

    num_documents: int
    num_tokens: int
    num_bytes: int


class Corpus:
    """A prepared corpus with random access to its tokenized documents.

    Attributes:
      directory: where it lies.
      description: what it was made of, for people.
      tokenizer: the tokenizer of its documents.
      train: documents to train on; `train[i]` is {"name": bytes, "tokens": integer array [n]}.
      validation: held-out documents, likewise. No text is in both.
      splits: `SplitStats` of "train" and "validation".
      extent: how much text there is, for people.
      num_validation_bytes: UTF-8 bytes of the held-out documents.
    """

    def __init__(self, directory: Path, *, description: str, tokenizer: Tokenizer):
        import tensorflow_datasets as tfds

        builder = tfds.builder_from_directory(str(directory / _RECORDS))
        self.directory = directory
        self.description = description
        self.tokenizer = tokenizer
        self.train = builder.as_data_source(split="train")
        self.validation = builder.as_data_source(split="validation")
        self.splits = {name: SplitStats(**stats) for name, stats in builder.info.metadata.items()}
        train, validation = self.splits["train"], self.splits["validation"]
        self.extent = (
            f"{train.num_documents:,} documents, {train.num_tokens:,} tokens; "
            f"held out {validation.num_tokens:,}"
        )
        self.num_validation_bytes = validation.num_bytes

    def document_name(self, document_id: int, split: Split = "train") -> str:
        """Returns the name (path or index in the source) of a batch's `document_ids` entry."""
        source = {"train": self.train, "validation": self.validation}[split]
        if not 0 <= document_id < len(source):
            raise ValueError(
                f"document_id={document_id} is not in the {split} split; expected 0 to "
                f"{len(source) - 1}"
            )
        return source[document_id]["name"].decode()


def prepare(config: ml_collections.ConfigDict) -> Corpus | RecallCorpus:
    """Opens the corpus that `config.data` describes, tokenizing it first if that is not yet done.

    The directory under `config.root` is named by a hash of the documents' names and contents, the
    tokenizer, the validation fraction and the format, so a change of any of them gives a new
    directory. It is written beside its place and renamed when complete, under a lock, so that
    processes may call this at the same time.

    Args:
      config: the data section, as of `default_data_config`.

    Returns:
      The corpus; with `config.recall.num_pairs` one that is made up row by row.

    Raises:
      ValueError: a field is impossible, the source does not exist, or it holds fewer than two
        different documents, which leaves nothing to hold out.
    """
    validate_data_config(config)
    if config.recall.num_pairs:
        return RecallCorpus(config)
    source = resolve_source(config)
    key = json.dumps(
        [
            _FORMAT,
            source.fingerprint(),
            tokenizer_fingerprint(config.tokenizer),
            config.validation_fraction,
        ]
    )
    name = f"{source.label}-{hashlib.blake2b(key.encode(), digest_size=8).hexdigest()}"
    root = Path(config.root).expanduser().absolute()
    directory = root / name
    if not directory.exists():
        try:
            root.mkdir(parents=True, exist_ok=True)
            with _locked(root / f"{name}.lock"):
                if not directory.exists():
                    _write(directory, source, config)
        except OSError as error:
            raise ValueError(
                f"data.root={config.root!r}: {error}; expected a directory to write to"
            ) from error
    return Corpus(
        directory,
        description=source.description,
        tokenizer=load_tokenizer(config.tokenizer, directory=directory),
    )


def hold_out(
    digests: Sequence[bytes], validation_fraction: float, *, description: str
) -> frozenset[bytes]:
    """Chooses the documents to validate on by the hash of their content alone.

    The choice does not depend on names, order or the other documents, so a growing corpus keeps its
    held-out documents and copies of a text stay together. If chance leaves a side empty, the
    document with the smallest hash is held out, or the one with the largest is kept.

    Args:
      digests: `content_digest` of each document.
      validation_fraction: expected share of the distinct documents that is held out, in (0, 1).
      description: the source, for the message.

    Returns:
      The digests held out: at least one, and never all.

    Raises:
      ValueError: there are fewer than two different documents.
    """
    distinct = sorted(set(digests))
    if len(distinct) < 2:
        raise ValueError(
            f"{description}: {len(digests)} document(s) of text, {len(distinct)} of them distinct; "
            "expected at least 2 distinct ones, since whole documents are held out for validation"
        )
    held_out = [d for d in distinct if _uniform(d[:8]) < validation_fraction]
    return frozenset(held_out[: len(distinct) - 1] or distinct[:1])


def _write(directory: Path, source: Source, config: ml_collections.ConfigDict) -> None:
    started = time.monotonic()
    logging.info("Preparing %s in %s", source.description, directory)
    incomplete = directory.with_name(f"{directory.name}.incomplete")
    shutil.rmtree(incomplete, ignore_errors=True)  # of a process that died holding the lock
    incomplete.mkdir()
    digests = [content_digest(content) for _, content in source.documents()]
    held_out = hold_out(digests, config.validation_fraction, description=source.description)

    def documents(split: Split) -> Iterator[tuple[str, bytes]]:
        for document in source.documents():
            if (content_digest(document[1]) in held_out) == (split == "validation"):
                yield document

    if config.tokenizer.startswith("bpe:"):
        train_bytes = sum(len(content) for _, content in documents("train"))
        train_bpe(
            _sample(documents("train"), _MAX_BPE_TRAINING_BYTES / train_bytes),
            int(config.tokenizer.removeprefix("bpe:")),
            incomplete / TRAINED_TOKENIZER,
        )
    tokenizer = load_tokenizer(config.tokenizer, directory=incomplete)
    _write_records(incomplete, documents, tokenizer)
    _sync(incomplete)
    incomplete.rename(directory)
    logging.info("Prepared %s in %.1f s", directory, time.monotonic() - started)


def _write_records(
    directory: Path,
    documents: Callable[[Split], Iterator[tuple[str, bytes]]],
    tokenizer: Tokenizer,
) -> None:
    import tensorflow_datasets as tfds

    from sparsek_jax.data.builder import TokenizedDocuments

    work = directory / "tfds"
    builder = TokenizedDocuments(documents=documents, tokenizer=tokenizer, data_dir=str(work))
    with _quiet():
        builder.download_and_prepare(
            file_format="array_record",
            download_dir=str(work / "downloads"),
            download_config=tfds.download.DownloadConfig(try_download_gcs=False),
        )
    Path(builder.data_dir).rename(directory / _RECORDS)
    shutil.rmtree(work)


def _sample(documents: Iterator[tuple[str, bytes]], share: float) -> Iterator[str]:
    for _, content in documents:
        # The first half of the hash already decides who is held out.
        if _uniform(content_digest(content)[8:]) < share:
            yield content.decode()


def _uniform(digest: bytes) -> float:
    return int.from_bytes(digest) / 2 ** (8 * len(digest))


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # released by the system if the process dies
        yield


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """TFDS prints and draws progress bars about what are details here."""
    import tensorflow_datasets as tfds

    tfds.disable_progress_bar()
    with contextlib.redirect_stdout(io.StringIO()):
        yield


def _sync(directory: Path) -> None:
    """Without this a power cut after the rename could leave empty files under the final name."""
    for path in [*directory.rglob("*"), directory]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
