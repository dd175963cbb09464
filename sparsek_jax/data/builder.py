"""The TFDS builder that writes tokenized documents as array_record files.

TFDS finds a builder's code by importing its module, so it has one of its own.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator

import numpy as np
import tensorflow_datasets as tfds

from sparsek_jax.data.tokenizer import Tokenizer

_BATCH_DOCUMENTS = 64


class TokenizedDocuments(tfds.core.GeneratorBasedBuilder):
    """Documents as token ids, in source order, split into "train" and "validation".

    The number of documents, tokens (without bos and eos) and UTF-8 bytes of each split is kept in
    the dataset's metadata.

    Args:
      documents: maps a split's name to its (name, UTF-8 content) pairs.
      tokenizer: encodes them.
      **kwargs: for the TFDS base class.
    """

    VERSION = tfds.core.Version("1.0.0")
    # No downloads, no checksums: TFDS would look for a file of them, and to do so import
    # importlib_resources, which it does not declare (4.9.10).
    url_infos = None

    def __init__(
        self,
        *,
        documents: Callable[[str], Iterator[tuple[str, bytes]]],
        tokenizer: Tokenizer,
        **kwargs,
    ):
        self._documents = documents
        self._tokenizer = tokenizer
        self._dtype = np.uint16 if tokenizer.vocab_size <= 2**16 else np.int32
        super().__init__(**kwargs)

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            features=tfds.features.FeaturesDict(
                {
                    "name": tfds.features.Text(),
                    "tokens": tfds.features.Tensor(
                        shape=(None,), dtype=self._dtype, encoding="bytes"
                    ),
                }
            ),
            disable_shuffling=True,
            metadata=tfds.core.MetadataDict(),
        )

    def _split_generators(self, dl_manager):
        del dl_manager  # nothing to download
        return {split: self._generate_examples(split) for split in ("train", "validation")}

    def _generate_examples(self, split: str):
        counts = {"num_documents": 0, "num_tokens": 0, "num_bytes": 0}
        for batch in itertools.batched(self._documents(split), _BATCH_DOCUMENTS):
            encoded = self._tokenizer.encode_batch([content.decode() for _, content in batch])
            for (name, content), tokens in zip(batch, encoded, strict=True):
                yield counts["num_documents"], {"name": name, "tokens": tokens.astype(self._dtype)}
                counts["num_documents"] += 1
                counts["num_tokens"] += len(tokens)
                counts["num_bytes"] += len(content)
        self.info.metadata[split] = counts
