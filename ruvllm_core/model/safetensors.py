"""Strict reader for safetensors checkpoints, one file or several with an index, over memory mappings.

Nothing in a file is trusted: header length, JSON, names, types, shapes and byte ranges are checked before use, so a
damaged or hostile file gives a `FormatError`. Tensor data stays on disk until somebody touches it. The library of the
same name is not used because it cannot hand out bf16 without torch.
Source: the format section of the safetensors README.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np
import numpy.typing as npt

from ruvllm_core.errors import FormatError, ModelError, ModelNotFound
from ruvllm_core.model.mapping import DAMAGED, map_file
from ruvllm_core.model.quant import QuantTensor

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
MAX_HEADER = 100_000_000  # the limit of the reference implementation

_SCHEME_OF_DTYPE = {"F32": "f32", "F16": "f16", "BF16": "bf16"}
_BYTES_OF_DTYPE = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0"), 1),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 2),
    **dict.fromkeys(("U32", "I32", "F32"), 4),
    **dict.fromkeys(("U64", "I64", "F64", "C64"), 8),
}


@dataclass(frozen=True)
class TensorEntry:
    """A tensor of a file: its type as the file calls it, its shape, and its bytes ``[start, stop)`` in the file."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


class SafetensorsFile(Mapping[str, QuantTensor]):
    """One open file: tensors by name, each a read-only view of the mapping.

    Looking up a tensor whose type is not F32, F16 or BF16 raises `FormatError`; others in the file do no harm.
    """

    def __init__(self, path: Path) -> None:
        """Map and parse `path`. Raises `ModelNotFound`, `FormatError`, or `ModelError` if it cannot be read."""
        self.path = path
        self._bytes = np.frombuffer(map_file(path), dtype=np.uint8)
        self.nbytes = self._bytes.nbytes
        self.entries = _read_header(path, self._bytes)

    def __getitem__(self, name: str) -> QuantTensor:
        entry = self.entries[name]
        scheme = _SCHEME_OF_DTYPE.get(entry.dtype)
        if scheme is None:
            hint = "use a checkpoint in F32, F16 or BF16, or a GGUF file"
            raise FormatError(f"{self.path}: tensor '{name}' has type {entry.dtype}, which is not supported", hint=hint)
        if not entry.shape or 0 in entry.shape:
            raise FormatError(f"{self.path}: tensor '{name}' of shape {entry.shape} has no rows of values")
        row_bytes = entry.shape[-1] * _BYTES_OF_DTYPE[entry.dtype]
        return QuantTensor(scheme, entry.shape, self._bytes[entry.start : entry.stop].reshape(-1, row_bytes))

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)


class SafetensorsFolder(Mapping[str, QuantTensor]):
    """All tensors of a checkpoint folder: ``model.safetensors``, or the shards that its index names."""

    def __init__(self, folder: Path) -> None:
        """Open every file. Raises `ModelNotFound`, `FormatError`, or `ModelError` if one cannot be read."""
        self.files: dict[str, SafetensorsFile] = {}
        self._home: dict[str, SafetensorsFile] = {}
        single, index = folder / SINGLE_FILE, folder / INDEX_FILE
        if single.exists():
            file = self.files[SINGLE_FILE] = SafetensorsFile(single)
            self._home = dict.fromkeys(file, file)
            return
        if not index.exists():
            hint = "only safetensors and GGUF weights can be read; pickled .bin checkpoints cannot"
            raise ModelNotFound(f"{folder} has neither {SINGLE_FILE} nor {INDEX_FILE}", hint=hint)
        for name, shard in _read_index(index).items():
            if shard not in self.files:
                self.files[shard] = SafetensorsFile(folder / shard)
            if name not in self.files[shard]:
                raise FormatError(f"{index} places tensor '{name}' in {shard}, which does not hold it", hint=DAMAGED)
            self._home[name] = self.files[shard]

    @property
    def nbytes(self) -> int:
        """Size of all files in bytes."""
        return sum(file.nbytes for file in self.files.values())

    def __getitem__(self, name: str) -> QuantTensor:
        return self._home[name][name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._home)

    def __len__(self) -> int:
        return len(self._home)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file. Raises `ModelNotFound`, or `FormatError` for what is no object or has a key twice."""
    try:
        return _parse_object(path.read_bytes(), str(path))
    except FileNotFoundError:
        raise ModelNotFound(f"no such file: {path}", hint="check the path for typing errors") from None
    except OSError as error:
        raise ModelError(f"cannot read {path}: {error.strerror}") from error


def _parse_object(text: bytes, where: str) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result: dict[str, Any] = {}
        for name, value in pairs:
            if name in result:
                raise FormatError(f"{where}: '{name}' occurs twice", hint=DAMAGED)
            result[name] = value
        return result

    try:
        value = json.loads(text.decode("utf-8"), object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{where} is not valid JSON: {error}", hint=DAMAGED) from None
    if not isinstance(value, dict):
        raise FormatError(f"{where} should be a JSON object, found {type(value).__name__}", hint=DAMAGED)
    return value


def _read_index(path: Path) -> dict[str, str]:
    weight_map = read_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise FormatError(f"{path} has no 'weight_map' of tensors to files", hint=DAMAGED)
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or not re.fullmatch(r"[^/\\]+\.safetensors", shard):
            raise FormatError(f"{path}: tensor '{name}' is placed in {shard!r}, which is no plain file name")
    return weight_map


def _read_header(path: Path, data: npt.NDArray[np.uint8]) -> dict[str, TensorEntry]:
    if len(data) < 8:
        raise FormatError(f"{path} ends after {len(data)} bytes, within the header length", hint=DAMAGED)
    length = int.from_bytes(data[:8].tobytes(), "little")
    if length > min(MAX_HEADER, len(data) - 8):
        what = f"it announces a header of {length} bytes, but has {len(data)} bytes in all"
        raise FormatError(f"{path} is no safetensors file or is cut off: {what}", hint=DAMAGED)
    header = _parse_object(data[8 : 8 + length].tobytes(), f"{path}: the header")
    header.pop("__metadata__", None)
    base = 8 + length
    entries = {name: _entry(path, name, value, base) for name, value in header.items()}
    position, previous = base, "the header"
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].start, item[1].stop)):
        if entry.start != position:
            what = "overlaps" if entry.start < position else "leaves a gap after"
            raise FormatError(f"{path}: tensor '{name}' {what} {previous}", hint=DAMAGED)
        position, previous = entry.stop, f"'{name}'"
    if position != len(data):
        raise FormatError(f"{path}: tensors end at byte {position}, but the file at {len(data)}", hint=DAMAGED)
    return entries


def _entry(path: Path, name: str, value: Any, base: int) -> TensorEntry:
    fields = value if isinstance(value, dict) else {}
    dtype, shape, offsets = fields.get("dtype"), fields.get("shape"), fields.get("data_offsets")
    if not isinstance(dtype, str) or not _counts(shape) or not _counts(offsets) or len(offsets) != 2:
        raise FormatError(f"{path}: tensor '{name}' needs dtype, shape and data_offsets, found {value!r}", hint=DAMAGED)
    start, stop = offsets
    size = _BYTES_OF_DTYPE.get(dtype)
    if stop < start or (size is not None and stop - start != size * math.prod(shape)):
        what = f"({dtype} {tuple(shape)}) cannot have {stop - start} bytes"
        raise FormatError(f"{path}: tensor '{name}' {what}", hint=DAMAGED)
    return TensorEntry(dtype, tuple(shape), base + start, base + stop)


def _counts(value: Any) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(type(item) is int and item >= 0 for item in value)
