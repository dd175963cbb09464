"""The text of single tokens, of which some hold only a part of a character."""

from __future__ import annotations

from collections.abc import Iterable

from sparsek_jax.data import Tokenizer

_BROKEN = "\N{REPLACEMENT CHARACTER}"
# Tokenizers mark what begins a character once, or once for each of its bytes.
_MAX_MARKS = 3
# Tokens after which a text that does not become whole is taken as it is.
_MAX_GROUP = 32


def token_pieces(tokenizer: Tokenizer, ids: Iterable[int]) -> list[str]:
    """Cuts a text into the pieces that its tokens add to it.

    Joined, they are the text. A character that is spread over tokens belongs to the last of them,
    the others are empty, and so is a special token. Bytes that are no UTF-8 become U+FFFD, at their
    token or soon after it.

    Args:
      tokenizer: Decodes.
      ids: Of the text.
    """
    ids = [int(i) for i in ids]
    pieces: list[str] = []
    # Tokens are decoded behind those before: some tokenizers drop the space in front of the first.
    context = begin = 0
    done = before = 0
    for end in range(1, len(ids) + 1):
        text = tokenizer.decode(ids[context:end])[before:]
        is_whole = not text.endswith(_BROKEN) or end - begin == _MAX_GROUP or end == len(ids)
        stable = text
        for _ in range(0 if is_whole else _MAX_MARKS):
            stable = stable.removesuffix(_BROKEN)
        pieces.append(stable[done:])
        done = max(done, len(stable))
        if is_whole:
            context, begin = begin, end
            done, before = 0, len(tokenizer.decode(ids[context:end]))
    return pieces
