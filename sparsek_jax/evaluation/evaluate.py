"""Evaluates a trained run on its held-out documents."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import os
from collections.abc import Collection, Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_collections
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from jaxtyping import Array, Float32
from rich.progress import track

from sparsek_jax.data import Corpus, prepare, validation_batches
from sparsek_jax.data.lanes import LaneValidation, without_past
from sparsek_jax.data.tokenizer import TRAINED_TOKENIZER
from sparsek_jax.evaluation.gates import GateTally, LayerGates, gate_sums
from sparsek_jax.evaluation.perplexity import HeldOutLoss, LossTally, bucket_edges
from sparsek_jax.evaluation.settings import Settings, evaluation_settings
from sparsek_jax.nn import AttentionConfig
from sparsek_jax.training.checkpoint import restore_model
from sparsek_jax.training.config import (
    ConfigError,
    check_lanes,
    decoder_config,
    validate_recurrence,
)
from sparsek_jax.training.loss import LOSS_FIELDS, TokenLoss, hidden_states, token_loss
from sparsek_jax.training.recurrence import Past, no_past, resumed_states
from sparsek_jax.training.workdir import check_same_corpus, load_config


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """Everything that was found out about a run.

    Attributes:
      workdir: The run's directory.
      step: Of the checkpoint.
      label: Name of this evaluation among those of the run: the attention, and what else differs
        from training.
      notes: What differs from training, one sentence each.
      corpus: What the text is.
      attention: The attention that was evaluated.
      config: All fields that were evaluated with.
      loss: On the held-out text.
      gates: Of the SparseK layers.
    """

    workdir: Path
    step: int
    label: str
    notes: tuple[str, ...]
    corpus: str
    attention: AttentionConfig
    config: ml_collections.ConfigDict
    loss: HeldOutLoss
    gates: tuple[LayerGates, ...]


def evaluate(
    config: ml_collections.ConfigDict,
    workdir: str | os.PathLike,
    *,
    overrides: Collection[str] = (),
    step: int | None = None,
) -> Evaluation:
    """Evaluates a checkpoint of a run; writes nothing.

    Rows of a batch are spread over as many local devices as divide `eval.batch_size`.

    Args:
      config: The recipe with the command line's overrides; see `evaluation_settings`.
      workdir: The run's directory.
      overrides: Fields given on the command line.
      step: The checkpoint; None for the newest that is intact.

    Returns:
      Held-out loss and gate diagnostics.

    Raises:
      ConfigError: A field is impossible or contradicts the run.
      FileNotFoundError: The directory holds no run or no checkpoint.
      CheckpointError: No checkpoint is intact.
    """
    settings = evaluation_settings(config, load_config(workdir), overrides)
    config = settings.config
    recurrent, in_lanes = config.train.recurrent, config.train.recurrent or config.eval.by_document
    validate_recurrence(config)
    if config.eval.by_document:
        check_lanes(config, "eval.by_document")
    try:
        corpus = _open_corpus(settings, load_config(workdir))
        if not settings.new_corpus:
            check_same_corpus(corpus, Path(workdir))
        model_config = decoder_config(config, corpus.tokenizer.vocab_size)
        model, step = restore_model(workdir, model_config, step=step)
        hold_out = LaneValidation if in_lanes else validation_batches
        batches = hold_out(corpus, config.data, batch_size=config.eval.batch_size)
    except ValueError as error:
        raise ConfigError(str(error)) from error

    rows = row_sharding(config.eval.batch_size)
    graphdef, params = nnx.split(model)
    params = jax.device_put(params, NamedSharding(rows.mesh, PartitionSpec()))
    measure = jax.jit(
        functools.partial(
            _measure,
            graphdef,
            packing=config.data.packing,
            rows=rows,
            loss_chunk=max(1, config.train.loss_chunk * rows.num_devices // config.eval.batch_size),
        )
    )

    past = None
    if recurrent:
        past = jax.device_put(no_past(model, config.eval.batch_size), rows)
    edges = bucket_edges(
        batches.longest if in_lanes else config.data.seq_len,
        config.eval.position_buckets,
        config.eval.position_edges,
    )
    loss = LossTally(corpus.tokenizer.byte_lengths, edges, len(corpus.validation))
    gates = GateTally(model_config.attention)
    count = min(len(batches), config.eval.batches or len(batches))
    notes = settings.notes()
    if count < len(batches):
        notes.append(f"eval.batches={count}: only the first of {len(batches):,} batches were read.")
        if not corpus.tokenizer.exact_bytes:
            notes.append("Bytes are estimated: this tokenizer does not keep every byte of a text.")
    if recurrent:
        notes.append("Rows went on from the rows before; scorers are judged in rows alone.")
    for batch in track(itertools.islice(batches, count), "Evaluating", total=count, transient=True):
        # What a model without memory sees of a document begins with the row.
        seen = without_past(batch) if in_lanes and not recurrent else batch
        arrays = jax.device_put({name: seen[name] for name in LOSS_FIELDS}, rows)
        (token_losses, sums), past = measure(params, past, arrays)
        token_losses, sums = jax.device_get((token_losses, sums))
        loss.add(batch, token_losses.nats, token_losses.likeliest)
        gates.add(sums)

    return Evaluation(
        workdir=Path(workdir),
        step=step,
        label=settings.label(corpus.directory.name),
        notes=tuple(notes),
        corpus=corpus.description,
        attention=model_config.attention,
        config=config,
        loss=loss.result(corpus.num_validation_bytes if count == len(batches) else None),
        gates=gates.result(),
    )


def row_sharding(batch_size: int) -> NamedSharding:
    """Rows of a batch over as many local devices as divide their number."""
    devices = math.gcd(batch_size, jax.local_device_count())
    mesh = jax.make_mesh(
        (devices,), ("data",), axis_types=(AxisType.Auto,), devices=jax.local_devices()[:devices]
    )
    return NamedSharding(mesh, PartitionSpec("data"))


def _open_corpus(settings: Settings, saved: ml_collections.ConfigDict) -> Corpus:
    data = settings.config.data
    if settings.new_source and saved.data.tokenizer.startswith("bpe:"):
        # A tokenizer trained on the new text would give the ids another meaning.
        trained_on = prepare(saved.data)
        data.tokenizer = str(trained_on.directory / TRAINED_TOKENIZER)
    return prepare(data)


def _measure(
    graphdef: nnx.GraphDef,
    params: nnx.State,
    past: Past | None,
    batch: Mapping[str, Array],
    *,
    packing: str,
    rows: NamedSharding,
    loss_chunk: int,
) -> tuple[tuple[TokenLoss, dict[int, dict[str, Float32[Array, " K"]]]], Past | None]:
    """Losses of every target, the sums of every SparseK layer's gates, and the next past.

    There are no sums where rows go on from the rows before, whose keys they would have to count.
    """
    model = nnx.merge(graphdef, params)
    if past is None:
        hidden, scores = hidden_states(
            model, batch, packing=packing, sharding=rows, return_scores=True
        )
    else:
        past, hidden, _ = resumed_states(model, past, batch, sharding=rows)
        scores = {}
    loss = token_loss(model.output_table, hidden, batch["targets"], chunk_size=loss_chunk)
    if not scores:
        return (loss, {}), past
    sums_of_layer = functools.partial(
        gate_sums,
        valid=batch["loss_mask"] > 0,
        config=model.config.attention,
        segment_ids=batch["segment_ids"] if packing == "segments" else None,
    )
    # In a loop, as a selection takes long to compile.
    sums = jax.lax.map(sums_of_layer, jnp.stack(list(scores.values())))
    sums = {layer: jax.tree.map(lambda x, i=i: x[i], sums) for i, layer in enumerate(scores)}
    return (loss, sums), past
