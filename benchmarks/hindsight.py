r"""What a selection of k keys could keep at best, that knows what will be asked for.

    python -m benchmarks.hindsight --workdir=runs/dense --num_selected=512 --sliding_window=512 \
        --tokens=16384 FILE [FILE ...]

The model, trained with dense attention, reads every text as in `benchmarks.text_nats`, and in every
layer each KV head attends to its window and to k keys beyond it, which are

- "query": for every query those that it attends to most. It has to remember every key.
- "foresight": for every 128 queries those that they and all later ones will attend to most, as if
  what has been forgotten could return.
- "hindsight": those with the highest scores, each key having one score for the whole text: the
  importance that calibration (`sparsek_jax.pretrained.scorer_start`) has scorers predict from the
  hidden state, here computed from the attention to come. What SparseK could do with a scorer that
  predicts perfectly what calibrated ones try to.

What SparseK loses beyond "hindsight" it loses because scorers cannot know; what "hindsight" loses
beyond "query", because one selection has to serve all queries to come. Bounds these are not: the
keys that get most attention need not be those that help most.
"""

import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags
from flax import nnx

from benchmarks.text_nats import file_nats
from sparsek_jax.generation.loading import load_run
from sparsek_jax.nn.scorer import keep_sinks
from sparsek_jax.ops import sparsek_attention
from sparsek_jax.pretrained.scorer_start import (
    RATES,
    far_attention,
    log_importance,
    selection_divergence,
)
from sparsek_jax.training.workdir import write_json

_NUM_SELECTED = flags.DEFINE_integer("num_selected", 512, "k.", lower_bound=1)
_WINDOW = flags.DEFINE_integer("sliding_window", 512, "w.", lower_bound=0)
_SELECTIONS = ("dense", "query", "foresight", "hindsight")
_SELECT = flags.DEFINE_list("select", list(_SELECTIONS), "Some of these, the first one always.")
_SINKS = flags.DEFINE_integer("num_sinks", 4, "Of hindsight, always among the k.", lower_bound=0)
# Queries that attend at a time.
_CHUNK = 128
# Halvings of the interval of logarithms in which the k-th largest attention of a query lies.
_HALVINGS = 24
_LEAST_LOG2 = -40.0


def kept_by_query(far, later, num_selected):
    """Which keys each query keeps: those that it attends to most.

    Args:
      far: Attention beyond the window, a mean over the query heads of a KV head, `[K, C, T]`.
      later: Not used.
      num_selected: k.

    Returns:
      At most k of each query, `[K, C, T]`.
    """
    del later
    logs = jnp.log2(far)

    def halve(_, interval):
        low, high = interval
        middle = (low + high) / 2
        many = (logs > middle).sum(-1, keepdims=True) > num_selected
        return jnp.where(many, middle, low), jnp.where(many, high, middle)

    ends = jnp.full((*far.shape[:2], 1), _LEAST_LOG2), jnp.zeros((*far.shape[:2], 1))
    return logs > jax.lax.fori_loop(0, _HALVINGS, halve, ends)[1]


def kept_by_foresight(far, later, num_selected):
    """Which keys a chunk of queries keeps: those that get most from it and all later queries.

    Args:
      far: As for `kept_by_query`.
      later: What every key gets of this chunk's queries and later ones, `[K, T]`.
      num_selected: k.

    Returns:
      The same k of all the queries, `[K, 1, T]`, some of them in the window of some query.
    """
    # Keys that are still in the window of all these queries cannot be selected yet.
    found = jnp.where((far > 0).any(1), later, 0.0)
    least = jax.lax.top_k(found, min(num_selected, found.shape[-1]))[0][:, -1:]
    return (found >= jnp.maximum(least, jnp.finfo(found.dtype).tiny))[:, None]


