"""Grain pipelines from a prepared corpus to batches of packed rows.

Each document d of n tokens enters the stream as n + 1 predictions, bos d0 .. d(n-1) -> d0 .. d(n-1)
eos, and the stream is cut every seq_len predictions, so that each token of each document is
predicted exactly once an epoch, whatever the packing.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from typing import Any

import grain
import ml_collections
import numpy as np
from grain import experimental as grain_experimental
from jaxtyping import Int32

from sparsek_jax.data.config import validate_data_config
from sparsek_jax.data.corpus import Corpus, Split
from sparsek_jax.data.recall_corpus import RecallCorpus, RecallValidation

Batch = dict[str, np.ndarray]

STREAM = "stream"


def train_iterator(
    corpus: Corpus | RecallCorpus,
    config: ml_collections.ConfigDict,
    *,
    batch_size: int,
    seed: int,
    process_index: int = 0,
    process_count: int = 1,
) -> grain.DatasetIterator[Batch]:
    """Iterates over the training documents without end, in another order each epoch.

    In an epoch each document goes to exactly one process. The state (`get_state`, `set_state`, or
    `grain.checkpoint.CheckpointSave` and `CheckpointRestore` in orbax) is small and JSON-able, and
    restoring it gives bitwise the batches that would have come, provided that the corpus and all
    arguments are the same.

    Args:
      corpus: the prepared corpus.
      config: the data section; `seq_len`, `packing` and `shuffle_window` are used.
      batch_size: rows a batch in this process.
      seed: 0 to 2**32 - 1; fixes the order of everything.
      process_index: of this process.
      process_count: processes that share the corpus.

    Returns:
      Iterator over dicts of arrays [batch_size, seq_len]:
        inputs, targets: int32 ids; targets are the next token of the same document, eos at its end.
        positions: int32, counted from the segment's start in the row.
        segment_ids: int32, from 1 in each row; 0 is padding, which training rows never have.
        document_ids: int32 index into `corpus.train`, -1 on padding; see `Corpus.document_name`.
        loss_mask: float32, 1 except on padding.

    Raises:
      ValueError: an argument or field is out of range.
    """
    validate_data_config(config)
    check_shares(batch_size, process_index, process_count)
    if not 0 <= seed < 2**32:
        raise ValueError(f"seed={seed}; expected an integer from 0 to 2**32 - 1")
    if isinstance(corpus, RecallCorpus):
        return corpus.train_iterator(
            batch_size=batch_size,
            seed=seed,
            process_index=process_index,
            process_count=process_count,
        )
    documents = grain.MapDataset.source(Documents(corpus, "train")).seed(seed).shuffle().repeat()
    rows = _pack(documents[process_index::process_count], config.seq_len)
    if config.shuffle_window > 1:
        window_seed = np.random.SeedSequence([seed, process_index]).generate_state(1)[0] // 2
        rows = grain_experimental.WindowShuffleIterDataset(
            rows, window_size=config.shuffle_window, seed=int(window_seed)
        )
    batches = rows.map(RowFields(config.packing)).batch(batch_size, drop_remainder=True)
    return iter(batches)


class ValidationBatches:
    """Every held-out token once, in a fixed order; may be iterated any number of times.

    The j-th batches of all processes together are the rows that a single process with the joint
    batch size would see, and each process has the same number of batches: rows that are missing at
    the end are padding throughout.

    Args:
      corpus: the prepared corpus.
      config: the data section; `seq_len` and `packing` are used.
      batch_size: rows a batch in this process.
      process_index: of this process.
      process_count: processes that share the corpus.

    Raises:
      ValueError: an argument or field is out of range.
    """

    def __init__(
        self,
        corpus: Corpus,
        config: ml_collections.ConfigDict,
        *,
        batch_size: int,
        process_index: int = 0,
        process_count: int = 1,
    ):
        validate_data_config(config)
        check_shares(batch_size, process_index, process_count)
        documents = grain.MapDataset.source(Documents(corpus, "validation"))
        fields = RowFields(config.packing)
        self._rows = _pack(documents, config.seq_len).map(fields)
        self._padding = fields(empty_row(config.seq_len))
        self._batch_size = batch_size
        self._process_index = process_index
        self._process_count = process_count
        stats = corpus.splits["validation"]
        predictions = stats.num_tokens + stats.num_documents
        self._num_batches = -(-predictions // (config.seq_len * batch_size * process_count))

    def __len__(self) -> int:
        return self._num_batches

    def __iter__(self) -> Iterator[Batch]:
        """Yields batches as described at `train_iterator`, with ids into `corpus.validation`."""
        rows = itertools.chain(self._rows, itertools.repeat(self._padding))
        for _ in range(self._num_batches):
            everyone = list(itertools.islice(rows, self._batch_size * self._process_count))
            start = self._process_index * self._batch_size
            mine = everyone[start : start + self._batch_size]
            yield {field: np.stack([row[field] for row in mine]) for field in self._padding}


def validation_batches(
    corpus: Corpus | RecallCorpus,
    config: ml_collections.ConfigDict,
    *,
    batch_size: int,
    process_index: int = 0,
    process_count: int = 1,
) -> ValidationBatches | RecallValidation:
    """Returns `ValidationBatches` of the arguments, or what is like it of rows to recall."""
    share = {
        "batch_size": batch_size,
        "process_index": process_index,
        "process_count": process_count,
    }
    if isinstance(corpus, RecallCorpus):
        validate_data_config(config)
        check_shares(**share)
        return RecallValidation(corpus, **share)
    return ValidationBatches(corpus, config, **share)


class Documents:
    """Random access to documents as columns (input, target, document id)."""

    def __init__(self, corpus: Corpus, split: Split):
        self._source = {"train": corpus.train, "validation": corpus.validation}[split]
        self._bos_id, self._eos_id = corpus.tokenizer.bos_id, corpus.tokenizer.eos_id

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> dict[str, Int32[np.ndarray, "n 3"]]:
        tokens = self._source[index]["tokens"]
        columns = np.empty((len(tokens) + 1, 3), np.int32)
        columns[0, 0], columns[1:, 0] = self._bos_id, tokens
        columns[:-1, 1], columns[-1, 1] = tokens, self._eos_id
        columns[:, 2] = index
        return {STREAM: columns}


class RowFields:
    """Turns a packed row into the fields of a batch."""

    def __init__(self, packing: str):
        self._packing = packing

    def __call__(self, row: Mapping[str, np.ndarray]) -> Batch:
        """Returns the fields, each `[seq_len]`, of columns, segment ids and positions."""
        columns, segment_ids = row[STREAM], row[f"{STREAM}_segment_ids"]
        positions = row[f"{STREAM}_positions"]
        valid = segment_ids > 0
        if self._packing == "continuous":
            segment_ids = valid.astype(np.int32)
            positions = np.arange(len(valid), dtype=np.int32) * segment_ids
        return {
            "inputs": columns[:, 0].copy(),
            "targets": columns[:, 1].copy(),
            "positions": positions,
            "segment_ids": segment_ids,
            "document_ids": np.where(valid, columns[:, 2], np.int32(-1)),
            "loss_mask": valid.astype(np.float32),
        }


def _pack(documents: grain.MapDataset, seq_len: int) -> grain.IterDataset:
    # No threads: a batch takes about a millisecond, and JAX computes the last step meanwhile.
    stream = documents.to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=0))
    packed = grain_experimental.ConcatThenSplitIterDataset(stream, length_struct={STREAM: seq_len})
    return _JsonRestorable(packed)


def empty_row(seq_len: int) -> dict[str, np.ndarray]:
    """A packed row of nothing but padding, for `RowFields`."""
    return {
        STREAM: np.zeros((seq_len, 3), np.int32),
        f"{STREAM}_segment_ids": np.zeros(seq_len, np.int32),
        f"{STREAM}_positions": np.zeros(seq_len, np.int32),
    }


class _JsonRestorable(grain.IterDataset):
    """Makes the state of a ConcatThenSplitIterDataset survive JSON.

    That class marks "no remainder" by comparing with a tuple, which JSON turns into a list;
    restored from a checkpoint it would lose a whole document (grain 0.2.18).
    """

    def __iter__(self) -> grain.DatasetIterator:
        return _JsonRestorableIterator(iter(self._parent))


class _JsonRestorableIterator(grain.DatasetIterator):
    def __next__(self):
        return next(self._parent)

    def get_state(self) -> dict[str, Any]:
        return self._parent.get_state()

    def set_state(self, state: dict[str, Any]) -> None:
        slices = {name: tuple(bounds) for name, bounds in state["remainder_slices"].items()}
        self._parent.set_state({**state, "remainder_slices": slices})


def check_shares(batch_size: int, process_index: int, process_count: int) -> None:
    """Raises a ValueError unless a process can have this share of the rows."""
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size}; expected at least 1")
    if not 0 <= process_index < process_count:
        raise ValueError(
            f"process_index={process_index} with process_count={process_count}; expected "
            "0 <= process_index < process_count"
        )
