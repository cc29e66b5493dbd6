"""`Recent`: the latest prompts that there was feedback on, in bounded memory."""

from __future__ import annotations

from collections.abc import Generator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ruvllm_core.protocols import FloatArray

_SLICE_VALUES = 1 << 18
_FIELDS = {"states": np.float16, "quality": np.float32, "surprise": np.float32, "owners": np.int64, "serials": np.int64}


@dataclass(frozen=True, eq=False)
class Snapshot:
    """A copy of what one pattern has at a moment: `n` rows, the oldest first.

    Attributes:
        states: float16 ``[n, C]``.
        quality, surprise: float32 ``[n]``.
        slots, serials: where the rows were, and which; a slot may hold another row by now.
    """

    states: npt.NDArray[np.float16]
    quality: FloatArray
    surprise: FloatArray
    slots: npt.NDArray[np.int64]
    serials: npt.NDArray[np.int64]


class Recent:
    """A ring of states, what was thought of their answers, and the pattern they belong to.

    States are kept in half precision: their cosines are off by less than 0.001, which tells no two topics apart.

    Args:
        size: of a state, C.
        capacity: most rows.
    """

    def __init__(self, size: int, capacity: int) -> None:
        self._size, self._capacity, self._written = size, capacity, 0
        self._allocate(0)

    def _allocate(self, rows: int) -> None:
        self._arrays = {
            name: np.zeros((rows, self._size) if name == "states" else rows, dtype) for name, dtype in _FIELDS.items()
        }

    def __len__(self) -> int:
        return min(self._written, self._capacity)

    def add(self, state: FloatArray, quality: float, surprise: float, owner: int) -> None:
        """Remember one more, and forget the oldest if there is no room."""
        slot = self._written % self._capacity
        if slot == len(self._arrays["owners"]):  # grows as it fills: most users never fill it
            old = self._arrays
            self._allocate(min(max(2 * slot, 64), self._capacity))
            for name, values in old.items():
                self._arrays[name][:slot] = values
        for name, value in zip(_FIELDS, (state, quality, surprise, owner, self._written), strict=True):
            self._arrays[name][slot] = value
        self._written += 1

    def count(self, owner: int) -> int:
        """How many a pattern has."""
        return int((self._arrays["owners"][: len(self)] == owner).sum())

    def snapshot(self, owner: int) -> Generator[None, None, Snapshot]:
        """A copy of what a pattern has, made a slice at a time."""
        serials = self._arrays["serials"][: len(self)]
        slots = np.flatnonzero(self._arrays["owners"][: len(self)] == owner)
        slots = slots[np.argsort(serials[slots])]
        step = max(_SLICE_VALUES // self._size, 1)
        shapes = {name: (len(slots), *values.shape[1:]) for name, values in self._arrays.items()}
        whole = {name: np.empty(shapes[name], dtype) for name, dtype in _FIELDS.items()}
        for start in range(0, len(slots), step):
            part = slice(start, start + step)
            for name, values in whole.items():
                values[part] = self._arrays[name][slots[part]]
            yield
        # Between two slices a slot may have been given away, or written anew for another pattern.
        kept = whole["owners"] == owner
        if not kept.all():
            slots, whole = slots[kept], {name: values[kept] for name, values in whole.items()}
        return Snapshot(whole["states"], whole["quality"], whole["surprise"], slots, whole["serials"])

    def give(self, seen: Snapshot, part: npt.NDArray[np.bool_], owner: int) -> None:
        """A part of the rows of a snapshot belongs to another pattern from now on, as far as they are still there."""
        slots, serials = seen.slots[part], seen.serials[part]
        still = slots[self._arrays["serials"][slots] == serials]
        self._arrays["owners"][still] = owner

    def rename(self, old: int, new: int) -> None:
        """All that one pattern has belongs to another one."""
        self._arrays["owners"][self._arrays["owners"] == old] = new

    def state(self) -> dict[str, npt.NDArray[Any]]:
        """Copies of the arrays by name, the oldest row first."""
        order = np.argsort(self._arrays["serials"][: len(self)])
        return {f"recent_{name}": self._arrays[name][order] for name in _FIELDS if name != "serials"}

    @classmethod
    def restored(cls, arrays: Mapping[str, npt.NDArray[Any]], size: int, capacity: int) -> Recent:
        """What `state` was taken of, the latest rows if there is less room now. Raises `KeyError`, `ValueError`."""
        self = cls(size, capacity)
        given = {name: np.array(arrays[f"recent_{name}"]) for name in _FIELDS if name != "serials"}
        rows = len(given["owners"])
        for name, values in given.items():
            shape = (rows, size) if name == "states" else (rows,)
            if values.shape != shape or values.dtype != _FIELDS[name]:
                raise ValueError(f"{name} are {values.dtype} {values.shape}, not {_FIELDS[name].__name__} {shape}")
        self._written = min(rows, capacity)
        self._arrays = {name: values[rows - self._written :] for name, values in given.items()}
        self._arrays["serials"] = np.arange(self._written)
        return self
