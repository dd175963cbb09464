"""Batches of texts of similar lengths, in few shapes."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

_LEAST_WIDTH = 64


def padded_width(length: int) -> int:
    """Returns the least of 64, 96, 128, 192, 256, 384 and so on that is at least `length`.

    So two programs are compiled for each doubling of the length, and at most a third of a row is
    padding, unless it is short.
    """
    power = max(_LEAST_WIDTH, 1 << max(length - 1, 0).bit_length())
    between = power * 3 // 4
    return between if length <= between and power > _LEAST_WIDTH else power


def batches(lengths: Sequence[int], batch_size: int) -> Iterator[tuple[int, ...]]:
    """Indices of texts in batches, the longest first, so that too long ones fail at the start."""
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    return itertools.batched(order, batch_size)
