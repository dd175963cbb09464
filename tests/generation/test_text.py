"""Text out of tokens: parts of characters, stop strings, and spaces that tokenizers hide."""

import random

import pytest
import tokenizers
from tokenizers import decoders, models

from sparsek_jax.data import load_tokenizer
from sparsek_jax.generation.text import TextStream

BYTES = load_tokenizer("bytes")
TEXT = "né €5 😀 ok"


def pieces(stream, groups):
    out = [stream.push(group) for group in groups]
    return [*out, stream.flush()]


def by_byte(text, **kwargs):
    return pieces(TextStream(BYTES, **kwargs), [[i] for i in BYTES.encode(text)])


def grouped(ids, rng):
    """The ids in groups of random sizes."""
    ids, groups = list(ids), []
    while ids:
        size = rng.randint(1, 5)
        groups.append(ids[:size])
        ids = ids[size:]
    return groups


def test_characters_appear_when_their_last_byte_does():
    out = by_byte(TEXT)
    assert "".join(out) == TEXT
    assert out[:4] == ["n", "", "é", " "]
    assert out[4:8] == ["", "", "€", "5"]
    assert out[-1] == ""


def test_broken_bytes_become_replacement_characters_and_do_not_hold_up():
    broken = b"a\xff\xfe\xfd\xfc\xe2\x82" + b"b\xf0\x9f"
    stream = TextStream(BYTES)
    out = [stream.push([i]) for i in broken]
    assert "".join(out[:5]) == "a\ufffd"
    assert "".join(out[:8]).endswith("b")
    assert "".join(out) + stream.flush() == broken.decode(errors="replace")
    endless = TextStream(BYTES)
    assert endless.push([0x80] * 1000) != ""
    assert len(endless.text + endless.flush()) == 1000


@pytest.mark.parametrize("seed", range(5))
def test_grouping_of_tokens_changes_nothing(seed):
    rng = random.Random(seed)
    ids = rng.choices([*b"ab\xc3\xa9\xe2\x82\xac\xff"], k=80)
    expected = bytes(ids).decode(errors="replace")
    stream = TextStream(BYTES)
    assert "".join(pieces(stream, grouped(ids, rng))) == stream.text == expected
    stop = ["aba", "bb", "é€"]
    first = TextStream(BYTES, stop=stop)
    second = TextStream(BYTES, stop=stop)
    pieces(first, [ids])
    pieces(second, grouped(ids, rng))
    assert (first.text, first.num_tokens) == (second.text, second.num_tokens)


def test_stop_strings_across_tokens():
    out = by_byte("say END. more", stop=["END."])
    assert "".join(out) == "say "
    out = by_byte("say EN, ENDO, END", stop=["END."])
    assert "".join(out) == "say EN, ENDO, END"
    assert out[4:7] == ["", "", "EN,"]
    # What repeats itself: the second "aa" may begin the stop string when the first does not.
    assert "".join(by_byte("xaaab", stop=["aab"])) == "xa"
    assert "".join(by_byte("€ and €uro", stop=["€u"])) == "€ and "


def test_of_several_stop_strings_the_first_that_is_complete_counts():
    for groups in ([b"xabc"], [b"xa", b"b", b"c"]):
        stream = TextStream(BYTES, stop=["abc", "b"])
        assert "".join(pieces(stream, groups)) == "xa"
        assert stream.stopped
        assert stream.num_tokens == 3
    for stop in (["ab", "b"], ["b", "ab"]):
        assert "".join(by_byte("xab", stop=stop)) == "x"


def test_spaces_at_the_beginning_of_tokens_stay():
    """SentencePiece-style decoders drop the first space of what they are given."""
    vocab = {"<s>": 0, "</s>": 1, "▁def": 2, "▁main": 3, "(": 4, "▁": 5}
    vocab |= {f"<0x{i:02X}>": 6 + i for i in range(256)}
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab, [], byte_fallback=True))
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )

    class Loaded:
        def decode(self, ids):
            return tokenizer.decode(list(ids))

    euro = [6 + byte for byte in "€".encode()]
    ids = [3, 4, 5, *euro, 2]
    for groups in ([ids], [[i] for i in ids]):
        assert "".join(pieces(TextStream(Loaded(), context=[2]), groups)) == " main( € def"
        assert "".join(pieces(TextStream(Loaded()), groups)) == "main( € def"
