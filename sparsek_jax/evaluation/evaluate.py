"""One pass over the held-out text: losses and, for SparseK layers, gates."""

from __future__ import annotations

import functools
import itertools

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from flax import nnx

from sparsek_jax.data import Corpus, validation_batches
from sparsek_jax.evaluation.gates import GateTally, LayerGates, gate_sums
from sparsek_jax.evaluation.perplexity import HeldOutLoss, LossTally, bucket_edges
from sparsek_jax.nn import Decoder
from sparsek_jax.training.loss import token_nats

# Positions per row whose logits exist at a time.
_LOSS_CHUNK = 512


def evaluate(
    model: Decoder, corpus: Corpus, config: ml_collections.ConfigDict
) -> tuple[HeldOutLoss, tuple[LayerGates, ...]]:
    """Measures a model on held-out documents.

    Args:
      model: On one device.
      corpus: Whose validation split is read.
      config: `data` (seq_len, packing) and `eval` (batch_size, batches, position_buckets).

    Returns:
      The losses, and the gates of every SparseK layer.
    """
    batches = validation_batches(corpus, config.data, batch_size=config.eval.batch_size)
    limit = config.eval.batches or len(batches)
    edges = bucket_edges(config.data.seq_len, config.eval.position_buckets)
    losses = LossTally(corpus.tokenizer.byte_lengths, edges, len(corpus.validation))
    gates = GateTally(model.config.attention)
    graphdef, params = nnx.split(model)
    packed = config.data.packing == "segments"
    for batch in itertools.islice(batches, limit):
        fields = {name: batch[name] for name in ("inputs", "targets", "positions")}
        nats, sums = _batch_sums(
            graphdef,
            params,
            fields,
            batch["segment_ids"] if packed else None,
            batch["loss_mask"],
        )
        losses.add(batch, np.asarray(nats))
        gates.add(jax.device_get(sums))
    return losses.result(), gates.result()


@functools.partial(jax.jit, static_argnums=0)
def _batch_sums(graphdef, params, batch, segment_ids, loss_mask):
    model = nnx.merge(graphdef, params)
    hidden, scores = model.hidden(
        batch["inputs"],
        positions=batch["positions"],
        segment_ids=segment_ids,
        return_scores=True,
    )
    nats, _ = token_nats(model.logits, hidden, batch["targets"], chunk_size=_LOSS_CHUNK)
    measure = functools.partial(
        gate_sums, valid=loss_mask > 0, config=model.config.attention, segment_ids=segment_ids
    )
    return nats.astype(jnp.float32), {layer: measure(score) for layer, score in scores.items()}
