"""Text corpora: prepared once, packed into rows, iterated deterministically.

    corpus = prepare(config.data)                                          # -> Corpus
    train = train_iterator(corpus, config.data, batch_size=8, seed=0)      # endless, checkpointable
    held_out = validation_batches(corpus, config.data, batch_size=8)       # len(), re-iterable

A batch is a dict of NumPy arrays, each [batch_size, seq_len]: inputs, targets, positions,
segment_ids, document_ids (int32) and loss_mask (float32).
"""

from sparsek_jax.data.config import default_data_config, validate_data_config
from sparsek_jax.data.corpus import Corpus, SplitStats, prepare
from sparsek_jax.data.pipeline import ValidationBatches, train_iterator, validation_batches
from sparsek_jax.data.tokenizer import Tokenizer, load_tokenizer

__all__ = [
    "Corpus",
    "SplitStats",
    "Tokenizer",
    "ValidationBatches",
    "default_data_config",
    "load_tokenizer",
    "prepare",
    "train_iterator",
    "validate_data_config",
    "validation_batches",
]
