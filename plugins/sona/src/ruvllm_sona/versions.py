"""Every published set of adapters, numbered; a pointer says which one is in force."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ruvllm_core.errors import LearningError
from ruvllm_core.protocols import LowRank
from ruvllm_sona.files import load_tensors, read_bytes, read_metadata, refused, save_tensors, write_atomic
from ruvllm_sona.sites import Deltas


@dataclass(frozen=True)
class Version:
    """What is known of a version without loading it.

    Attributes:
        number: from 1.
        current: whether it is in force.
        size: of its file, bytes.
        metadata: as it was published: its time, the feedback it covers, the figures of its gate.
    """

    number: int
    current: bool
    size: int
    metadata: Mapping[str, Any]


class Versions:
    """The versions of one user's adapters in a folder: ``000001.safetensors`` and so on, and the pointer ``current``.

    Version 0 is the base model and has no file. A version counts from the moment the pointer has been moved to it: of
    a publication that was killed before, nothing is seen, and the next one takes its number. No other number is given
    twice. Whoever only reads needs no `FolderLock`, and sees the pointer as it was when asked.

    Args:
        keep: how many of the newest to keep; the current one is kept whatever its age.
    """

    def __init__(self, folder: Path, keep: int = 32) -> None:
        if keep < 1:
            raise LearningError(f"{keep} versions cannot be kept", hint="keep at least 1")
        self.folder = folder
        self.keep = keep
        try:
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        except OSError as error:
            raise refused("make", folder, error) from error
        self._pointer()

    @property
    def current(self) -> int:
        """The version in force; 0 is the base model."""
        return self._pointer()[0]

    def publish(self, deltas: Deltas, metadata: Mapping[str, Any] | None = None) -> int:
        """Store a new version, put it in force in one step, drop the oldest beyond `keep`; its number.

        `metadata` is whatever JSON can hold. The arrays come back bit for bit. Raises `LearningError` for deltas that
        make no sense, metadata that is no JSON, or if the file system refuses; then nothing has changed.
        """
        number = self._pointer()[1] + 1
        tensors = {}
        for site, delta in deltas.items():
            _check(site, delta)
            tensors[f"{site}.a"] = delta.a
            tensors[f"{site}.b"] = delta.b
        if not tensors:
            raise LearningError("a version without deltas is the base model", hint="roll back to version 0 instead")
        try:
            header = {
                "scales": json.dumps({site: float(delta.scale) for site, delta in deltas.items()}),
                "metadata": json.dumps(dict(metadata or {}), allow_nan=False),
            }
        except (TypeError, ValueError) as error:
            raise LearningError(
                f"this cannot stand in a version's metadata: {error}", hint="use text and finite numbers"
            ) from error
        if number == 1:  # from now on, a missing pointer means that it was lost
            self._point(0, 0)
        save_tensors(self._path(number), tensors, header)
        self._point(number, number)
        self._prune(number, number)
        return number

    def load(self, number: int) -> dict[str, LowRank]:
        """The deltas of a version; none for 0. Raises `LearningError` if there is no such version or it is damaged."""
        self._find(number)
        if number == 0:
            return {}
        path = self._path(number)
        tensors, metadata = load_tensors(path)
        try:
            scales = json.loads(metadata["scales"])
            return {site: LowRank(tensors[f"{site}.a"], tensors[f"{site}.b"], scales[site]) for site in scales}
        except (KeyError, ValueError, TypeError) as error:
            raise LearningError(f"{path} holds no adapters: {error}", hint="roll back to another version") from error

    def rollback(self, number: int) -> None:
        """Put a kept version, or the base model, in force again; no file of a version is touched.

        Raises `LearningError` if there is no such version, or it is damaged.
        """
        self.load(number)
        self._point(number, self._pointer()[1])

    def remove(self, numbers: Iterable[int]) -> None:
        """Delete versions, as when what they learned is to be forgotten.

        Raises `LearningError` if one does not exist or is in force; then nothing has been deleted.
        """
        found = set(numbers)
        for number in found:
            self._find(number)
            if number in (0, self.current):
                raise LearningError(
                    f"version {number} is {'in force' if number else 'the base model'} and cannot be removed",
                    hint="roll back to another version, or publish a new one, first",
                )
        for number in found:
            self._delete(number)

    def kept(self) -> list[Version]:
        """All kept versions, oldest first. Raises `LearningError` if the header of one is damaged."""
        current, highest = self._pointer()
        found = []
        for number in self._numbers(highest):
            path = self._path(number)
            try:
                metadata = json.loads(read_metadata(path)["metadata"])
            except (KeyError, ValueError) as error:
                raise LearningError(f"{path} holds no adapters: {error}", hint="delete or restore it") from error
            found.append(Version(number, number == current, path.stat().st_size, metadata))
        return found

    def _path(self, number: int) -> Path:
        return self.folder / f"{number:06d}.safetensors"

    def _numbers(self, highest: int) -> list[int]:
        names = (path.stem for path in self.folder.glob("*.safetensors"))
        return sorted(int(name) for name in names if name.isdecimal() and 1 <= int(name) <= highest)

    def _find(self, number: int) -> None:
        known = [0, *self._numbers(self._pointer()[1])]
        if number not in known:
            raise LearningError(
                f"there is no version {number} in {self.folder}", hint="there are " + ", ".join(map(str, known))
            )

    def _pointer(self) -> tuple[int, int]:
        """The version in force, and the highest number published."""
        path = self.folder / "current"
        if not path.exists():
            if any(self.folder.glob("*.safetensors")):
                raise LearningError(
                    f"{self.folder} has versions, but {path.name!r}, which says which one is in force, is missing",
                    hint='restore it: it holds {"current": 3, "highest": 7}, say',
                )
            return 0, 0
        try:
            values = json.loads(read_bytes(path))
            current, highest = values["current"], values["highest"]
            if not (type(current) is type(highest) is int and 0 <= current <= highest):
                raise ValueError(f"version {current!r} of {highest!r}")
        except (ValueError, KeyError, TypeError) as error:
            raise LearningError(
                f"{path} is damaged: {error}", hint='restore it: it holds {"current": 3, "highest": 7}, say'
            ) from error
        return current, highest

    def _point(self, current: int, highest: int) -> None:
        write_atomic(self.folder / "current", json.dumps({"current": current, "highest": highest}).encode())

    def _prune(self, current: int, highest: int) -> None:
        for number in self._numbers(highest)[: -self.keep]:
            if number != current:
                self._delete(number)

    def _delete(self, number: int) -> None:
        path = self._path(number)
        try:
            path.unlink()
        except OSError as error:
            raise refused("delete", path, error) from error


def _check(site: str, delta: LowRank) -> None:
    a, b = delta.a, delta.b
    if not (a.ndim == b.ndim == 2 and a.shape[0] == b.shape[1] and a.dtype == b.dtype == np.float32):
        raise LearningError(
            f"the delta at {site} is {a.dtype} {list(a.shape)} and {b.dtype} {list(b.shape)}",
            hint="a is float32 [r, in], b is float32 [out, r]",
        )
    if not (np.isfinite(a).all() and np.isfinite(b).all() and np.isfinite(delta.scale)):
        raise LearningError(f"the delta at {site} is not finite", hint="a step was too large: refuse it")
