import json

import numpy as np
import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

from sparsek_jax.data import load_tokenizer
from sparsek_jax.data.tokenizer import tokenizer_fingerprint, train_bpe

TEXTS = [
    "def f(x):\n    return x + 1\n",
    "Grüße, 世界! \N{GRINNING FACE} \ufeff\r\n\t\0",
    "for <|eos|> and <|bos|> in the text: they are text",
    " ",
    "",
]


@pytest.fixture(scope="module")
def bpe(tmp_path_factory):
    directory = tmp_path_factory.mktemp("bpe")
    train_bpe(TEXTS * 3, 300, directory / "tokenizer.json")
    return load_tokenizer("bpe:300", directory=directory)


@pytest.fixture(params=["bytes", "bpe"])
def tokenizer(request):
    return load_tokenizer("bytes") if request.param == "bytes" else request.getfixturevalue("bpe")


@pytest.mark.parametrize("text", TEXTS)
def test_round_trip_and_exact_byte_lengths(tokenizer, text):
    ids = tokenizer.encode(text)
    assert ids.dtype == np.int32
    assert tokenizer.decode(ids) == text
    assert tokenizer.byte_lengths[ids].sum() == len(text.encode())
    assert not np.isin([tokenizer.bos_id, tokenizer.eos_id], ids).any()


@given(text=st.text(max_size=50))
def test_any_text_round_trips(bpe, text):
    for tokenizer in (load_tokenizer("bytes"), bpe):
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert tokenizer.byte_lengths[ids].sum() == len(text.encode())


def test_ids_bounds_and_specials(tokenizer):
    assert tokenizer.byte_lengths.shape == (tokenizer.vocab_size,)
    assert {tokenizer.bos_id, tokenizer.eos_id} <= set(range(tokenizer.vocab_size))
    assert tokenizer.byte_lengths[[tokenizer.bos_id, tokenizer.eos_id]].tolist() == [0, 0]
    assert tokenizer.decode([tokenizer.bos_id, *tokenizer.encode("ab"), tokenizer.eos_id]) == "ab"


def test_decode_of_broken_utf8_does_not_raise():
    tokenizer = load_tokenizer("bytes")
    assert tokenizer.decode(tokenizer.encode("aé")[:2]) == "a\N{REPLACEMENT CHARACTER}"


def test_batch_equals_single(tokenizer):
    for ids, text in zip(tokenizer.encode_batch(TEXTS), TEXTS, strict=True):
        np.testing.assert_array_equal(ids, tokenizer.encode(text))


def test_bpe_compresses_and_training_is_deterministic(bpe, tmp_path):
    assert bpe.vocab_size == 300
    assert len(bpe.encode(TEXTS[0])) < len(TEXTS[0]) * 2 / 3
    for name in ("a.json", "b.json"):
        train_bpe(TEXTS * 3, 300, tmp_path / name)
    assert (tmp_path / "a.json").read_bytes() == (tmp_path / "b.json").read_bytes()


def test_bpe_without_prepared_directory_is_refused():
    with pytest.raises(ValueError, match=r"data\.tokenizer='bpe:300'"):
        load_tokenizer("bpe:300")


def sentencepiece_like(path, *, eos="</s>"):
    """Like Llama 2's: metaspace, byte fallback, a post-processor, and truncation left on."""
    vocab = {"<unk>": 0, "<s>": 1, eos: 2, "\u2581": 3, "a": 4, "\u2581a": 5, "é": 6}
    vocab |= {f"<0x{byte:02X}>": 7 + byte for byte in range(256)}
    tokenizer = tokenizers.Tokenizer(
        models.BPE(vocab, [("\u2581", "a")], unk_token="<unk>", byte_fallback=True)
    )
    tokenizer.normalizer = normalizers.Replace(" ", "\u2581")
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    tokenizer.add_special_tokens(["<unk>", "<s>", eos])
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A", None, [("<s>", 1)])
    tokenizer.enable_truncation(4)
    tokenizer.save(str(path))
    return path


def test_sentencepiece_style_file(tmp_path):
    tokenizer = load_tokenizer(str(sentencepiece_like(tmp_path / "tokenizer.json")))
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.vocab_size) == (1, 2, 263)
    text = "a aa é\n" * 3
    ids = tokenizer.encode(text)
    assert 1 not in ids  # no bos from the post-processor
    assert tokenizer.decode(ids) == text  # nothing truncated
    assert tokenizer.byte_lengths[ids].sum() == len(text.encode())


def test_specials_named_by_tokenizer_config(tmp_path):
    path = sentencepiece_like(tmp_path / "tokenizer.json", eos="<end>")
    with pytest.raises(ValueError, match=r"data\.tokenizer=.*no end-of-document token"):
        load_tokenizer(str(path))
    before = tokenizer_fingerprint(str(path))
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"eos_token": {"content": "<end>"}, "bos_token": None})
    )
    tokenizer = load_tokenizer(str(path))
    assert (tokenizer.bos_id, tokenizer.eos_id) == (1, 2)
    assert tokenizer_fingerprint(str(path)) != before


def test_eos_stands_in_for_a_missing_bos(tmp_path):
    tokenizer = tokenizers.Tokenizer(models.BPE({"a": 0, "b": 1}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|endoftext|>"])
    tokenizer.add_tokens(["    "])  # spelled out like GPT-NeoX's runs of spaces
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    loaded = load_tokenizer(str(tmp_path / "tokenizer.json"))
    assert loaded.bos_id == loaded.eos_id == 2
    assert loaded.byte_lengths.tolist() == [1, 1, 0, 4]


def test_a_piece_spelled_like_eos_does_not_end_a_document(tmp_path):
    """A Unigram model holds its special tokens as pieces, too."""
    pieces = [("<unk>", 0.0), ("<s>", -1.0), ("</s>", -1.0)]
    pieces += [(letter, -2.0) for letter in "ab </s>"]
    tokenizer = tokenizers.Tokenizer(models.Unigram(pieces, unk_id=0))
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    loaded = load_tokenizer(str(tmp_path / "tokenizer.json"))
    assert (loaded.bos_id, loaded.eos_id) == (1, 2)
    text = "a </s> b<s>"
    ids = loaded.encode(text)
    assert not {1, 2}.intersection(ids.tolist())
    assert "".join(pieces[i][0] for i in ids) == text


def test_file_that_is_no_tokenizer(tmp_path):
    path = tmp_path / "tokenizer.json"
    path.write_text("{}")
    with pytest.raises(ValueError, match=r"data\.tokenizer=.*expected a Hugging Face"):
        load_tokenizer(str(path))
