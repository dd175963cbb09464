"""Tokenizers: bytes, a BPE trained on the corpus, a Hugging Face tokenizer.json, or bare ids."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
from jaxtyping import Int32

from sparsek_jax.data.config import validate_tokenizer_spec

TRAINED_TOKENIZER = "tokenizer.json"  # file name inside a prepared directory

_BOS = "<|bos|>"
_EOS = "<|eos|>"
_KNOWN_BOS = (_BOS, "<|begin_of_text|>", "<s>", "<bos>", "[CLS]")
_KNOWN_EOS = (_EOS, "<|end_of_text|>", "<|endoftext|>", "</s>", "<eos>", "[SEP]")
_BYTE_TOKEN = re.compile(r"<0x[0-9A-Fa-f]{2}>")


class Tokenizer(Protocol):
    """What the pipeline, the model and the evaluation need of a tokenizer.

    Attributes:
      vocab_size: every id is in [0, vocab_size).
      bos_id: the first input of each document; equals eos_id where the tokenizer has no bos.
      eos_id: the target that ends each document.
      byte_lengths: UTF-8 bytes that each id stands for, 0 for special tokens. Summed over a
        document's ids it is the document's length in bytes, exactly for byte-level tokenizers
        without a normaliser; for SentencePiece-style ones the added leading space counts too, and
        for WordPiece the dropped spaces do not.
      exact_bytes: whether `byte_lengths` is exact in that sense.
    """

    vocab_size: int
    bos_id: int
    eos_id: int
    byte_lengths: Int32[np.ndarray, " vocab"]
    exact_bytes: bool

    def encode(self, text: str) -> Int32[np.ndarray, " n"]:
        """Returns the ids of `text`, never a special token, even if `text` spells one."""

    def encode_batch(self, texts: Sequence[str]) -> list[Int32[np.ndarray, " n"]]:
        """Returns `encode` of each text."""

    def decode(self, ids: Iterable[int]) -> str:
        """Returns the text of `ids`; special tokens vanish, broken UTF-8 becomes U+FFFD."""


class ByteTokenizer:
    """UTF-8 bytes as ids 0..255, then bos and eos."""

    def __init__(self):
        self.bos_id, self.eos_id, self.vocab_size = 256, 257, 258
        self.byte_lengths = np.ones(self.vocab_size, np.int32)
        self.byte_lengths[256:] = 0
        self.exact_bytes = True

    def encode(self, text: str) -> Int32[np.ndarray, " n"]:
        """See `Tokenizer.encode`."""
        return np.frombuffer(text.encode(), np.uint8).astype(np.int32)

    def encode_batch(self, texts: Sequence[str]) -> list[Int32[np.ndarray, " n"]]:
        """See `Tokenizer.encode_batch`."""
        return [self.encode(text) for text in texts]

    def decode(self, ids: Iterable[int]) -> str:
        """See `Tokenizer.decode`."""
        return bytes(i for i in np.asarray(ids, np.int64).tolist() if i < 256).decode(
            errors="replace"
        )


class IdTokenizer:
    """Numbers in place of words, for rows of tokens that are no text; id 0 is bos and eos.

    Args:
      vocab_size: ids there are.
    """

    def __init__(self, vocab_size: int):
        self.bos_id = self.eos_id = 0
        self.vocab_size = vocab_size
        self.byte_lengths = np.zeros(vocab_size, np.int32)
        self.exact_bytes = True

    def encode(self, text: str) -> Int32[np.ndarray, " n"]:
        """Returns the numbers that `text` spells, between spaces.

        Raises:
          ValueError: something else stands there, or a number that is no id, or is 0.
        """
        words = text.split()
        if wrong := [w for w in words if not w.isdecimal() or not 0 < int(w) < self.vocab_size]:
            raise ValueError(f"{wrong[0]!r} is no token; expected 1 to {self.vocab_size - 1}")
        return np.array([int(word) for word in words], np.int32)

    def encode_batch(self, texts: Sequence[str]) -> list[Int32[np.ndarray, " n"]]:
        """See `Tokenizer.encode_batch`."""
        return [self.encode(text) for text in texts]

    def decode(self, ids: Iterable[int]) -> str:
        """See `Tokenizer.decode`; every number has a space before it."""
        return "".join(f" {i}" for i in np.asarray(ids, np.int64).tolist() if i)


class HuggingFaceTokenizer:
    """A tokenizer.json file of the Hugging Face `tokenizers` library.

    bos and eos are those of a tokenizer_config.json in the same directory, else the well-known
    token names that the vocabulary holds. Truncation and padding written in the file are ignored.

    Args:
      path: the tokenizer.json file.

    Raises:
      ValueError: the file is not a tokenizer, or has no token that can end a document.
    """

    def __init__(self, path: Path):
        import tokenizers

        try:
            tokenizer = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises bare Exception
            raise ValueError(
                f"data.tokenizer={str(path)!r}: {error}; expected a Hugging Face tokenizer.json"
            ) from error
        tokenizer.no_truncation()
        tokenizer.no_padding()
        tokenizer.encode_special_tokens = True  # a text that spells "<|eos|>" must not end itself
        self._tokenizer = tokenizer
        vocab = tokenizer.get_vocab(with_added_tokens=True)
        self.vocab_size = max(vocab.values()) + 1
        named = _named_specials(path)
        eos = next((t for t in (named.get("eos_token"), *_KNOWN_EOS) if t in vocab), None)
        if eos is None:
            raise ValueError(
                f"data.tokenizer={str(path)!r} has no end-of-document token; expected one of "
                f"{', '.join(_KNOWN_EOS)}, or eos_token in a tokenizer_config.json next to it"
            )
        bos = next((t for t in (named.get("bos_token"), *_KNOWN_BOS) if t in vocab), eos)
        self.eos_id, self.bos_id = vocab[eos], vocab[bos]
        config = json.loads(tokenizer.to_str())
        self.byte_lengths = _byte_lengths(config, vocab, self.vocab_size)
        self.byte_lengths[[self.bos_id, self.eos_id]] = 0
        self.exact_bytes = _is_byte_level(config) and config.get("normalizer") is None
        # After the first character of what is spelled like bos or eos.
        self._inside_special = re.compile(
            "|".join(rf"(?<={re.escape(s[0])})(?={re.escape(s[1:])})" for s in {bos, eos})
        )

    def encode(self, text: str) -> Int32[np.ndarray, " n"]:
        """See `Tokenizer.encode`."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[Int32[np.ndarray, " n"]]:
        """See `Tokenizer.encode_batch`; uses all cores."""
        return [self._without_specials(*pair) for pair in zip(texts, self._ids(texts), strict=True)]

    def _ids(self, texts: Sequence[str]) -> list[Int32[np.ndarray, " n"]]:
        encodings = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.asarray(encoding.ids, np.int32) for encoding in encodings]

    def _without_specials(self, text: str, ids: Int32[np.ndarray, " n"]) -> Int32[np.ndarray, " m"]:
        """The ids of a text; bos and eos, which a model may hold as pieces, are spelled out."""
        if not np.isin(ids, [self.bos_id, self.eos_id]).any():
            return ids
        ids = np.concatenate(self._ids(self._inside_special.split(text)))
        return ids[~np.isin(ids, [self.bos_id, self.eos_id])]

    def decode(self, ids: Iterable[int]) -> str:
        """See `Tokenizer.decode`."""
        return self._tokenizer.decode(np.asarray(ids, np.int64).tolist(), skip_special_tokens=True)


