import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sparsek_jax.data import load_tokenizer
from sparsek_jax.evaluation.sampling import sample
from sparsek_jax.nn import AttentionConfig, Decoder, DecoderConfig

TOKENIZER = load_tokenizer("bytes")
BOS, EOS = TOKENIZER.bos_id, TOKENIZER.eos_id


class Chain(nnx.Module):
    """A model whose next-token logits depend on the last token only."""

    def __init__(self, transitions, vocab_size=TOKENIZER.vocab_size):
        table = np.full((vocab_size, vocab_size), -50.0, np.float32)
        for (token, following), logit in transitions.items():
            table[token, following] = logit
        self.table = nnx.Param(jnp.asarray(table))

    def hidden(self, tokens):
        return jax.nn.one_hot(tokens, len(self.table[...]))

    def logits(self, hidden):
        return hidden @ self.table[...]


def chain(*words, **kwargs):
    """Prefers to follow each word, of characters or ids, to its end."""
    ids = [[x if isinstance(x, int) else ord(x) for x in word] for word in words]
    pairs = {pair: 0.0 for word in ids for pair in itertools.pairwise(word)}
    return Chain(pairs, **kwargs)


@pytest.fixture(scope="module")
def decoder():
    """A random decoder that is sure of itself."""
    config = DecoderConfig(
        vocab_size=TOKENIZER.vocab_size,
        num_layers=1,
        d_model=16,
        mlp_dim=16,
        tie_embeddings=False,
        attention=AttentionConfig(
            num_heads=2, num_kv_heads=1, head_dim=8, num_selected=3, sliding_window=2
        ),
    )
    model = Decoder(config, rngs=nnx.Rngs(0))
    model.embedding[...] = 50 * model.embedding[...]
    # It writes ASCII only, so that its tokens can be read back from the text.
    ascii_only = jnp.where(jnp.arange(config.vocab_size)[:, None] < 128, model.output[...], 0)
    model.output[...] = 50 * ascii_only
    return model


@pytest.mark.parametrize("context", [1024, 9, 5, 1])
def test_greedy_is_the_likeliest_token_of_the_last_tokens(decoder, context):
    """The oracle runs the model on exactly the tokens in sight; the prompt slides out of it."""
    prompt, length = "def f", 6
    ids = [BOS, *prompt.encode()]
    logits_of = nnx.jit(lambda model, tokens: model(tokens))
    for _ in range(length):
        logits = logits_of(decoder, jnp.asarray([ids[-context:]]))
        ids.append(int(jnp.argmax(logits[0, -1])))
    text = sample(decoder, TOKENIZER, prompt, length=length, temperature=0, context=context)
    assert list(text.encode()) == ids[1:]
    assert len(set(text)) > len(set(prompt))


def test_begins_a_document_without_a_prompt():
    model = chain([BOS, "a", "b", EOS])
    assert sample(model, TOKENIZER, "", length=9, temperature=0) == "ab"


def test_the_end_of_the_document_ends_the_text_and_length_does():
    model = chain(["x", "y", "z", EOS, "w", "w"])
    assert sample(model, TOKENIZER, "x", length=9, temperature=0) == "xyz"
    assert sample(model, TOKENIZER, "x", length=1, temperature=0) == "xy"
    assert sample(model, TOKENIZER, "x", length=0) == "x"


def test_seed_decides_the_text():
    letters = "abcdefgh"
    model = chain(*[[a, b] for a in letters for b in letters])

    def draw(seed):
        return sample(model, TOKENIZER, "a", length=20, seed=seed)

    assert draw(0) == draw(0)
    assert draw(0) != draw(1)
    assert set(draw(0)) <= set(letters)
    assert len(set(draw(0))) > 3


def test_temperature_divides_the_logits():
    """With logits 0 and ln 3, "b" has the odds 3^(1 / temperature)."""
    pairs = {(ord(a), ord(b)): np.log(3) * (b == "b") for a in "ab" for b in "ab"}
    model = Chain(pairs)
    for temperature, share in ((0.5, 9 / 10), (1.0, 3 / 4), (2.0, 3**0.5 / (1 + 3**0.5))):
        text = sample(
            model, TOKENIZER, "a", length=1500, temperature=temperature, seed=3, context=4
        )
        assert text.count("b") / len(text) == pytest.approx(share, abs=0.04)


def test_rows_of_the_vocabulary_without_a_token_are_never_drawn():
    """A vocabulary may be larger than the tokenizer's, to suit the hardware."""
    model = Chain({(ord("a"), 260): 10.0, (ord("a"), ord("a")): 0.0}, vocab_size=264)
    assert sample(model, TOKENIZER, "a", length=5, temperature=0) == "aaaaaa"
    assert sample(model, TOKENIZER, "a", length=5, temperature=1) == "aaaaaa"


def test_compiles_once_for_all_tokens():
    traces = []

    class Counting(Chain):
        def hidden(self, tokens):
            traces.append(tokens.shape)
            return super().hidden(tokens)

    model = Counting({(ord("a"), ord("a")): 0.0})
    for seed, temperature in ((0, 0.5), (1, 0.7)):
        sample(model, TOKENIZER, "a", length=30, temperature=temperature, seed=seed, context=8)
    assert traces == [(1, 8)]


@pytest.mark.parametrize(("name", "value"), [("length", -1), ("temperature", -0.1), ("context", 0)])
def test_impossible_arguments_are_named(name, value):
    arguments = {"length": 1, name: value}
    with pytest.raises(ValueError, match=f"{name}={value}; expected at least"):
        sample(chain("ab"), TOKENIZER, "a", **arguments)
