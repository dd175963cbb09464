"""Signals that ask to stop, rather than stop."""

import contextlib
import signal
from collections.abc import Iterator, Sequence

import jax
import numpy as np
from jax.experimental import multihost_utils


class Stop:
    """Whether a signal has asked to stop; all processes agree on the answer.

    Attributes:
      name: Of the signal that came; empty before.
    """

    def __init__(self, every: int):
        """Lets several processes agree only in steps that are a multiple of `every`."""
        self.name = ""
        self._every = every

    def __call__(self, step: int) -> bool:
        """Asked after every step, by every process."""
        if jax.process_count() == 1:
            return bool(self.name)
        # Agreeing waits for every process, so it is not done after each step.
        if step % self._every:
            return False
        asked = multihost_utils.process_allgather(np.bool_(self.name)).any()
        if asked:
            self.name = self.name or "a signal to another process"
        # Not whether this process has a signal by now: one that came meanwhile waits for the next
        # agreement.
        return bool(asked)


@contextlib.contextmanager
def stop_signals(signals: Sequence[signal.Signals], *, every: int = 1) -> Iterator[Stop]:
    """Turns signals into a request; a second one of the same kind acts at once.

    Args:
      signals: Which ones.
      every: Of `Stop`.
    """
    stop = Stop(every)

    def request(number, frame):
        del frame
        stop.name = signal.Signals(number).name
        signal.signal(number, previous[number])

    previous = {number: signal.getsignal(number) for number in signals}
    for number in previous:
        signal.signal(number, request)
    try:
        yield stop
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
