import random

import numpy as np
import pytest

from sparsek_jax.data import load_tokenizer
from sparsek_jax.data.tokenizer import train_bpe
from sparsek_jax.generation.pieces import token_pieces

BYTES = load_tokenizer("bytes")
TEXT = "if x < 1:\n\treturn 'aé€😀 中文字'\n"


def test_a_character_belongs_to_the_token_that_completes_it():
    pieces = token_pieces(BYTES, BYTES.encode("aé€😀b"))
    assert pieces == ["a", "", "é", "", "", "€", "", "", "", "😀", "b"]


def test_special_tokens_add_nothing():
    ids = [BYTES.bos_id, *b"ab", BYTES.eos_id]
    assert token_pieces(BYTES, ids) == ["", "a", "b", ""]


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


def test_bytes_that_are_no_text_are_marked_and_lose_nothing():
    rng = random.Random(0)
    for _ in range(50):
        ids = [rng.choice([*b"ab", *range(190, 258)]) for _ in range(80)]
        assert "".join(token_pieces(BYTES, ids)) == BYTES.decode(ids)
    ids = np.full(100, 0xFF)
    assert "".join(token_pieces(BYTES, ids)) == BYTES.decode(ids)
    assert token_pieces(BYTES, []) == []
