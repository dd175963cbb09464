"""A conversation that is one growing text: only what is new is appended to the cache."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from sparsek_jax.generation.engine import Session
from sparsek_jax.generation.sampling import Sampling


class Chat:
    """Text that a person and a model add to in turn.

    The model remembers exactly the text that was said and shown, so an end-of-document token or a
    stop string ends an answer and is forgotten.
    """

    def __init__(
        self,
        session: Session,
        *,
        max_tokens: int,
        sampling: Sampling | None = None,
        stop: Sequence[str] = (),
    ):
        """Begins with an empty text.

        Args:
          session: A new one, of one row.
          max_tokens: Most tokens of an answer.
          sampling: As of `Session.stream`.
          stop: As of `Session.stream`.
        """
        self._session, self._max_tokens = session, max_tokens
        self._sampling, self._stop = sampling, tuple(stop)
        self._text = ""

    @property
    def is_empty(self) -> bool:
        """Whether nothing was said yet."""
        return not self._text

    def append(self, text: str) -> None:
        """Appends text as it is.

        Raises:
          ValueError: There is no room for it.
        """
        self._session.append([text])
        # Only how it ends matters, and whether there is any.
        self._text = text or self._text

    def say(self, line: str) -> None:
        """Appends text on lines of its own.

        Raises:
          ValueError: There is no room for it.
        """
        begin = "" if self.is_empty or self._text.endswith("\n") else "\n"
        self.append(f"{begin}{line}\n")

    def answer(self, *, cancelled: Callable[[], bool], block_seconds: float) -> Iterator[str]:
        """Yields the model's answer in pieces; arguments as of `Session.stream`.

        Where room is limited, the answer is not longer than what is left.

        Raises:
          ValueError: There is no room at all.
          NonFiniteLogitsError: Logits are not finite.
        """
        session = self._session
        room = session.room
        # Beyond a stop string more was written than is shown, which has to be taken back.
        before = session.snapshot() if self._stop else None
        pieces = session.stream(
            max_tokens=self._max_tokens if room is None else max(1, min(self._max_tokens, room)),
            sampling=self._sampling,
            stop=self._stop,
            block_seconds=block_seconds,
            cancelled=cancelled,
        )
        for _, piece in pieces:
            yield piece
        (completion,) = session.completions
        if completion.reason == "stop":
            session.restore(before)
            session.append([completion.text])
        self._text = completion.text or self._text
