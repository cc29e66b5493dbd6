"""Files that are whole or absent whatever happens to their writer, folders with one writer, names safe for any text."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType, TracebackType
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from ruvllm_core.errors import LearningError

try:
    import fcntl as _fcntl

    fcntl: ModuleType | None = _fcntl
except ImportError:  # Windows
    fcntl = None

#: Tensors by name.
Tensors = Mapping[str, npt.NDArray[Any]]

#: Of a user's folder; where it is missing, no feedback was ever given.
LOG = "log.bin"
_PART = ".part"
_WRITER = "ruvllm-sona 1"
_DTYPES = frozenset(
    ("bool", "float16", "float32", "float64", *(f"{s}int{n}" for s in ("", "u") for n in (8, 16, 32, 64)))
)
_NO_SUM = b"0" * 64
_numbers = itertools.count(1)


def write_atomic(path: Path, content: bytes | Callable[[BinaryIO], object]) -> None:
    """Make `path` hold `content`, or what `content` writes into the file it is given; or leave `path` as it was.

    The bytes and then the name are on the disk when this returns (on macOS as far as ``fsync`` goes, which leaves out
    the drive's own cache). What a killed writer leaves behind ends in ``.part``; `FolderLock` removes it. Raises
    `LearningError` if the file system refuses; errors of `content` itself come through, and `path` stays as it was.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{next(_numbers)}{_PART}")
    try:
        with temporary.open("xb") as file:
            if callable(content):
                content(file)
            else:
                file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        sync_folder(path.parent)
    except OSError as error:
        raise refused("write", path, error) from error
    finally:
        temporary.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Put the names in `folder` on the disk. Windows does so by itself."""
    if hasattr(os, "O_DIRECTORY"):
        fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


def append_whole(fd: int, data: bytes, size: int, path: Path) -> int:
    """Append `data` with one write to a file of `size` bytes opened with ``O_APPEND``; the new size.

    Raises `LearningError` if the disk takes only a part, which is then taken back.
    """
    try:
        written = os.write(fd, data)
        if written == len(data):
            return size + written
        os.ftruncate(fd, size)
    except OSError as error:
        raise refused("append to", path, error) from error
    raise LearningError(f"{path}: only {written} of {len(data)} bytes could be appended", hint="is the disk full?")


def read_bytes(path: Path) -> bytes:
    """A file's bytes. Raises `LearningError` if they cannot be had."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise refused("read", path, error) from error


def pack(tensors: Tensors, metadata: Mapping[str, str]) -> bytes:
    """A safetensors file in memory. Raises `LearningError` for what the format cannot hold."""
    import safetensors
    import safetensors.numpy

    # The library writes an array's memory as it lies there, whatever its strides say.
    arrays = {name: np.asarray(value, order="C") for name, value in tensors.items()}
    for name, array in arrays.items():
        if array.dtype.name not in _DTYPES:
            raise LearningError(
                f"tensor {name!r} is of type {array.dtype}, which cannot be stored", hint="store it as float32"
            )
    try:
        return safetensors.numpy.save(arrays, dict(metadata))
    except (safetensors.SafetensorError, UnicodeError, TypeError) as error:
        raise LearningError(
            f"these names or metadata cannot be stored: {error}", hint="names and metadata have to be Unicode text"
        ) from error


def unpack(data: bytes) -> tuple[dict[str, npt.NDArray[Any]], dict[str, str]]:
    """Tensors and metadata of a safetensors file in memory. Raises `LearningError` if it is none."""
    import safetensors
    import safetensors.numpy

    try:
        tensors: dict[str, npt.NDArray[Any]] = safetensors.numpy.load(data)
    except (safetensors.SafetensorError, KeyError) as error:
        raise LearningError(f"this is no safetensors data: {error}", hint="it is damaged or of another kind") from error
    return tensors, _metadata(data[8 : 8 + int.from_bytes(data[:8], "little")])


def save_tensors(path: Path, tensors: Tensors, metadata: Mapping[str, str] | None = None) -> None:
    """Write a safetensors file, whole or not at all, whose metadata holds a SHA-256 of every other byte of it.

    Raises `LearningError` for what the format cannot hold, or if the file system refuses.
    """
    values = dict(metadata or {})
    if reserved := values.keys() & {"writer", "sha256"}:
        raise LearningError(f"{path}: metadata may not hold {' or '.join(sorted(reserved))}", hint="use another name")
    data = pack(tensors, {**values, "writer": _WRITER, "sha256": _NO_SUM.decode()})
    start = data.index(_sum_field(_NO_SUM)) + len(_sum_field(b"")) - 1
    digest = hashlib.sha256(data).hexdigest().encode()
    write_atomic(path, data[:start] + digest + data[start + len(digest) :])


def load_tensors(path: Path) -> tuple[dict[str, npt.NDArray[Any]], dict[str, str]]:
    """What `save_tensors` wrote: tensors, and metadata. Raises `LearningError` if any byte of it has changed."""
    data = read_bytes(path)
    try:
        tensors, metadata = unpack(data)
    except LearningError as error:
        raise _damaged(path, error.message) from error
    digest = metadata.pop("sha256", "").encode()
    if metadata.pop("writer", "") != _WRITER or len(digest) != len(_NO_SUM):
        raise LearningError(f"{path} was not written by this program", hint="import adapters with their own format")
    blank = data.replace(_sum_field(digest), _sum_field(_NO_SUM), 1)
    if hashlib.sha256(blank).hexdigest().encode() != digest:
        raise _damaged(path, "its checksum differs")
    return tensors, metadata


def read_metadata(path: Path) -> dict[str, str]:
    """The metadata of a file of `save_tensors`, without reading its tensors or checking its sum."""
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            metadata = _metadata(file.read(min(length, 100_000_000)))  # the format's own limit
    except OSError as error:
        raise refused("read", path, error) from error
    except (ValueError, AttributeError, TypeError) as error:
        raise _damaged(path, f"its header cannot be read ({error})") from error
    metadata.pop("sha256", None)
    metadata.pop("writer", None)
    return metadata


def folder_name(text: str) -> str:
    """A folder's name for any text: a readable part, then 128 bits of its SHA-256, so no two texts share one."""
    if not isinstance(text, str):
        raise LearningError(f"a name has to be text, not {text!r}", hint="give the user's name as a string")
    readable = re.sub(r"[^a-z0-9]+", "-", text.lower())[:32].strip("-")
    return f"{readable or 'unnamed'}-{hashlib.sha256(text.encode('utf-8', 'surrogatepass')).hexdigest()[:32]}"


class FolderInUse(LearningError):
    """Another process, or another part of this one, learns there."""


class FolderLock:
    """The right to write into a folder and all below it, until `close` or the end of the process.

    Where there is ``flock`` (POSIX) the system drops the lock of a killed process, and children of ``fork`` hold it
    with their parent. Elsewhere the lock is a file that a killed process leaves behind; the error says so, and that it
    has to be deleted by hand. Taking it makes the folder, for its owner alone, and removes what a killed writer left.
    Raises `FolderInUse` if another process, or another part of this one, has it.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._path = folder / ".lock"
        try:
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            self._fd = self._take() if fcntl else self._make()
        except OSError as error:
            raise refused("lock", folder, error) from error
        os.write(self._fd, str(os.getpid()).encode())
        for leftover in folder.rglob(f".*{_PART}"):
            leftover.unlink()

    def _take(self) -> int:
        assert fcntl is not None
        fd = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            owner = os.read(fd, 32).decode("ascii", "replace")
            os.close(fd)
            raise FolderInUse(
                f"{self.folder} is in use by process {owner or 'unknown'}",
                hint="one process at a time learns for a user: end the other one, or give this one a data directory",
            ) from None
        os.ftruncate(fd, 0)
        return fd

    def _make(self) -> int:
        try:
            return os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
        except FileExistsError:
            raise FolderInUse(
                f"{self.folder} is in use, or was by a process that was killed",
                hint=f"this system cannot tell: if nobody learns there any more, delete {self._path}",
            ) from None

    def close(self) -> None:
        """Give the folder back. Closing twice is fine."""
        if self._fd >= 0:
            os.close(self._fd)
            if not fcntl:
                self._path.unlink(missing_ok=True)
            self._fd = -1

    def __enter__(self) -> FolderLock:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()


def _metadata(header: bytes) -> dict[str, str]:
    return dict(json.loads(header).get("__metadata__", {}))


def _sum_field(digest: bytes) -> bytes:
    # In JSON text these quotes cannot be part of another name or value: there they have backslashes.
    return b'"sha256":"' + digest + b'"'


def refused(what: str, path: Path, error: OSError) -> LearningError:
    """What to raise if the file system does not let us `what` a file."""
    if isinstance(error, FileNotFoundError):
        return LearningError(f"cannot {what} {path}: it does not exist", hint="check the data directory's path")
    return LearningError(
        f"cannot {what} {path}: {error.strerror or error}",
        hint="check the disk's free space and the file's permissions",
    )


def _damaged(path: Path, reason: str) -> LearningError:
    return LearningError(
        f"{path} is damaged: {reason}", hint="restore it from a backup, or roll back to another version"
    )
