"""Batched scoring against whole logits of one text at a time. Does not need the harness."""

import functools

import numpy as np
import pytest
from flax import nnx

from sparsek_jax.evaluation.harness.batching import batches, padded_width
from sparsek_jax.evaluation.harness.likelihood import Continuation, ContinuationScorer
from sparsek_jax.generation.engine import NonFiniteLogitsError
from sparsek_jax.nn import Decoder
from tests.generation.models import BOS, CONFIG

LOGITS = nnx.jit(lambda model, tokens: model(tokens))


@functools.cache
def model():
    return Decoder(CONFIG, rngs=nnx.Rngs(0))


def log_probabilities(text):
    """Of every token after each beginning of a text, `[len(text), V]`."""
    padded = np.pad(text, (0, 128 - len(text)))[None]
    logits = np.asarray(LOGITS(model(), padded), np.float64)[0, : len(text)]
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def naive(continuation):
    text = [*continuation.context, *continuation.tokens]
    log_p = log_probabilities(text)[len(continuation.context) - 1 : -1]
    nats = log_p[np.arange(len(log_p)), continuation.tokens].sum()
    return nats, (log_p.argmax(-1) == continuation.tokens).all()


def examples():
    rng = np.random.default_rng(0)
    # Inputs of one token, up to the border of a width, just beyond it, and of nothing but bos.
    sizes = [(1, 1), (9, 1), (40, 24), (40, 25), (41, 25), (70, 1), (1, 60), (80, 16), (5, 3)]
    drawn = [
        Continuation([BOS, *rng.integers(0, 256, c - 1).tolist()], rng.integers(0, 256, n).tolist())
        for c, n in sizes
    ]
    text = [BOS, *b"what it writes"]
    for _ in range(7):
        text.append(int(log_probabilities(text)[-1].argmax()))
    wrong_end = [*text[15:-1], (text[-1] + 1) % 256]
    likeliest = int(log_probabilities(drawn[0].context)[-1].argmax())
    return [
        *drawn,
        # One row with the first, and none with it: of these tokens, some are context.
        Continuation(drawn[0].context, [65]),
        Continuation(drawn[0].context, [likeliest]),
        Continuation(drawn[2].context[:-2], [*drawn[2].context[-2:], *drawn[2].tokens]),
        Continuation(text[:15], text[15:]),
        Continuation(text[:15], wrong_end),
    ]


@pytest.mark.parametrize(("batch_size", "logits_chunk"), [(4, 1024), (3, 9)])
def test_batches_score_as_whole_logits_of_each_text(batch_size, logits_chunk):
    scorer = ContinuationScorer(model(), batch_size=batch_size, logits_chunk=logits_chunk)
    continuations = examples()
    scored = dict(scorer.score(continuations))
    assert sorted(scored) == list(range(len(continuations)))
    greedy = []
    for i, continuation in enumerate(continuations):
        nats, is_greedy = naive(continuation)
        assert scored[i].nats == pytest.approx(nats, rel=1e-5)
        assert scored[i].is_greedy == is_greedy
        greedy.append(scored[i].is_greedy)
    assert greedy[-4:] == [True, False, True, False]
    assert scorer.num_programs == 2
    list(scorer.score(continuations[:5]))
    assert scorer.num_programs == 2


def test_what_differs_in_the_last_token_is_read_once(monkeypatch):
    scorer = ContinuationScorer(model(), batch_size=1)
    context = [BOS, *b"A or B: "]
    calls = []
    measure = scorer._measure
    monkeypatch.setattr(scorer, "_measure", lambda *args: calls.append(args) or measure(*args))
    choices = [Continuation(context, [ord(letter)]) for letter in "ABCDEFGHIA"]
    scored = dict(scorer.score(choices))
    assert len(calls) == 1
    for i, choice in enumerate(choices):
        assert scored[i].nats == pytest.approx(naive(choice)[0], rel=1e-5)


def test_broken_models_are_loud():
    broken = Decoder(CONFIG, rngs=nnx.Rngs(0))
    broken.output[...] = broken.output[...].at[5].set(np.nan)
    with pytest.raises(NonFiniteLogitsError, match="logits of a continuation are NaN"):
        list(ContinuationScorer(broken, batch_size=1).score([Continuation([BOS], [7])]))


def test_widths_are_few_and_close():
    widths = sorted({padded_width(length) for length in range(1, 1025)})
    assert widths == [64, 96, 128, 192, 256, 384, 512, 768, 1024]
    assert all(padded_width(width) == width for width in widths)
    assert [padded_width(n) for n in (65, 97, 129, 1025)] == [96, 128, 192, 1536]


def test_batches_are_longest_first():
    assert list(batches([3, 9, 3, 7, 1], 2)) == [(1, 3), (0, 2), (4,)]


def test_contexts_are_truncated_from_the_left():
    continuation = Continuation([1, 2, 3, 4], [5, 6])
    assert continuation.truncated(5) == continuation
    assert continuation.truncated(4) == Continuation([2, 3, 4], [5, 6])
    assert continuation.truncated(2) == Continuation([4], [5, 6])
    with pytest.raises(ValueError, match="max_length=1; expected at least 2"):
        continuation.truncated(1)
    for empty in (([], [1]), ([1], [])):
        with pytest.raises(ValueError, match="is empty; expected at least one token"):
            Continuation(*empty)