def load_tokenizer(spec: str, *, directory: Path | None = None) -> Tokenizer:
    """Loads the tokenizer that `config.data.tokenizer` names.

    Args:
      spec: "bytes", "bpe:<vocab_size>", "ids:<vocab_size>", or the path of a Hugging Face
        tokenizer.json.
      directory: a prepared corpus' directory (`Corpus.directory`), where a trained BPE lies.

    Returns:
      The tokenizer.

    Raises:
      ValueError: `spec` is none of these, or "bpe:..." comes without a prepared directory.
    """
    validate_tokenizer_spec(spec)
    if spec == "bytes":
        return ByteTokenizer()
    if spec.startswith("ids:"):
        return IdTokenizer(int(spec.removeprefix("ids:")))
    if not spec.startswith("bpe:"):
        return HuggingFaceTokenizer(Path(spec).expanduser())
    if directory is None or not (Path(directory) / TRAINED_TOKENIZER).is_file():
        raise ValueError(
            f"directory={str(directory)!r} holds no {TRAINED_TOKENIZER}; expected the directory "
            f"of a corpus prepared with data.tokenizer={spec!r}"
        )
    return HuggingFaceTokenizer(Path(directory) / TRAINED_TOKENIZER)


def tokenizer_fingerprint(spec: str) -> str:
    """Returns a string that changes whenever `spec` would tokenize differently."""
    if spec == "bytes" or spec.startswith(("bpe:", "ids:")):
        return spec
    path = Path(spec).expanduser()
    digest = hashlib.blake2b(path.read_bytes(), digest_size=16).hexdigest()
    return json.dumps([digest, _named_specials(path)], sort_keys=True)


def train_bpe(texts: Iterable[str], vocab_size: int, path: Path) -> None:
    """Trains a byte-level BPE and writes it to `path`.

    Args:
      texts: training text; the same texts in the same order give the same file.
      vocab_size: ids wanted, of which 256 are bytes and 2 are bos and eos. A small corpus may
        run out of pairs to merge and give fewer.
      path: the tokenizer.json to write.
    """
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, trainers

    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[_BOS, _EOS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.save(str(path))


def _named_specials(path: Path) -> dict[str, str]:
    config_path = path.with_name("tokenizer_config.json")
    if not config_path.is_file():
        return {}
    try:
        config = json.loads(config_path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{config_path}: {error}; expected JSON, or no such file") from error
    if not isinstance(config, dict):
        raise ValueError(f"{config_path} holds {config!r}; expected a JSON object, or no such file")
    named = {}
    for field in ("bos_token", "eos_token"):
        token = config.get(field)
        token = token.get("content") if isinstance(token, dict) else token
        if not isinstance(token, str | None):
            raise ValueError(f"{config_path}: {field}={token!r}; expected the text of a token")
        if token:
            named[field] = token
    return named


def _is_byte_level(config: dict) -> bool:
    stages = json.dumps([config.get("pre_tokenizer"), config.get("decoder")])
    return '"type": "ByteLevel"' in stages


def _byte_lengths(
    config: dict, vocab: dict[str, int], vocab_size: int
) -> Int32[np.ndarray, " vocab"]:
    byte_level = _is_byte_level(config)
    byte_fallback = config["model"].get("byte_fallback", False)
    continuation = config["model"].get("continuing_subword_prefix") or ""
    added = {token["id"]: token for token in config["added_tokens"]}
    lengths = np.zeros(vocab_size, np.int32)
    for token, token_id in vocab.items():
        if token_id in added:
            lengths[token_id] = 0 if added[token_id]["special"] else len(token.encode())
        elif byte_level:
            lengths[token_id] = len(token)  # one character stands for one byte
        elif byte_fallback and _BYTE_TOKEN.fullmatch(token):
            lengths[token_id] = 1
        else:
            text = token.removeprefix(continuation).replace("\N{LOWER ONE EIGHTH BLOCK}", " ")
            lengths[token_id] = len(text.encode())
    return lengths
