r"""Mean nats of text files, by a run or an imported model; with --buckets also by position.

    python -m benchmarks.text_nats --workdir=runs/smollm2 FILE [FILE ...]
    python -m benchmarks.text_nats --workdir=runs/tuned --tokens=16384 --pieces=4 --buckets=8 \
        --to=runs/tuned/nats.json texts/held_out/*/*.txt

Of every file the first --pieces runs of --tokens tokens are read, each by itself and without a
token before it: its first token is only read. Only with one piece and one bucket may a file be
shorter. Files in one directory are one kind of text, summed up with a standard error that takes
files, not tokens, for independent draws.
"""

import collections
import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags
from flax import nnx

from sparsek_jax.evaluation.perplexity import LossTally
from sparsek_jax.generation.loading import load_run
from sparsek_jax.training.loss import token_loss
from sparsek_jax.training.workdir import write_json

_WORKDIR = flags.DEFINE_string("workdir", None, "Directory of the model.")
_TOKENS = flags.DEFINE_integer("tokens", 1024, "Of each piece.", lower_bound=2)
_PIECES = flags.DEFINE_integer("pieces", 1, "Most pieces of each file.", lower_bound=1)
_BUCKETS = flags.DEFINE_integer("buckets", 1, "Equal parts of a piece.", lower_bound=1)
_TO = flags.DEFINE_string("to", None, "JSON file for the nats of every file and bucket.")
flags.mark_flag_as_required("workdir")
# Tokens whose logits exist at a time.
_LOSS_CHUNK = 1024


@functools.partial(jax.jit, static_argnums=0)
def _loss(graphdef, state, tokens):
    """Loss of all tokens but the first."""
    model = nnx.merge(graphdef, state)
    hidden = model.hidden(tokens[None, :-1])
    loss = token_loss(model.output_table, hidden, tokens[None, 1:], chunk_size=_LOSS_CHUNK)
    return jax.tree.map(lambda x: x[0], loss)


def file_loss(graphdef, state, tokens):
    """`TokenLoss` of all tokens but the first, of a text that begins with them, `[T - 1]`."""
    return jax.tree.map(np.asarray, _loss(graphdef, state, jnp.asarray(tokens)))


def file_nats(graphdef, state, tokens):
    """The nats of `file_loss`."""
    return file_loss(graphdef, state, tokens).nats


def pieces_of(tokens):
    """Cuts a text into what is read, as the flags say; nothing if it is too short."""
    size = _TOKENS.value
    if _PIECES.value == _BUCKETS.value == 1:
        return [tokens[:size]]
    whole = min(_PIECES.value, len(tokens) // size)
    return [tokens[i * size : (i + 1) * size] for i in range(whole)]


def _line(name, loss):
    buckets = "".join(f" {bucket.nats_per_token:.4f}" for bucket in loss.buckets)
    error = "" if np.isnan(loss.standard_error) else f" ± {loss.standard_error:.4f}"
    by_position = f"; by position{buckets}" if len(loss.buckets) > 1 else ""
    return f"{loss.nats_per_token:.4f}{error} nats, {loss.tokens} tokens: {name}{by_position}"


def main(arguments):
    """Prints a line for each file and, where there are several, for each directory."""
    run = load_run(_WORKDIR.value)
    graphdef, state = nnx.split(run.model)
    edges = np.linspace(0, _TOKENS.value, _BUCKETS.value + 1).astype(int)
    paths = [pathlib.Path(path) for path in arguments[1:]]
    kinds = collections.Counter(path.parent for path in paths)
    make_tally = functools.partial(LossTally, run.tokenizer.byte_lengths, edges)
    by_kind = {kind: make_tally(len(paths)) for kind in kinds}
    record = []
    for index, path in enumerate(paths):
        pieces = pieces_of(run.tokenizer.encode(path.read_text(encoding="utf-8", errors="replace")))
        if not pieces:
            print(f"left out, as shorter than {_TOKENS.value} tokens: {path}", flush=True)
            continue
        tally = make_tally(1)
        for tokens in pieces:
            loss = file_loss(graphdef, state, tokens)
            nats, likeliest = loss.nats, loss.likeliest
            batch = {
                "targets": tokens[1:],
                "positions": np.arange(len(nats)),
                "document_ids": np.zeros(len(nats), int),
                "loss_mask": np.ones(len(nats)),
            }
            tally.add(batch, nats, likeliest)
            numbered = batch | {"document_ids": batch["document_ids"] + index}
            by_kind[path.parent].add(numbered, nats, likeliest)
        loss = tally.result()
        print(_line(path, loss), flush=True)
        nats_by_bucket = [bucket.nats_per_token for bucket in loss.buckets]
        record.append({"file": str(path), "pieces": len(pieces), "nats": nats_by_bucket})
    if len(paths) > 1:
        for kind, tally in by_kind.items():
            print(_line(f"{kind}/", tally.result()), flush=True)
    if _TO.value:
        edges = edges.tolist()
        write_json(pathlib.Path(_TO.value), {"step": run.step, "edges": edges, "files": record})


if __name__ == "__main__":
    app.run(main)
