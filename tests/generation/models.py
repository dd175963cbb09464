"""Models whose text is known beforehand."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array

from sparsek_jax.data import load_tokenizer
from sparsek_jax.nn import AttentionConfig, Decoder, DecoderConfig

TOKENIZER = load_tokenizer("bytes")
BOS, EOS = TOKENIZER.bos_id, TOKENIZER.eos_id
ATTENTION = AttentionConfig(
    num_heads=2,
    num_kv_heads=1,
    head_dim=8,
    num_selected=5,
    sliding_window=4,
    implementation="reference",
)
CONFIG = DecoderConfig(
    # More rows than the tokenizer has ids.
    vocab_size=264,
    num_layers=2,
    d_model=16,
    mlp_dim=16,
    tie_embeddings=False,
    attention=ATTENTION,
)


@functools.cache
def decoder(seed=0, scan_layers=False, **attention):
    """A random decoder that is sure of itself and writes ASCII only, a byte a token.

    It has a layer of each kind, or two in a scan, since compiling takes most of the time here.
    """
    attention = dataclasses.replace(ATTENTION, **attention)
    num_layers = 2 if scan_layers else len(attention.pattern) or 1
    config = dataclasses.replace(
        CONFIG, num_layers=num_layers, scan_layers=scan_layers, attention=attention
    )
    model = Decoder(config, rngs=nnx.Rngs(seed))
    model.embedding[...] = 50 * model.embedding[...]
    ascii_only = jnp.where(jnp.arange(CONFIG.vocab_size)[:, None] < 128, model.output[...], 0)
    model.output[...] = 50 * ascii_only
    return model


@functools.partial(jax.tree_util.register_dataclass, data_fields=["length"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class Length:
    """All that a chain remembers, of which it loses what comes after 50 tokens."""

    length: Array

    @property
    def num_lost(self):
        return jnp.maximum(self.length - 50, 0)


class Chain(nnx.Module):
    """A model whose next-token logits depend on the last token only."""

    def __init__(self, transitions, *, broken=(), kind="window"):
        """`transitions` gives logits of pairs of tokens; after `broken` tokens they are NaN."""
        size = CONFIG.vocab_size
        self.config = dataclasses.replace(
            CONFIG, d_model=size, attention=dataclasses.replace(ATTENTION, kind=kind)
        )
        table = np.full((size, size), -50.0, np.float32)
        for (token, following), logit in transitions.items():
            table[token, following] = logit
        table[list(broken)] = np.nan
        self.table = nnx.Param(jnp.asarray(table))

    def init_cache(self, batch_size, *, max_length=None):
        del max_length
        return Length(jnp.zeros(batch_size, jnp.int32))

    def extend(self, tokens, cache, *, num_tokens):
        return Length(cache.length + num_tokens), jax.nn.one_hot(tokens, len(self.table[...]))

    def unstacked(self):
        return self

    def logits(self, hidden):
        # A product would spread NaNs.
        return self.table[...][jnp.argmax(hidden, axis=-1)]


def words(*words):
    """Transitions that follow each word, of characters, bytes and ids, to its end."""
    transitions = {}
    for word in words:
        ids = [i for x in word for i in ([x] if isinstance(x, int) else x.encode())]
        transitions |= dict.fromkeys(itertools.pairwise(ids), 0.0)
    return transitions
