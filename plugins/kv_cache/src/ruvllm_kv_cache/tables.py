"""Block tables as arrays: where tokens are, for one sequence and for a batch."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Table = npt.NDArray[np.int32]
Slots = npt.NDArray[np.int64]


def slots_of(table: Table, size: int, start: int, stop: int) -> Slots:
    """Places of the tokens [start, stop) of a sequence whose block n of `size` tokens is ``table[n]``."""
    if stop - start == 1:
        return np.array([int(table[start // size]) * size + start % size], dtype=np.int64)
    at = np.arange(start, stop, dtype=np.int64)
    slots: Slots = table[at // size] * np.int64(size) + at % size
    return slots


def stacked(rows: Sequence[Table]) -> npt.NDArray[np.int32]:
    """Tables of several sequences as ``[B, M]``, filled up with zeros."""
    if len(rows) == 1:
        return rows[0][None]
    found = np.zeros((len(rows), max(map(len, rows))), dtype=np.int32)
    for row, table in zip(found, rows, strict=True):
        row[: len(table)] = table
    return found


def int32(values: Sequence[int]) -> npt.NDArray[np.int32]:
    return np.array(values, dtype=np.int32)


def joined(parts: Sequence[npt.NDArray[np.int64]]) -> npt.NDArray[np.int64]:
    return parts[0] if len(parts) == 1 else np.concatenate(parts)
