"""Gives mapped pages of a file back to the system once they have been copied elsewhere."""

from __future__ import annotations

import mmap
from typing import Any

import numpy as np
import numpy.typing as npt


def release(array: npt.NDArray[Any]) -> int:
    """Take the pages that lie wholly inside `array` out of this process's memory; they are read again when needed.

    Does something only for a contiguous view of a read-only file mapping, whose pages are in the file: of anything else
    they would be lost. Returns how many bytes were let go, 0 where nothing could be.
    """
    mapping = mapping_under(array)
    if mapping is None or not array.flags.c_contiguous or not hasattr(mmap, "MADV_DONTNEED"):
        return 0
    start = array.ctypes.data - np.frombuffer(mapping, np.uint8, 1).ctypes.data
    stop = start + array.nbytes
    if start < 0 or stop > len(mapping):
        return 0
    first = -(-start // mmap.PAGESIZE) * mmap.PAGESIZE
    # The last page of a file is whole, though the mapping is not: what follows its end belongs to nobody else.
    last = stop if stop == len(mapping) else stop // mmap.PAGESIZE * mmap.PAGESIZE
    if last <= first:
        return 0
    mapping.madvise(mmap.MADV_DONTNEED, first, last - first)
    return last - first


def mapping_under(array: npt.NDArray[Any]) -> mmap.mmap | None:
    """The read-only mapping whose memory `array` shows, or None."""
    owner: Any = array
    while isinstance(owner, (np.ndarray, memoryview)):
        owner = owner.obj if isinstance(owner, memoryview) else owner.base
    if not isinstance(owner, mmap.mmap):
        return None
    with memoryview(owner) as whole:  # what was written to a private mapping is in no file
        return owner if whole.readonly else None
