"""Rows of associative recall in place of a text: endless ones to train on, some held out."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

import grain
import ml_collections
import numpy as np

from sparsek_jax.data.recall import mqar_rows
from sparsek_jax.data.tokenizer import Tokenizer, load_tokenizer

Batch = dict[str, np.ndarray]

_ENDLESS = 2**31 - 1  # what document_ids can tell apart
_TRAIN, _VALIDATION = 0, 1
_BLOCK = 16  # rows made at a time, which is faster than one by one


class RecallCorpus:
    """Rows of `mqar_rows` as `config.data.recall` describes them, in `Corpus`' place.

    A row is a function of its split, its number and, in training, the run's seed alone, so that it
    does not matter how rows are spread over batches and processes.

    Args:
      config: the data section; `recall`, `seq_len` and `tokenizer` are used.

    Attributes:
      directory: a path that exists nowhere; its name tells such corpora apart.
      description: what rows are like, for people.
      extent: how many there are, for people.
      tokenizer: that of token ids.
      validation: numbers of the rows held out.
      num_validation_bytes: 0, rows being no text.
    """

    def __init__(self, config: ml_collections.ConfigDict):
        recall = config.recall
        self.tokenizer: Tokenizer = load_tokenizer(config.tokenizer)
        self._sizes = {
            "length": config.seq_len,
            "vocab_size": self.tokenizer.vocab_size,
            **{name: recall[name] for name in recall if name != "validation_rows"},
        }
        # As of a text, the length of rows is no part of what it is.
        key = repr(sorted({**recall.to_dict(), "tokenizer": config.tokenizer}.items()))
        digest = hashlib.blake2b(key.encode(), digest_size=8).hexdigest()
        self.directory = Path(f"recall-{digest}")
        self.description = (
            f"associative recall, num_pairs={recall.num_pairs} in rows of {config.seq_len:,} tokens"
        )
        self.extent = f"endless rows; held out {recall.validation_rows:,} rows"
        self.validation = range(recall.validation_rows)
        self.num_validation_bytes = 0

    def document_name(self, document_id: int, split: str = "train") -> str:
        """Returns the name of a row."""
        return f"{split} row {document_id}"

    def train_iterator(
        self, *, batch_size: int, seed: int, process_index: int, process_count: int
    ) -> grain.DatasetIterator[Batch]:
        """See `sparsek_jax.data.train_iterator`; no row comes twice."""
        rows = grain.MapDataset.source(_Rows(self._sizes, _TRAIN, seed, _ENDLESS))
        # One thread makes rows while JAX computes.
        options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=4 * batch_size)
        mine = rows[process_index::process_count].to_iter_dataset(options)
        return iter(mine.batch(batch_size, drop_remainder=True))

    def validation_row(self, index: int) -> Batch:
        """The fields of a held-out row, each `[T]`; padding from the last row on."""
        rows = _Rows(self._sizes, _VALIDATION, 0, len(self.validation))
        if index < len(rows):
            return rows[index]
        row = {name: np.zeros_like(field) for name, field in rows[0].items()}
        return row | {"document_ids": row["document_ids"] - 1}


class RecallValidation:
    """The held-out rows in their order; see `sparsek_jax.data.ValidationBatches`."""

    def __init__(
        self, corpus: RecallCorpus, *, batch_size: int, process_index: int, process_count: int
    ):
        self._corpus, self._batch_size = corpus, batch_size
        self._start, self._stride = process_index * batch_size, batch_size * process_count

    def __len__(self) -> int:
        return -(-len(self._corpus.validation) // self._stride)

    def __iter__(self) -> Iterator[Batch]:
        """Yields batches as `ValidationBatches` does."""
        for first in range(self._start, len(self) * self._stride, self._stride):
            rows = [self._corpus.validation_row(first + i) for i in range(self._batch_size)]
            yield {name: np.stack([row[name] for row in rows]) for name in rows[0]}


class _Rows:
    """Random access to rows."""

    def __init__(self, sizes: dict[str, int | float], split: int, seed: int, count: int):
        self._sizes, self._split, self._seed, self._count = sizes, split, seed, count
        self._latest = (-1, {})  # number of a block, and its rows

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> Batch:
        number, offset = divmod(index, _BLOCK)
        latest, block = self._latest
        if number != latest:
            rng = np.random.default_rng([self._split, self._seed, number])
            block = mqar_rows(rng, batch_size=_BLOCK, **self._sizes)
            self._latest = (number, block)
        row = {name: field[offset] for name, field in block.items()}
        return row | {"document_ids": np.full(self._sizes["length"], index, np.int32)}
