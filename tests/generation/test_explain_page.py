import base64
import html.parser
import json
import random
import re

import numpy as np
import pytest
from PIL import Image

from sparsek_jax.data import load_tokenizer
from sparsek_jax.data.tokenizer import train_bpe
from sparsek_jax.generation.explain import Memory, write_explanation
from sparsek_jax.generation.explain import files as files_module
from sparsek_jax.generation.explain.page import page, token_pieces
from sparsek_jax.generation.explain.picture import plot
from tests.generation.test_explain import LENGTH, decoder

BYTES = load_tokenizer("bytes")
TEXT = "</script><script>alert('&amp;')</script>\n<!-- __DATA__ aé€😀 中文字\0 -->"
ARRAYS = ("score", "until", "slot", "displaced", "rejected", "moments", "ages")


class Parsed(html.parser.HTMLParser):
    """Tags with their attributes, and the text in each tag."""

    def __init__(self, source):
        super().__init__()
        self.tags, self.inside = [], []
        self.feed(source)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self.inside.append("")

    def handle_data(self, data):
        if self.inside:
            self.inside[-1] += data

    def text(self, tag, **attributes):
        (found,) = (
            text
            for (name, attrs), text in zip(self.tags, self.inside, strict=True)
            if name == tag and attributes.items() <= attrs.items()
        )
        return found

    def data(self):
        return json.loads(self.text("script", id="data"))


def unpacked(packed):
    array = np.frombuffer(base64.b64decode(packed["base64"]), packed["dtype"])
    return array.reshape(packed["shape"])


def made_up(length, layers=2, heads=3, k=4, window=5, **fields):
    """A memory whose arrays have the right shapes and arbitrary content."""
    rng = np.random.default_rng(0)
    shape = (layers, heads, length)
    displaced = rng.random(shape) < 0.5
    moments = np.arange(min(window, length), length, 3, dtype=np.int32)
    start = np.arange(length)
    defaults = {
        "layers": tuple(range(layers)),
        "num_selected": k,
        "sliding_window": window,
        "shared_scores": False,
        "score": rng.standard_normal(shape).astype(np.float32),
        "until": rng.integers(np.minimum(start + 1, length), length + 1, shape).astype(np.int32),
        "slot": rng.integers(0, k, shape).astype(np.int32),
        "displaced": displaced,
        "rejected": ~displaced & (rng.random(shape) < 0.5),
        "moments": moments,
        "ages": np.sort(rng.random((layers, heads, len(moments), 5)), -1).astype(np.float32),
    }
    return Memory(**defaults | fields)


@pytest.fixture(scope="module")
def example():
    tokens = np.array([BYTES.bos_id, *TEXT.encode(), BYTES.eos_id], np.int32)
    memory = made_up(len(tokens))
    source = page(memory, BYTES, tokens, title="<b>R&D</b> __DATA__", prompt_length=9)
    return tokens, memory, source, Parsed(source)


def test_page_holds_the_arrays_to_the_bit(example):
    tokens, memory, _, parsed = example
    data = parsed.data()
    for name in ARRAYS:
        found = unpacked(data["arrays"][name])
        np.testing.assert_array_equal(found, getattr(memory, name), err_msg=name)
    np.testing.assert_array_equal(unpacked(data["arrays"]["ids"]), tokens)
    assert data["layers"] == [0, 1]
    assert data["heads"] == ["head 0", "head 1", "head 2"]
    assert (data["num_selected"], data["window"], data["prompt_length"]) == (4, 5, 9)
    assert "".join(data["pieces"]) == TEXT
    assert data["special"] == {"0": "begin", str(len(tokens) - 1): "end"}


def test_scores_that_heads_share_have_one_row():
    memory = made_up(20, heads=1, shared_scores=True)
    source = page(memory, BYTES, np.full(20, 65, np.int32), title="x")
    data = Parsed(source).data()
    assert data["heads"] == ["all heads"]
    assert data["prompt_length"] is None


def test_no_text_can_break_out_of_its_place(example):
    _, _, source, parsed = example
    assert [tag for tag, _ in parsed.tags].count("script") == 2
    assert "alert(" not in parsed.inside[-1]
    assert "b" not in [tag for tag, _ in parsed.tags]
    assert parsed.text("h1").strip() == parsed.text("title").strip() == "<b>R&D</b> __DATA__"
    assert len(re.findall("<script", source)) == 2


def test_page_asks_nothing_of_a_network(example):
    _, _, source, parsed = example
    source = source.replace(parsed.text("script", id="data").strip(), "")
    assert not re.search(r"https?:|//[a-z]|@import|url\(|fetch\(|XMLHttpRequest", source, re.I)
    for _, attributes in parsed.tags:
        assert "src" not in attributes
        assert attributes.get("href", "data:,") == "data:,"


def test_a_character_belongs_to_the_token_that_completes_it():
    pieces = token_pieces(BYTES, [BYTES.bos_id, *"aé€😀b".encode(), BYTES.eos_id])
    assert pieces == ["", "a", "", "é", "", "", "€", "", "", "", "😀", "b", ""]
    assert token_pieces(BYTES, []) == []


@pytest.mark.parametrize("vocab_size", [258, 300])
def test_pieces_of_bpe_tokens_make_up_the_text(vocab_size, tmp_path):
    path = tmp_path / "tokenizer.json"
    # It learns pieces that hold the end of a character and the beginning of the next.
    train_bpe(["中文字中文字中文 " * 9, TEXT], vocab_size, path)
    tokenizer = load_tokenizer(str(path))
    for text in (TEXT, "中文字中文字 字文中 " * 20):
        ids = tokenizer.encode(text)
        pieces = token_pieces(tokenizer, ids)
        assert len(pieces) == len(ids)
        assert "".join(pieces) == text


def test_bytes_that_are_no_text_lose_nothing():
    rng = random.Random(0)
    for _ in range(30):
        ids = [rng.choice([*b"ab", *range(190, 258)]) for _ in range(80)]
        assert "".join(token_pieces(BYTES, ids)) == BYTES.decode(ids)


@pytest.mark.parametrize(
    "sizes",
    [
        {"length": 60},
        # Nobody had to leave; nothing left the window.
        {"length": 9},
        {"length": 1},
        {"length": 700, "layers": 9, "heads": 2},
        {"length": 40, "window": 0, "heads": 1, "layers": 1},
    ],
)
def test_picture_of_any_size(sizes, tmp_path):
    path = tmp_path / "picture.png"
    plot(made_up(**sizes), path, title="$x_{1} %", prompt_length=sizes["length"] // 2)
    with Image.open(path) as image:
        assert image.width == 1430


def test_writes_both_files_or_leaves_the_old_ones(tmp_path, monkeypatch):
    directory = tmp_path / "new" / "directory"
    model = decoder()
    tokens = [BYTES.bos_id, *b"text"] * (LENGTH // 5)
    paths = write_explanation(directory, model, BYTES, tokens, title="a", prompt_length=10)
    assert [path.name for path in paths] == ["explain.html", "explain.png"]
    assert "".join(Parsed(paths[0].read_text()).data()["pieces"]) == "text" * 28

    def fail(memory, path, **options):
        path.write_text("half a")
        raise OSError("no space left")

    before = paths[1].read_bytes()
    monkeypatch.setattr(files_module, "plot", fail)
    with pytest.raises(OSError, match="no space left"):
        write_explanation(directory, model, BYTES, tokens, title="a")
    assert paths[1].read_bytes() == before
    assert sorted(path.name for path in directory.iterdir()) == ["explain.html", "explain.png"]
