import functools
from unittest import mock

import jax
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from sparsek_jax.generation.engine import Completion, Engine, NonFiniteLogitsError, Session
from sparsek_jax.generation.sampling import Sampling
from sparsek_jax.generation.statistics import dense_cache_bytes
from tests.generation.models import BOS, EOS, TOKENIZER, Chain, decoder, words

GREEDY = Sampling(temperature=0)
# Shorter than the window; about as long as window and selected keys; longer than a large chunk.
PROMPTS = ["de", "def main", "import this; import that"]
LENGTH = 24
VARIANTS = {
    "soft": {},
    "straight_through": {"gating": "straight_through"},
    "dense": {"kind": "dense"},
    "blocks": {"kind": "moba", "block_size": 3},
    "window": {"kind": "window"},
    "sparsek and dense": {"pattern": ("sparsek", "dense")},
    "scanned": {"kind": "window", "scan_layers": True},
}


@functools.cache
def make(variant):
    return Engine(decoder(**VARIANTS[variant]), TOKENIZER, chunk_sizes=(16, 16), block_size=10)


@functools.cache
def chain():
    """Words that share no character, so that a prompt's last one chooses the text."""
    transitions = words(
        [BOS, "a", "b", EOS],
        ["x", "y", "z", EOS, "w", "w"],
        ["1", "é€😀!", EOS],
        ["2", 0xFE, 0xFF, EOS],
        ["3", 0xE1, EOS],
        ["5", "stuvSTUV", EOS],
        ["n", "m", "N"],
    )
    transitions |= {(ord(p), ord(q)): np.log(3) * (q == "q") for p in "pq" for q in "pq"}
    # A token that the tokenizer does not have is the likeliest.
    transitions[ord("w"), 260] = 10.0
    model = Chain(transitions, broken=b"N")
    return Engine(model, TOKENIZER, chunk_sizes=(4, 16), block_size=7)


def write(prompt, max_tokens=50, sampling=GREEDY, **kwargs):
    (completion,) = chain().generate([prompt], max_tokens=max_tokens, sampling=sampling, **kwargs)
    return completion


@pytest.mark.parametrize("variant", VARIANTS)
def test_greedy_is_the_likeliest_token_after_the_whole_text(variant):
    """Of a batch of different lengths, each against one pass over all of its text."""
    engine = make(variant)
    completions = engine.generate(PROMPTS, max_tokens=LENGTH, sampling=GREEDY)
    rows = [
        [BOS, *(prompt + completion.text).encode()]
        for prompt, completion in zip(PROMPTS, completions, strict=True)
    ]
    tokens = np.zeros((len(rows), max(map(len, rows))), np.int32)
    for row, ids in enumerate(rows):
        tokens[row, : len(ids)] = ids
    logits = nnx.jit(lambda model, tokens: model(tokens))(decoder(**VARIANTS[variant]), tokens)
    likeliest = np.argmax(logits[..., : TOKENIZER.vocab_size], axis=-1)
    for row, ids in enumerate(rows):
        assert ids[-LENGTH:] == likeliest[row, len(ids) - LENGTH - 1 : len(ids) - 1].tolist()
        assert completions[row].num_tokens == LENGTH
        assert completions[row].reason == "length"
    assert len(set("".join(completion.text for completion in completions))) > 12


def test_a_prompt_alone_gives_the_text_that_it_gives_in_a_batch():
    engine = make("straight_through")
    together = engine.generate(PROMPTS, max_tokens=LENGTH, sampling=GREEDY)
    assert together == [
        engine.generate([prompt], max_tokens=LENGTH, sampling=GREEDY)[0] for prompt in PROMPTS
    ]
    # Draws depend on the row's index.
    drawn = engine.generate(PROMPTS, max_tokens=LENGTH)
    others = engine.generate(["x" * 18, PROMPTS[1], ""], max_tokens=LENGTH)
    assert drawn[1] == others[1]
    assert drawn[0] == engine.generate(PROMPTS[:1], max_tokens=LENGTH)[0]
    assert drawn != engine.generate(PROMPTS, max_tokens=LENGTH, sampling=Sampling(seed=1))


def test_text_that_is_appended_later_continues_the_document():
    """In one row and in two, at a time and after writing."""
    engine = make("soft")
    session = engine.start(["import ", "x", "y"], max_tokens=9)
    session.append(["this; import that", "", "z"])
    list(session.stream(max_tokens=9, sampling=GREEDY))
    first = session.completions
    list(session.stream(max_tokens=LENGTH - 9, sampling=GREEDY))
    texts = [a.text + b.text for a, b in zip(first, session.completions, strict=True)]
    prompts = ["import this; import that", "x", "yz"]
    expected = engine.generate(prompts, max_tokens=LENGTH, sampling=GREEDY)
    assert texts == [completion.text for completion in expected]
    assert session.statistics.held_tokens == 3 * LENGTH + len("".join(prompts)) + 3
    for row, prompt, text in zip(session.tokens, prompts, texts, strict=True):
        assert row.tolist() == [BOS, *(prompt + text).encode()]


