"""Text out of tokens, as early as it is certain."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from sparsek_jax.data import Tokenizer

# A character that is not yet complete decodes to at most three of these.
_BROKEN = "\N{REPLACEMENT CHARACTER}"
_MAX_BROKEN = 3
# So many tokens without the end of a character are not going to become one.
_MAX_PENDING = 64


class TextStream:
    """The text of one row of tokens, which arrive a few at a time.

    A token may hold a part of a character, and a text the beginning of a stop string; both are held
    back until more is known. What comes out does not depend on how the tokens were grouped.

    Attributes:
      text: All that came out so far.
      num_tokens: How many tokens were taken.
      stopped: Whether the text ended before a stop string. Further tokens are ignored.
    """

    def __init__(
        self, tokenizer: Tokenizer, *, stop: Sequence[str] = (), context: Iterable[int] = ()
    ):
        """Starts an empty text.

        Args:
          tokenizer: Decodes the tokens.
          stop: Strings, none empty, before which the text ends. Of several, the one that is
            complete first counts.
          context: The tokens before, since some tokenizers drop the space before a text's first
            word.
        """
        self._tokenizer, self._stop = tokenizer, tuple(stop)
        # The window that is decoded: some context, then pending tokens, of whose text the first
        # `_shown` characters, counted with the context's, came out.
        self._ids = list(context)
        self._num_context = len(self._ids)
        self._shown = len(tokenizer.decode(self._ids))
        self._held = ""
        self.text, self.num_tokens, self.stopped = "", 0, False

    def push(self, ids: Iterable[int]) -> str:
        """Takes tokens and returns the text that has become certain."""
        return "".join(self._push(int(i)) for i in ids)

    def flush(self) -> str:
        """Returns the rest when no more tokens follow; what is broken becomes U+FFFD."""
        decoded = self._tokenizer.decode(self._ids)[self._shown :]
        self._shown += len(decoded)
        return self._release(decoded, at_end=True)

    def _push(self, token: int) -> str:
        if self.stopped:
            return ""
        self.num_tokens += 1
        self._ids.append(token)
        decoded = self._tokenizer.decode(self._ids)
        num_broken = len(decoded) - len(decoded.rstrip(_BROKEN))
        certain = len(decoded) - min(num_broken, _MAX_BROKEN)
        if num_broken and len(self._ids) - self._num_context >= _MAX_PENDING:
            num_broken, certain = 0, len(decoded)
        new = decoded[self._shown : certain]
        self._shown = max(self._shown, certain)
        if not num_broken:
            # At the end of a character: these tokens are the context of the next.
            del self._ids[: self._num_context]
            self._num_context = len(self._ids)
            self._shown = len(self._tokenizer.decode(self._ids))
        return self._release(new)

    def _release(self, new: str, *, at_end: bool = False) -> str:
        """Adds to the held text, and returns the part that no stop string can begin in."""
        if self.stopped:
            return ""
        held = self._held + new
        ends = [(start + len(s), start) for s in self._stop if (start := held.find(s)) >= 0]
        if ends:
            self.stopped = True
            _, certain = min(ends)
        elif at_end:
            certain = len(held)
        else:
            certain = len(held) - max((_overlap(held, s) for s in self._stop), default=0)
        self._held = "" if self.stopped else held[certain:]
        self.text += held[:certain]
        return held[:certain]


def _overlap(text: str, stop: str) -> int:
    """Length of the longest beginning of `stop`, short of all of it, that `text` ends with."""
    for size in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:size]):
            return size
    return 0
