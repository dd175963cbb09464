"""The memory of a text as a page that a browser opens from disk, with nothing from a network."""

from __future__ import annotations

import base64
import html
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int32

from sparsek_jax.data import Tokenizer
from sparsek_jax.generation.explain.memory import QUANTILES, Memory
from sparsek_jax.generation.text import TextStream

_TEMPLATE = Path(__file__).with_name("page.html")


def token_pieces(tokenizer: Tokenizer, tokens: Iterable[int]) -> list[str]:
    """Cuts a text into the pieces that its tokens add to it.

    Joined, they are the text. A character that is spread over tokens belongs to the last of them,
    the others are empty, and so is a special token. Bytes that are no UTF-8 become U+FFFD, at their
    token or soon after it.
    """
    stream = TextStream(tokenizer)
    pieces = [stream.push([token]) for token in tokens]
    if pieces:
        pieces[-1] += stream.flush()
    return pieces


def page(
    memory: Memory,
    tokenizer: Tokenizer,
    tokens: Int32[np.ndarray, " T"],
    *,
    title: str,
    prompt_length: int | None = None,
) -> str:
    """Writes the page.

    Args:
      memory: Of these tokens.
      tokenizer: Decodes them.
      tokens: The text, `[T]`.
      title: What stands on top.
      prompt_length: Tokens before the first that was generated, which is marked; None for none.

    Returns:
      HTML. Its size is about 20 bytes for each token, layer and score head.
    """
    heads = memory.until.shape[1]
    data = {
        "layers": memory.layers,
        "heads": ["all heads"] if memory.shared_scores else [f"head {i}" for i in range(heads)],
        "shared_scores": memory.shared_scores,
        "num_selected": memory.num_selected,
        "window": memory.sliding_window,
        "quantiles": QUANTILES,
        "prompt_length": prompt_length,
        "pieces": token_pieces(tokenizer, tokens),
        "special": _special_names(tokenizer, tokens),
        "arrays": {
            "ids": _packed(tokens.astype(np.int32)),
            "score": _packed(memory.score),
            "until": _packed(memory.until),
            "slot": _packed(memory.slot),
            "displaced": _packed(memory.displaced.astype(np.uint8)),
            "rejected": _packed(memory.rejected.astype(np.uint8)),
            "moments": _packed(memory.moments),
            "ages": _packed(memory.ages),
        },
    }
    # In a script nothing is escaped, so nothing in it may look like a tag.
    text = re.sub("[<>&]", lambda match: f"\\u{ord(match[0]):04x}", json.dumps(data))
    parts = {"TITLE": html.escape(title), "DATA": text}
    template = _TEMPLATE.read_text(encoding="utf-8")
    return re.sub("__(TITLE|DATA)__", lambda match: parts[match[1]], template)


def _special_names(tokenizer: Tokenizer, tokens: Int32[np.ndarray, " T"]) -> dict[int, str]:
    """What to show for tokens without a text, by position."""
    names = {tokenizer.eos_id: "end"} | {tokenizer.bos_id: "begin"}
    return {
        position: names.get(int(token), f"special {token}")
        for position, token in enumerate(tokens)
        if tokenizer.byte_lengths[token] == 0
    }


def _packed(array: np.ndarray) -> dict[str, Any]:
    """An array for JSON, to the bit; in JavaScript's byte order, which is little-endian."""
    little = np.ascontiguousarray(array, array.dtype.newbyteorder("<"))
    encoded = base64.b64encode(little.tobytes()).decode()
    return {"dtype": array.dtype.name, "shape": array.shape, "base64": encoded}
