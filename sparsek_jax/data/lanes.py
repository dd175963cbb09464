"""Batches whose rows go on from the rows before: for models that carry memory between them.

Every row of a batch is the next piece of a lane, a reader with documents of its own that reads one
after another to its end, whatever the length of a row. Positions count on from a document's first
token, so that a row whose first position is not 0 continues the same row of the batch before.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import Any

import grain
import ml_collections
import numpy as np

from sparsek_jax.data.config import validate_data_config
from sparsek_jax.data.corpus import Corpus
from sparsek_jax.data.pipeline import (
    STREAM,
    Batch,
    Documents,
    RowFields,
    check_shares,
    empty_row,
)


def lane_iterator(
    corpus: Corpus,
    config: ml_collections.ConfigDict,
    *,
    batch_size: int,
    seed: int,
    process_index: int = 0,
    process_count: int = 1,
) -> grain.DatasetIterator[Batch]:
    """Iterates over the training documents without end, in another order each epoch.

    Each document of an epoch goes to one lane. Lanes with longer documents are slower, so that they
    may be in different epochs. The state is small and JSON-able, and restoring it gives bitwise the
    batches that would have come.

    Args:
      corpus: the prepared corpus.
      config: the data section; `seq_len` is used.
      batch_size: rows a batch in this process, each a lane.
      seed: 0 to 2**32 - 1; fixes the order of everything.
      process_index: of this process.
      process_count: processes that share the corpus.

    Returns:
      Iterator over batches with the fields of `sparsek_jax.data.train_iterator`, of which
      `positions` count from the beginning of the document.

    Raises:
      ValueError: an argument or field is out of range.
    """
    validate_data_config(config)
    check_shares(batch_size, process_index, process_count)
    if not 0 <= seed < 2**32:
        raise ValueError(f"seed={seed}; expected an integer from 0 to 2**32 - 1")
    documents = grain.MapDataset.source(Documents(corpus, "train")).seed(seed).shuffle().repeat()
    first, num_lanes = process_index * batch_size, batch_size * process_count
    lanes = [_Lane(documents[first + i :: num_lanes]) for i in range(batch_size)]
    return _LaneIterator(lanes, config.seq_len)


class LaneValidation:
    """Every held-out token once, in lanes; may be iterated any number of times.

    Lanes are about equally long, and each reads its documents in their order; rows are padded where
    a lane has come to its end. However many processes share the lanes, they are the same.

    Args:
      corpus: the prepared corpus.
      config: the data section; `seq_len` is used.
      batch_size: rows a batch in this process, each a lane.
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
        self._documents = Documents(corpus, "validation")
        self._seq_len = config.seq_len
        self._num_lanes = batch_size * process_count
        self._mine = slice(process_index * batch_size, (process_index + 1) * batch_size)

    @property
    def longest(self) -> int:
        """Predictions of the longest document."""
        return max(self._lengths)

    def __len__(self) -> int:
        longest = max(sum(self._lengths[i] for i in lane) for lane in self._shares)
        return -(-longest // self._seq_len)

    def __iter__(self) -> Iterator[Batch]:
        """Yields batches as described at `lane_iterator`, with ids into `corpus.validation`."""
        lanes = [_Lane(_Some(self._documents, share)) for share in self._shares[self._mine]]
        for _ in range(len(self)):
            yield _batch(lanes, self._seq_len)

    @functools.cached_property
    def _lengths(self) -> list[int]:
        return [len(self._documents[i][STREAM]) for i in range(len(self._documents))]

    @functools.cached_property
    def _shares(self) -> list[list[int]]:
        """The documents of every lane: the longest first to the lane that has least so far."""
        shares, sizes = [[] for _ in range(self._num_lanes)], np.zeros(self._num_lanes, np.int64)
        for i in sorted(range(len(self._lengths)), key=lambda i: -self._lengths[i]):
            lane = int(np.argmin(sizes))
            shares[lane].append(i)
            sizes[lane] += self._lengths[i]
        return [sorted(share) for share in shares]


def without_past(batch: Batch) -> Batch:
    """The same rows for a model without memory: what a document holds before a row does not count.

    Positions count from the document's first token in the row.
    """
    before = np.where(batch["segment_ids"] == 1, batch["positions"][:, :1], 0)
    return batch | {"positions": batch["positions"] - before}


class _Some:
    """Some of all documents."""

    def __init__(self, documents: Documents, indices: Sequence[int]):
        self._documents, self._indices = documents, indices

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        return self._documents[self._indices[index]]


class _Lane:
    """Reads documents one after another.

    Attributes:
      place: Number of the document that is being read, and how much of it was.
    """

    def __init__(self, documents: Any):
        self._documents = documents
        self.place = (0, 0)
        self._open = (-1, None)  # A document, which may be long, is fetched once.

    def read(self, size: int) -> Batch:
        """Returns the next row, padded where there are no more documents."""
        row = empty_row(size)
        filled = segment = 0
        while filled < size and self.place[0] < len(self._documents):
            number, offset = self.place
            if self._open[0] != number:
                self._open = (number, self._documents[number][STREAM])
            columns = self._open[1]
            part = columns[offset : offset + size - filled]
            segment += 1
            stop = filled + len(part)
            row[STREAM][filled:stop] = part
            row[f"{STREAM}_segment_ids"][filled:stop] = segment
            row[f"{STREAM}_positions"][filled:stop] = np.arange(offset, offset + len(part))
            filled, offset = stop, offset + len(part)
            self.place = (number, offset) if offset < len(columns) else (number + 1, 0)
        return RowFields("segments")(row)


class _LaneIterator(grain.DatasetIterator):
    def __init__(self, lanes: Sequence[_Lane], seq_len: int):
        super().__init__()
        self._lanes, self._seq_len = lanes, seq_len

    def __next__(self) -> Batch:
        return _batch(self._lanes, self._seq_len)

    def get_state(self) -> dict[str, Any]:
        return {"places": [list(lane.place) for lane in self._lanes]}

    def set_state(self, state: dict[str, Any]) -> None:
        for lane, place in zip(self._lanes, state["places"], strict=True):
            lane.place = tuple(place)


def _batch(lanes: Sequence[_Lane], seq_len: int) -> Batch:
    rows = [lane.read(seq_len) for lane in lanes]
    return {field: np.stack([row[field] for row in rows]) for field in rows[0]}
