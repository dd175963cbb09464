"""Text corpora: prepared once, packed into rows, iterated deterministically.

    corpus = prepare(config.data)                                          # -> Corpus
    corpus.tokenizer, corpus.document_name(7, "train"), corpus.splits["validation"].num_bytes
    train = train_iterator(corpus, config.data, batch_size=8, seed=0)      # endless, checkpointable
    held_out = validation_batches(corpus, config.data, batch_size=8)       # len(), re-iterable

A batch is a dict of NumPy arrays, each [batch_size, seq_len]: inputs, targets, positions,
segment_ids, document_ids (int32) and loss_mask (float32).
"""

from sparsek_jax.data.config import default_data_config, validate_data_config

__all__ = ["default_data_config", "validate_data_config"]