def test_snapshots_are_returned_to():
    engine = make("window")
    session = engine.start(PROMPTS, max_tokens=50)
    snapshot = session.snapshot()
    texts = []
    for _ in range(2):
        list(session.stream(max_tokens=LENGTH, sampling=GREEDY))
        texts.append([completion.text for completion in session.completions])
        session.restore(snapshot)
        assert [row.tolist() for row in session.tokens] == [[BOS, *p.encode()] for p in PROMPTS]
    assert texts[0] == texts[1]


def test_compiles_once_for_prompts_and_texts_of_every_length():
    model = Chain(words("aa"))
    traces = []

    def extend(self, tokens, cache, *, num_tokens):
        traces.append(tokens.shape)
        return original(self, tokens, cache, num_tokens=num_tokens)

    original = Chain.extend
    with mock.patch.object(Chain, "extend", extend):
        engine = Engine(model, TOKENIZER, chunk_sizes=(4, 16), block_size=7)
        for length, max_tokens in ((1, 1), (3, 40), (20, 5), (37, 7), (2, 8), (16, 20)):
            for sampling in (GREEDY, Sampling(temperature=0.5, seed=length)):
                session = engine.start(["a" * length, "a"], max_tokens=max_tokens)
                pieces = session.stream(
                    max_tokens=max_tokens, sampling=sampling, block_seconds=0.001
                )
                assert len(list(pieces)) >= 2
                assert session.completions[1].num_tokens == max_tokens
    assert sorted(traces) == [(2, 1), (2, 4), (2, 16)]


def test_a_real_model_compiles_nothing_for_other_lengths():
    events = []
    engine = make("sparsek and dense")
    engine.generate(PROMPTS, max_tokens=20)
    jax.monitoring.register_event_duration_secs_listener(lambda name, *_, **__: events.append(name))
    try:
        engine.generate(["x" * 30, "", "y" * 7], max_tokens=33, sampling=Sampling(seed=9))
    finally:
        jax.monitoring.clear_event_listeners()
    assert not [name for name in events if "compile" in name]


def test_the_previous_cache_is_given_up():
    session = make("window").start(PROMPTS, max_tokens=9)
    previous = jax.tree.leaves(session._state)
    next(session.stream(max_tokens=9))
    assert all(x.is_deleted() for x in previous)


def test_begins_a_document_without_a_prompt():
    assert write("") == Completion("ab", 3, "eos")


def test_the_end_of_the_document_the_length_and_a_stop_string_end_a_text():
    assert write("x") == Completion("yz", 3, "eos")
    assert write("x", 2) == Completion("yz", 2, "length")
    assert write("x", 1) == Completion("y", 1, "length")
    assert write("w", 15) == Completion("w" * 15, 15, "length")
    assert write("5", stop=["vS"]) == Completion("stu", 5, "stop")
    # Over the border of a block of seven tokens.
    assert write("5", stop=["SvT", "STUV"]) == Completion("stuv", 8, "stop")
    assert write("5", stop=["STUVW"]) == Completion("stuvSTUV", 9, "eos")
    assert write("5", 8, stop=["STUV"]) == Completion("stuv", 8, "stop")
    assert write("5", 7, stop=["STUV"]) == Completion("stuvSTU", 7, "length")


def test_rows_of_a_batch_end_by_themselves():
    session = chain().start(["x", "5", "w", "1"], max_tokens=20)
    pieces = list(session.stream(max_tokens=20, sampling=GREEDY, stop=["uv"]))
    assert [c.text for c in session.completions] == ["yz", "st", "w" * 20, "é€😀!"]
    assert [c.reason for c in session.completions] == ["eos", "stop", "length", "eos"]
    for row, completion in enumerate(session.completions):
        assert "".join(text for i, text in pieces if i == row) == completion.text


@pytest.mark.parametrize("block_seconds", [None, 1e-9, 10.0])
def test_characters_are_streamed_whole(block_seconds):
    session = chain().start(["1"], max_tokens=20)
    pieces = [
        text
        for _, text in session.stream(max_tokens=20, sampling=GREEDY, block_seconds=block_seconds)
    ]
    assert "".join(pieces) == "é€😀!"
    if block_seconds == 1e-9:
        assert pieces == ["é", "€", "😀", "!"]
    assert write("1", 6).text == "é€\ufffd"
    assert write("2").text == "\ufffd\ufffd"
    assert write("3").text == "\ufffd"


def test_seed_decides_the_text():
    def sample(seed):
        return write("p", 40, Sampling(seed=seed)).text

    assert sample(0) == sample(0)
    assert sample(0) != sample(1)
    assert set(sample(0)) == {"p", "q"}


