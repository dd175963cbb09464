"""Scores that a trained model gives to held-out text, for `benchmarks.attention --scores`.

    python -m benchmarks.trained_scores --workdir=runs/code_124m --length=65536 --out=scores.npy

Writes float32 `[layers x KV heads, T]`, and says how many of the keys the selection has to search.
"""

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags
from flax import nnx

from sparsek_jax.data import prepare, validation_batches
from sparsek_jax.ops.pruning import capacities, may_matter
from sparsek_jax.training.checkpoint import restore_model
from sparsek_jax.training.config import decoder_config
from sparsek_jax.training.loss import LOSS_FIELDS, hidden_states
from sparsek_jax.training.workdir import load_config

_WORKDIR = flags.DEFINE_string("workdir", None, "Of the training run.", required=True)
_LENGTH = flags.DEFINE_integer("length", 65536, "T.")
_OUT = flags.DEFINE_string("out", "scores.npy", "File to write.")


def main(argv):
    """Writes the file and prints a line."""
    if len(argv) > 1:
        raise app.UsageError(f"unexpected argument {argv[1]!r}")
    config = load_config(_WORKDIR.value)
    corpus = prepare(config.data)
    config.data.seq_len = _LENGTH.value
    batch = next(iter(validation_batches(corpus, config.data, batch_size=1)))
    model, step = restore_model(_WORKDIR.value, decoder_config(config, corpus.tokenizer.vocab_size))
    graphdef, params = nnx.split(model)

    @jax.jit
    def scores_of(params, batch):
        model = nnx.merge(graphdef, params)
        _, scores = hidden_states(model, batch, packing=config.data.packing, return_scores=True)
        return jnp.concatenate([x[0].T for x in scores.values()])

    rows = scores_of(params, {name: batch[name] for name in LOSS_FIELDS})
    np.save(_OUT.value, np.asarray(rows, np.float32))
    start = jnp.zeros(_LENGTH.value, jnp.int32)
    num_selected = config.attention.num_selected
    kept = jax.lax.map(lambda u: jnp.sum(may_matter(u, start, num_selected)), rows)
    low, middle, high = np.quantile(kept, [0, 0.5, 1])
    print(
        f"{_OUT.value}: step {step}, {rows.shape[0]} heads, {rows.shape[1]:,} tokens; keys that "
        f"may matter for k={num_selected}: {low:.0f} to {high:.0f}, median {middle:.0f}; room for "
        f"{capacities(num_selected, _LENGTH.value)}"
    )


if __name__ == "__main__":
    app.run(main)
