"""One trainer at a time in a run's directory.

Two would write the same checkpoints, and one would replace the metrics that the other appends to.
"""

import os
import socket
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

# By directory. The lock is the open file's, so the system gives it up when the process ends in any
# way; the file itself stays, as whoever removes it may take away another trainer's.
_held: dict[Path, int] = {}


def lock(workdir: Path) -> None:
    """Keeps other trainers out of a directory until this process ends.

    Of several processes of one run, process 0 takes the lock and all learn whether it could. A
    process that asks again has it already. Where files cannot be locked, it warns and goes on.

    Args:
      workdir: The run's directory; it exists.

    Raises:
      ConfigError: Another process trains there.
    """
    mine = jax.process_index() != 0 or _take(workdir)
    # A process that went on would wait for one that has ended.
    if not multihost_utils.broadcast_one_to_all(np.bool_(mine)):
        raise ConfigError(
            f"workdir={str(workdir)!r}: another process trains there{_holder(workdir)}; expected a "
            "directory in which none does: wait for it, stop it, or choose another --workdir"
        )


def _take(workdir: Path) -> bool:
    """Whether no other process holds the lock, as far as one can know."""
    key = workdir.resolve()
    if key in _held:
        return True
    if fcntl is None:
        _warn(workdir, "this system has no fcntl")
        return True
    try:
        file = os.open(workdir / LOCK_FILE, os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        _warn(workdir, error.strerror)
        return True
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(file)
        return False
    except OSError as error:  # Some network file systems have no locks.
        os.close(file)
        _warn(workdir, error.strerror)
        return True
    _held[key] = file
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
