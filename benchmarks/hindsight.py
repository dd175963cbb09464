r"""What a selection of k keys keeps if it knows what will be asked for.

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

import jax.numpy as jnp
import numpy as np
from absl import app, flags
from flax import nnx

from benchmarks.selections import (
    hindsight_scores,
    kept_attention,
    kept_by_foresight,
    kept_by_query,
)
from benchmarks.text_nats import file_nats
from sparsek_jax.generation.loading import load_run
from sparsek_jax.ops import sparsek_attention
from sparsek_jax.training.workdir import write_json

_NUM_SELECTED = flags.DEFINE_integer("num_selected", 512, "k.", lower_bound=1)
_WINDOW = flags.DEFINE_integer("sliding_window", 512, "w.", lower_bound=0)
_SELECTIONS = ("dense", "query", "foresight", "hindsight")
_SELECT = flags.DEFINE_list("select", list(_SELECTIONS), "Some of these, the first one always.")
_SINKS = flags.DEFINE_integer("num_sinks", 4, "Of hindsight, always among the k.", lower_bound=0)


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