def kept_attention(query, key, value, kept, *, num_selected, sliding_window):
    """Attention to the window and the keys that `kept` chooses, of one row.

    Args:
      query: `[T, N, H]`.
      key: `[T, K, H]`.
      value: `[T, K, H]`.
      kept: `kept_by_query` or `kept_by_foresight`.
      num_selected: k.
      sliding_window: w.

    Returns:
      `[T, N, H]`, of the values' dtype.
    """
    length, num_heads, head_dim = query.shape
    padded = jnp.pad(query, ((0, -length % _CHUNK), (0, 0), (0, 0)))
    chunks = padded.reshape(-1, _CHUNK, key.shape[1], num_heads // key.shape[1], head_dim)
    positions = jnp.arange(len(padded)).reshape(-1, _CHUNK)

    def attention(query, position):
        logits = jnp.einsum("tkgh,skh->kgts", query, key, preferred_element_type=jnp.float32)
        distance = position[:, None] - jnp.arange(length)
        weights = jax.nn.softmax(
            jnp.where(distance >= 0, logits * head_dim**-0.5, -jnp.inf), axis=-1
        )
        return jnp.where((position < length)[:, None], weights, 0.0), distance >= sliding_window

    def gets(inputs):
        weights, is_far = attention(*inputs)
        return jnp.where(is_far, weights, 0.0).sum(2).mean(1)

    def attend(inputs):
        query, position, later = inputs
        weights, is_far = attention(query, position)
        far = jnp.where(is_far, weights, 0.0).mean(1)
        chosen = kept(far, later, num_selected)
        weights = jnp.where(is_far & ~chosen[:, None], 0.0, weights)
        weights /= jnp.maximum(weights.sum(-1, keepdims=True), jnp.finfo(jnp.float32).tiny)
        return jnp.einsum("kgts,skh->tkgh", weights.astype(value.dtype), value)

    by_chunk = jax.lax.map(gets, (chunks, positions))
    later = jnp.cumsum(by_chunk[::-1], axis=0)[::-1]
    out = jax.lax.map(attend, (chunks, positions, later))
    return out.reshape(-1, num_heads, head_dim)[:length]


def hindsight_scores(query, key, *, num_selected, sliding_window, num_sinks):
    """The scores that calibration would like to predict, of one row.

    Args:
      query: Rotated, `[T, N, H]`.
      key: Rotated, `[T, K, H]`.
      num_selected: k.
      sliding_window: w.
      num_sinks: First tokens with the highest scores.

    Returns:
      For each KV head those of the rate of forgetting with which attention changes least,
      `[1, T, K]`.
    """
    rates = np.array(RATES) / num_selected
    mass = far_attention(query, key, sliding_window=sliding_window)
    positions = jnp.arange(len(key))
    scores = log_importance(mass, rates, sliding_window=sliding_window)
    scores += (rates[:, None] * positions[:, None, None]).astype(jnp.float32)
    flat = keep_sinks(scores.reshape(1, len(key), -1), positions[None], num_sinks)
    scores = flat.reshape(scores.shape)
    lost = selection_divergence(
        query, key, scores, num_selected=num_selected, sliding_window=sliding_window
    )
    best = lost.argmin(axis=0)
    return jnp.take_along_axis(scores, best[None, None], axis=1)[:, 0][None]


def _mix_kept(kept, budget, x, query, key, value, segment_ids, sharding, layer):
    del x, segment_ids, sharding, layer
    return kept_attention(query[0], key[0], value[0], kept, **budget)[None], None


def _mix_hindsight(budget, num_sinks, x, query, key, value, segment_ids, sharding, layer):
    del x, segment_ids, sharding, layer
    in_float32 = (heads[0].astype(jnp.float32) for heads in (query, key))
    scores = hindsight_scores(*in_float32, num_sinks=num_sinks, **budget)
    out = sparsek_attention(query, key, value, scores, gating="straight_through", **budget)
    return out, None


def main(arguments):
    """Prints the table."""
    config = load_run(flags.FLAGS.workdir).model.config
    kinds = {config.attention.layer_kind(i) for i in range(config.num_layers)}
    if kinds != {"dense"}:
        raise app.UsageError(
            f"--workdir={flags.FLAGS.workdir} has attention of {sorted(kinds)}; expected dense"
        )
    if unknown := set(_SELECT.value).difference(_SELECTIONS):
        raise app.UsageError(f"--select has {sorted(unknown)}; expected some of {_SELECTIONS}")
    budget = {"num_selected": _NUM_SELECTED.value, "sliding_window": _WINDOW.value}
    selections = {
        "dense": None,
        "query": functools.partial(_mix_kept, kept_by_query, budget),
        "foresight": functools.partial(_mix_kept, kept_by_foresight, budget),
        "hindsight": functools.partial(_mix_hindsight, budget, _SINKS.value),
    }
    length, pieces = flags.FLAGS.tokens, flags.FLAGS.pieces
    paths = [pathlib.Path(path) for path in arguments[1:]]
    kinds = list(dict.fromkeys(path.parent for path in paths))
    header = "| keys | " + " | ".join(kind.name for kind in kinds) + " | mean | over dense |"
    print(f"{header}\n|{' --- |' * (len(kinds) + 3)}", flush=True)
    record = {}
    for name in dict.fromkeys(("dense", *_SELECT.value)):
        mix = selections[name]
        run = load_run(flags.FLAGS.workdir)
        if mix is not None:
            for block in run.model.layers:
                block.attention.mix = mix
        model = nnx.split(run.model)
        record[name] = {}
        for path in paths:
            tokens = run.tokenizer.encode(path.read_text("utf-8", "replace"))
            whole = min(pieces, len(tokens) // length)
            nats = [file_nats(*model, tokens[i * length :][:length]) for i in range(whole)]
            record[name][str(path)] = [float(piece.mean()) for piece in nats]
        by_kind = [
            np.mean([x for path in paths if path.parent == kind for x in record[name][str(path)]])
            for kind in kinds
        ]
        mean = np.mean(by_kind)
        dense = mean if name == "dense" else dense
        cells = " | ".join(f"{value:.4f}" for value in (*by_kind, mean))
        print(f"| {name} | {cells} | {mean / dense - 1:+.2%} |", flush=True)
    if flags.FLAGS.to:
        write_json(pathlib.Path(flags.FLAGS.to), record)


if __name__ == "__main__":
    app.run(main)
