"""The tokenizer in a GGUF file's metadata, as the files of a Hugging Face tokenizer."""

import json
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers

from sparsek_jax.pretrained.source import ConversionError

_UNKNOWN, _CONTROL, _USER_DEFINED = 2, 3, 4  # of tokenizer.ggml.token_type
_SPACE = "\N{LOWER ONE EIGHTH BLOCK}"
_LLAMA3_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def tokenizer_files(path: Path, metadata: dict[str, Any]) -> dict[str, bytes]:
    """Builds tokenizer.json and tokenizer_config.json.

    Args:
      path: Of the file, for messages.
      metadata: Its fields.

    Returns:
      Contents by file name.

    Raises:
      ConversionError: The tokenizer is none of the byte-level BPEs of GPT-2, SmolLM and Llama 3 or
        the SentencePiece of Llama 2.
    """
    kind = metadata.get("tokenizer.ggml.model")
    tokens = metadata.get("tokenizer.ggml.tokens", [])
    if len(set(tokens)) != len(tokens) or not tokens:
        raise ConversionError(
            f"{path}: tokenizer.ggml.tokens has {len(tokens)} entries, {len(set(tokens))} of them "
            "different; expected some, all different"
        )
    if kind == "gpt2":
        tokenizer = _byte_level(path, metadata, tokens)
    elif kind == "llama":
        tokenizer = _sentencepiece(metadata, tokens)
    else:
        raise ConversionError(f"{path}: tokenizer.ggml.model={kind!r}; expected 'gpt2' or 'llama'")
    types = metadata.get("tokenizer.ggml.token_type", [1] * len(tokens))
    added = [
        tokenizers.AddedToken(token, special=kind != _USER_DEFINED, normalized=False)
        for token, kind in zip(tokens, types, strict=True)
        if kind in (_UNKNOWN, _CONTROL, _USER_DEFINED)
    ]
    tokenizer.add_tokens(added)
    config = {"tokenizer_class": "PreTrainedTokenizerFast"}
    for name in ("bos", "eos"):
        token_id = metadata.get(f"tokenizer.ggml.{name}_token_id")
        if token_id is not None:
            config[f"{name}_token"] = tokens[token_id]
    if "tokenizer.chat_template" in metadata:
        config["chat_template"] = metadata["tokenizer.chat_template"]
    return {
        "tokenizer.json": tokenizer.to_str().encode(),
        "tokenizer_config.json": (json.dumps(config, indent=2) + "\n").encode(),
    }


def _byte_level(path: Path, metadata: dict[str, Any], tokens: list[str]) -> tokenizers.Tokenizer:
    pre = metadata.get("tokenizer.ggml.pre", "gpt-2")
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    if pre == "smollm":
        digits = pre_tokenizers.Digits(individual_digits=True)
        level = pre_tokenizers.Sequence([digits, level])
    elif pre == "llama-bpe":
        words = pre_tokenizers.Split(tokenizers.Regex(_LLAMA3_WORDS), "isolated")
        level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        level = pre_tokenizers.Sequence([words, level])
    elif pre != "gpt-2":
        raise ConversionError(
            f"{path}: tokenizer.ggml.pre={pre!r}; expected 'gpt-2', 'smollm' or 'llama-bpe'"
        )
    merges = [tuple(merge.split(" ")) for merge in metadata["tokenizer.ggml.merges"]]
    vocab = {token: i for i, token in enumerate(tokens)}
    # Llama 3 takes a word that is a token whole, though no merge may lead there.
    model = models.BPE(vocab=vocab, merges=merges, ignore_merges=pre == "llama-bpe")
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = level
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _sentencepiece(metadata: dict[str, Any], tokens: list[str]) -> tokenizers.Tokenizer:
    vocab = {token: i for i, token in enumerate(tokens)}
    unknown = tokens[metadata.get("tokenizer.ggml.unknown_token_id", 0)]
    model = models.BPE(
        vocab=vocab,
        merges=_merges(vocab, metadata["tokenizer.ggml.scores"]),
        unk_token=unknown,
        fuse_unk=True,
        byte_fallback=True,
    )
    tokenizer = tokenizers.Tokenizer(model)
    replace = normalizers.Replace(" ", _SPACE)
    prefixed = metadata.get("tokenizer.ggml.add_space_prefix", True)
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend(_SPACE), replace] if prefixed else [replace]
    )
    steps = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence(
        [*steps, decoders.Strip(" ", 1, 0)] if prefixed else steps
    )
    return tokenizer


def _merges(vocab: dict[str, int], scores: list[float]) -> list[tuple[str, str]]:
    """Merges that act like SentencePiece, which joins the pair whose whole scores best."""
    ranked = []
    for token, token_id in vocab.items():
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            if left in vocab and right in vocab:
                ranked.append((-scores[token_id], vocab[left], vocab[right], left, right))
    return [(left, right) for *_, left, right in sorted(ranked)]
