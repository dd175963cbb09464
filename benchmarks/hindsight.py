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
from benchmarks.text_nats import file_nats, pieces_of
from sparsek_jax.generation.loading import load_run
from sparsek_jax.ops import sparsek_attention
from sparsek_jax.training.workdir import write_json

_NUM_SELECTED = flags.DEFINE_integer("num_selected", 512, "k.", lower_bound=1)
_WINDOW = flags.DEFINE_integer("sliding_window", 512, "w.", lower_bound=0)
_SELECTIONS = ("dense", "query", "foresight", "hindsight")
_SELECT = flags.DEFINE_multi_enum(
    "select", list(_SELECTIONS), list(_SELECTIONS), "What to measure; dense always."
)
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
    run = load_run(flags.FLAGS.workdir)
    config = run.model.config
    kinds = {config.attention.layer_kind(i) for i in range(config.num_layers)}
    if kinds != {"dense"}:
        raise app.UsageError(
            f"--workdir={flags.FLAGS.workdir} has attention of {sorted(kinds)}; expected dense"
        )
    budget = {"num_selected": _NUM_SELECTED.value, "sliding_window": _WINDOW.value}
    mixes = {
        "query": functools.partial(_mix_kept, kept_by_query, budget),
        "foresight": functools.partial(_mix_kept, kept_by_foresight, budget),
        "hindsight": functools.partial(_mix_hindsight, budget, _SINKS.value),
    }
    paths = [pathlib.Path(path) for path in arguments[1:]]
    texts = {
        path: pieces_of(run.tokenizer.encode(path.read_text("utf-8", "replace"))) for path in paths
    }
    kinds = list(dict.fromkeys(path.parent for path in paths))
    header = "| keys | " + " | ".join(kind.name for kind in kinds) + " | mean | over dense |"
    print(f"{header}\n|{' --- |' * (len(kinds) + 3)}", flush=True)
    record, means = {}, {}
    for name in dict.fromkeys(("dense", *_SELECT.value)):
        if name in mixes:
            for block in run.model.layers:
                block.attention.mix = mixes[name]
        model = nnx.split(run.model)
        nats = {
            path: [float(file_nats(*model, tokens).mean()) for tokens in pieces]
            for path, pieces in texts.items()
        }
        record[name] = {str(path): values for path, values in nats.items()}
        by_kind = [
            np.mean([value for path in paths if path.parent == kind for value in nats[path]])
            for kind in kinds
        ]
        means[name] = np.mean(by_kind)
        cells = " | ".join(f"{value:.4f}" for value in (*by_kind, means[name]))
        print(f"| {name} | {cells} | {means[name] / means['dense'] - 1:+.2%} |", flush=True)
    if flags.FLAGS.to:
        write_json(pathlib.Path(flags.FLAGS.to), record)


if __name__ == "__main__":
    app.run(main)