def test_temperature_divides_the_logits():
    """With logits 0 and ln 3, "q" has the odds 3^(1 / temperature)."""
    for temperature, share in ((0.5, 9 / 10), (1.0, 3 / 4), (2.0, 3**0.5 / (1 + 3**0.5))):
        text = write("p", 1500, Sampling(temperature=temperature)).text
        assert text.count("q") / len(text) == pytest.approx(share, abs=0.04)
    assert set(write("p", 50, Sampling(top_k=1)).text) == {"q"}
    assert set(write("p", 50, Sampling(top_p=0.7)).text) == {"q"}


def test_logits_that_are_not_finite_are_an_error_after_the_text_before():
    session = chain().start(["x", "n"], max_tokens=20)
    pieces = []
    with pytest.raises(NonFiniteLogitsError, match="behind token 4 of row 1 are NaN or infinite"):
        pieces.extend(session.stream(max_tokens=20, sampling=GREEDY))
    # NaNs in a row that has ended, or beyond the last token, are nobody's business.
    assert write("n", 2).text == "mN"
    session = chain().start(["n", "w"], max_tokens=20)
    list(session.stream(max_tokens=20, sampling=GREEDY, stop=["N"]))
    assert [c.text for c in session.completions] == ["m", "w" * 20]


def test_cancelling_shows_what_was_held_back_and_leaves_the_rest_to_be_written():
    session = chain().start(["5", "x"], max_tokens=20)
    answers = iter([False, True])
    pieces = list(
        session.stream(
            max_tokens=20, sampling=GREEDY, stop=["vSTUV!"], cancelled=lambda: next(answers)
        )
    )
    assert session.completions == [
        Completion("stuvSTU", 7, "cancelled"),
        Completion("yz", 3, "eos"),
    ]
    assert "".join(text for row, text in pieces if row == 0) == "stuvSTU"
    list(session.stream(max_tokens=20, sampling=GREEDY))
    assert session.completions[0].text == "V"


def test_statistics():
    engine = make("sparsek and dense")
    session = engine.start(PROMPTS, max_tokens=20)
    list(session.stream(max_tokens=20, sampling=GREEDY))
    statistics = session.statistics
    prompt_tokens = sum(map(len, PROMPTS)) + 3
    assert statistics.prefill_tokens == prompt_tokens
    assert statistics.decode_tokens == 60
    assert statistics.held_tokens == prompt_tokens + 60
    assert statistics.prefill_seconds > 0
    assert statistics.decode_seconds > 0
    # Keys and values of 256 rows of dense attention in one layer, and of k + w rows in the other.
    tables = 2 * 3 * 8 * (256 + 9) * 4
    assert tables < statistics.cache_bytes < 1.2 * tables
    config = engine.model_config
    assert dense_cache_bytes(config, 100) == 2 * 2 * 100 * 8 * 4
    report = statistics.report(config)
    assert f"prefill {prompt_tokens} tokens, " in report
    assert "decode 60 tokens, " in report
    assert f"{prompt_tokens + 60} tokens would take 12.12 KiB" in report


def test_dense_attention_needs_room():
    engine = make("dense")
    assert engine.needs_room
    assert not make("window").needs_room
    assert make("blocks").needs_room
    assert Session(make("window"), 3).room is None
    with pytest.raises(ValueError, match="max_length=None; expected an int"):
        Session(engine, 3)
    session = Session(engine, 3, max_length=256)
    session.append(["x" * 99, "", "y"])
    assert session.room == 156
    with pytest.raises(ValueError, match=r"max_length=256 tokens .* expected at least 257"):
        next(session.stream(max_tokens=157))
    with pytest.raises(ValueError, match=r"max_length=256 tokens .* expected at least 300"):
        session.append(["x" * 200, "", ""])
    session.append(["x" * 156, "", ""])
    assert session.room == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"max_tokens": 0}, "max_tokens=0; expected at least 1"),
        ({"stop": ["a", ""]}, r"stop=\['a', ''\]; expected strings that are not empty"),
    ],
)
def test_impossible_arguments_are_named(arguments, message):
    session = chain().start(["a"], max_tokens=9)
    with pytest.raises(ValueError, match=message):
        next(session.stream(**{"max_tokens": 9, **arguments}))
    with pytest.raises(ValueError, match="prompts is empty"):
        chain().start([], max_tokens=9)
    with pytest.raises(ValueError, match="a row has no tokens"):
        next(Session(chain(), 2).stream(max_tokens=1))


def test_a_model_on_a_mesh_writes_the_same():
    mesh = jax.make_mesh((1,), ("data",), axis_types=(AxisType.Auto,))
    graphdef, params = nnx.split(Chain(words("1é€😀!")))
    params = jax.device_put(params, NamedSharding(mesh, PartitionSpec()))
    engine = Engine(nnx.merge(graphdef, params), TOKENIZER)
    (completion,) = engine.generate(["1"], max_tokens=10)
    assert completion.text == "é€😀!"
