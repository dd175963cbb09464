"""One trainer at a time in a run's directory.

Two would write the same checkpoints, and one would replace the metrics that the other appends to.
"""

import contextlib
import os
import socket
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
from absl import logging
from jax.experimental import multihost_utils

from sparsek_jax.training.config import ConfigError

try:
    import fcntl
except ModuleNotFoundError:  # Not a POSIX system.
    fcntl = None

LOCK_FILE = "trainer.lock"


@contextlib.contextmanager
def lock(workdir: Path) -> Iterator[None]:
    """Keeps other trainers out of a directory, until its block or this process ends in any way.

    Of several processes of one run, process 0 takes the lock and all learn whether it could. Where
    files cannot be locked, it warns and goes on.

    Args:
      workdir: The run's directory; it exists.

    Raises:
      ConfigError: Another trainer is there.
    """
    # The lock is the open file's. The file stays: whoever removes it may take another trainer's.
    with contextlib.ExitStack() as stack:
        mine = jax.process_index() != 0 or _take(workdir, stack)
        # A process that went on would wait for one that has ended.
        if not multihost_utils.broadcast_one_to_all(np.bool_(mine)):
            raise ConfigError(
                f"workdir={str(workdir)!r}: another process trains there{_holder(workdir)}; "
                "expected a directory in which none does: wait for it, stop it, or choose another "
                "--workdir"
            )
        yield


def _take(workdir: Path, stack: contextlib.ExitStack) -> bool:
    """Whether no other trainer holds the lock, as far as one can know; it lasts as the stack."""
    if fcntl is None:
        _warn(workdir, "this system has no fcntl")
        return True
    try:
        file = os.open(workdir / LOCK_FILE, os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        _warn(workdir, error.strerror)
        return True
    stack.callback(os.close, file)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:  # Some network file systems have no locks.
        _warn(workdir, error.strerror)
        return True
    # The name is a courtesy, for which a full disk has no room.
    with contextlib.suppress(OSError):
        os.ftruncate(file, 0)
        os.write(file, f"process {os.getpid()} on {socket.gethostname()}\n".encode())
    return True


def _warn(workdir: Path, reason: str) -> None:
    logging.warning(
        "workdir=%r cannot be locked (%s): see to it that no other process trains there",
        str(workdir),
        reason,
    )


def _holder(workdir: Path) -> str:
    """What the holder of the lock wrote about itself, in parentheses; empty if nothing is known."""
    try:
        text = (workdir / LOCK_FILE).read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""
    return f" ({text})" if text else ""
