"""Write GGUF v3 files: streamed, so memory holds a few rows at a time, and atomic, so no half file is ever left.

Source: the GGUF specification (docs/gguf.md of the GGML project).
"""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from ruvllm_core.errors import FormatError, ModelError
from ruvllm_core.model.gguf_parser import DEFAULT_ALIGNMENT, FIXED_DTYPES, MAGIC, MAX_DIMS, MAX_NAME, ValueType
from ruvllm_core.model.quant import SCHEMES, QuantTensor

_VERSION = 3
_TYPE_OF_DTYPE = {dtype: kind for kind, dtype in FIXED_DTYPES.items()}


@dataclass(frozen=True)
class PendingTensor:
    """A tensor to be written, whose bytes are made only when their turn comes.

    Attributes:
        name: tensor name, at most 64 bytes.
        shape: row-major logical shape.
        scheme: a key of `ruvllm_core.model.quant.SCHEMES`.
        chunks: called once; yields the tensor's rows from first to last, in pieces of any number of rows.
    """

    name: str
    shape: tuple[int, ...]
    scheme: str
    chunks: Callable[[], Iterable[QuantTensor]]

    @property
    def nbytes(self) -> int:
        return SCHEMES[self.scheme].row_bytes(self.shape[-1]) * int(np.prod(self.shape[:-1], dtype=np.int64))

    @classmethod
    def of(cls, name: str, tensor: QuantTensor) -> PendingTensor:
        """A source for a tensor that already exists."""
        return cls(name, tensor.shape, tensor.scheme, lambda: (tensor,))


def write_gguf(
    path: str | Path,
    metadata: Mapping[str, Any],
    tensors: Sequence[PendingTensor],
    *,
    types: Mapping[str, tuple[ValueType, ...]] | None = None,
    progress: Callable[[int], None] | None = None,
) -> int:
    """Write a file that appears under `path` complete or not at all, replacing what was there.

    Args:
        metadata: values as `GGUFFile.metadata` holds them. ``general.alignment``, if present, is obeyed.
        types: value types as `GGUFFile.types` holds them. Keys without one are stored as u32 (u64 or i64 if too big or
            negative), f32, bool, string, or by the dtype of their numpy array.
        progress: called with the number of bytes after each piece of tensor data.

    Returns:
        The size of the file in bytes.

    Raises:
        FormatError: metadata or tensors that GGUF cannot hold, or a source that yields other than it announced.
        ModelError: too little disk space, or the operating system refuses to write.
    """
    path = Path(path)
    alignment = int(metadata.get("general.alignment", DEFAULT_ALIGNMENT))
    header = _header(path, metadata, types or {}, tensors, alignment)
    total = len(header) + sum(_aligned(t.nbytes, alignment) for t in tensors)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        free = shutil.disk_usage(path.parent).free
        if free < total:
            raise ModelError(
                f"{path} needs {total / 1e6:.0f} MB, but {path.parent} has {free / 1e6:.0f} MB left",
                hint="free some space or choose another folder",
            )
        with temporary.open("xb") as file:
            file.write(header)
            for tensor in tensors:
                _write_tensor(path, file, tensor, alignment, progress)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        hint = "free some space or choose another folder" if error.errno == errno.ENOSPC else "choose another folder"
        raise ModelError(f"cannot write {path}: {error}", hint=hint) from error
    finally:
        temporary.unlink(missing_ok=True)
    return total


def _write_tensor(
    path: Path, file: BinaryIO, tensor: PendingTensor, alignment: int, progress: Callable[[int], None] | None
) -> None:
    written = 0
    for piece in tensor.chunks():
        if piece.scheme != tensor.scheme or piece.columns != tensor.shape[-1]:
            raise FormatError(f"{path}: tensor '{tensor.name}': got a piece of {piece.scheme} {piece.shape}")
        file.write(np.ascontiguousarray(piece.data).data)
        written += piece.nbytes
        if progress:
            progress(piece.nbytes)
    if written != tensor.nbytes:
        raise FormatError(f"{path}: tensor '{tensor.name}': got {written} bytes, announced {tensor.nbytes}")
    file.write(bytes(_aligned(written, alignment) - written))


