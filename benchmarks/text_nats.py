"""Mean nats of the first tokens of text files, by a run or an imported model.

    python -m benchmarks.text_nats --workdir=runs/smollm2 FILE [FILE ...]

The tokens of a file are one document without a token before it: the first one is only read.
"""

import pathlib

import jax
import jax.numpy as jnp
from absl import app, flags
from flax import nnx

from sparsek_jax.generation.loading import load_run

_WORKDIR = flags.DEFINE_string("workdir", None, "Directory of the model.")
_TOKENS = flags.DEFINE_integer("tokens", 1024, "Of each file.", lower_bound=2)
flags.mark_flag_as_required("workdir")


def main(arguments):
    """Prints a line for each file."""
    run = load_run(_WORKDIR.value)
    graphdef, state = nnx.split(run.model)

    @jax.jit
    def mean_nats(state, tokens):
        logits = nnx.merge(graphdef, state)(tokens[None])[0]
        nats = jax.nn.logsumexp(logits, axis=-1)[:-1]
        nats -= jnp.take_along_axis(logits[:-1], tokens[1:, None], axis=-1)[:, 0]
        return jnp.mean(nats)

    for path in arguments[1:]:
        text = pathlib.Path(path).read_text(encoding="utf-8", errors="replace")
        tokens = run.tokenizer.encode(text)[: _TOKENS.value]
        print(f"{mean_nats(state, tokens):.4f} nats, {len(tokens)} tokens: {path}", flush=True)


if __name__ == "__main__":
    app.run(main)
