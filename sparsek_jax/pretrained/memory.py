"""How the process gives memory back."""

import contextlib
import ctypes

_M_MMAP_THRESHOLD = -3  # of glibc's malloc.h
_BLOCK = 2**20


def unmap_freed_blocks() -> None:
    """Has every block of a megabyte or more returned to the system as soon as it is freed.

    Else glibc, having freed a large block once, takes the next ones from heaps, of which every
    thread has its own, and which cannot shrink below a block in use: that costs up to a quarter of
    the model. Nothing happens where the allocator is another.
    """
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, _BLOCK)