def _header(
    path: Path,
    metadata: Mapping[str, Any],
    types: Mapping[str, tuple[ValueType, ...]],
    tensors: Sequence[PendingTensor],
    alignment: int,
) -> bytes:
    out = bytearray(MAGIC + _int(_VERSION, 4) + _int(len(tensors), 8) + _int(len(metadata), 8))
    for key, value in metadata.items():
        try:
            kinds = types.get(key) or _infer(value)
            out += _string(key) + _int(kinds[0], 4) + _value(value, kinds)
        except (TypeError, ValueError, OverflowError) as error:
            raise FormatError(f"{path}: metadata '{key}' cannot be stored: {error}") from error
    offset = 0
    seen: set[str] = set()
    for tensor in tensors:
        if (
            tensor.name in seen
            or not 1 <= len(tensor.name.encode()) <= MAX_NAME
            or not 1 <= len(tensor.shape) <= MAX_DIMS
        ):
            raise FormatError(
                f"{path}: tensor '{tensor.name}' of shape {tensor.shape} cannot be stored",
                hint=f"names must be unique and at most {MAX_NAME} bytes, shapes have 1 to {MAX_DIMS} axes",
            )
        seen.add(tensor.name)
        dims = b"".join(_int(d, 8) for d in reversed(tensor.shape))
        out += _string(tensor.name) + _int(len(tensor.shape), 4) + dims
        out += _int(SCHEMES[tensor.scheme].ggml_type, 4) + _int(offset, 8)
        offset += _aligned(tensor.nbytes, alignment)
    return bytes(out) + bytes(_aligned(len(out), alignment) - len(out))


def _aligned(size: int, alignment: int) -> int:
    return -(-size // alignment) * alignment


def _int(value: int, width: int) -> bytes:
    return int(value).to_bytes(width, "little")


def _string(text: str) -> bytes:
    raw = text.encode("utf-8", "surrogateescape")
    return _int(len(raw), 8) + raw


def _infer(value: Any) -> tuple[ValueType, ...]:
    if isinstance(value, bool):
        return (ValueType.BOOL,)
    if isinstance(value, int):
        if value < 0:
            return (ValueType.I64 if value < -(2**31) else ValueType.I32,)
        return (ValueType.U64 if value >= 2**32 else ValueType.U32,)
    if isinstance(value, float):
        return (ValueType.F32,)
    if isinstance(value, str):
        return (ValueType.STRING,)
    if isinstance(value, np.ndarray) and value.dtype in _TYPE_OF_DTYPE:
        return (ValueType.ARRAY, _TYPE_OF_DTYPE[value.dtype])
    if isinstance(value, list):
        nested = bool(value) and not isinstance(value[0], str)
        return (ValueType.ARRAY, ValueType.ARRAY if nested else ValueType.STRING)
    raise TypeError(f"no GGUF type for {type(value).__name__}; use a scalar, a list of str, or a numpy array")


def _value(value: Any, kinds: tuple[ValueType, ...]) -> bytes:
    if kinds[0] is ValueType.STRING:
        return _string(value)
    if kinds[0] is not ValueType.ARRAY:
        return _fixed([value], kinds[0])
    count = _int(kinds[1], 4) + _int(len(value), 8)
    if kinds[1] is ValueType.STRING:
        return count + b"".join(map(_string, value))
    if kinds[1] is ValueType.ARRAY:
        return count + b"".join(_value(inner, _infer(inner)) for inner in value)
    return count + _fixed(value, kinds[1])


def _fixed(values: Any, kind: ValueType) -> bytes:
    exact = np.asarray(values)
    stored = exact.astype(FIXED_DTYPES[kind])
    if exact.dtype.kind not in "biuf" or (kind not in (ValueType.F32, ValueType.F64) and (stored != exact).any()):
        raise ValueError(f"{values!r} is not a {kind.name.lower()}")
    return stored.tobytes()
