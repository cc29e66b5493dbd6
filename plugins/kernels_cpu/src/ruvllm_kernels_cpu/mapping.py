"""Finds out whether an array is nothing but a view of a file."""

from __future__ import annotations

import mmap
from typing import Any

import numpy as np
import numpy.typing as npt


def mapping_under(array: npt.NDArray[Any]) -> mmap.mmap | None:
    """The read-only mapping whose memory `array` shows, or None."""
    owner: Any = array
    while isinstance(owner, (np.ndarray, memoryview)):
        owner = owner.obj if isinstance(owner, memoryview) else owner.base
    if not isinstance(owner, mmap.mmap):
        return None
    with memoryview(owner) as whole:  # what was written to a private mapping is in no file
        return owner if whole.readonly else None
