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

from ruvllm_core.errors import FormatError, ModelNotFound
from ruvllm_core.model.mapping import DAMAGED, map_file
from ruvllm_core.model.quant import SCHEMES, QuantTensor

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
    """A tensor of a file: its type as the file calls it, its shape, and its bytes."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    data: npt.NDArray[np.uint8]


class Safetensors(Mapping[str, QuantTensor]):
    """Tensors by name, each a read-only view of a mapped file; `open_file` and `open_folder` make one.

    Looking up a tensor whose type is not F32, F16 or BF16 raises `FormatError`; others in the file do no harm.

    Attributes:
        nbytes: size of all files.
    """

    def __init__(self, entries: Mapping[str, TensorEntry], nbytes: int) -> None:
        self.entries, self.nbytes = entries, nbytes

    def __getitem__(self, name: str) -> QuantTensor:
        entry = self.entries[name]
        scheme = _SCHEME_OF_DTYPE.get(entry.dtype)
        if scheme is None:
            hint = "use a checkpoint in F32, F16 or BF16, or a GGUF file"
            raise FormatError(f"{entry.file}: tensor '{name}' has type {entry.dtype}, which cannot be read", hint=hint)
        if not entry.shape or 0 in entry.shape:
            raise FormatError(f"{entry.file}: tensor '{name}' of shape {entry.shape} has no rows of values")
        return QuantTensor(scheme, entry.shape, entry.data.reshape(-1, SCHEMES[scheme].row_bytes(entry.shape[-1])))

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)


def open_file(path: Path) -> Safetensors:
    """Map and parse `path`. Raises `ModelNotFound`, `FormatError`, or `ModelError` if it cannot be read."""
    data = np.frombuffer(map_file(path), dtype=np.uint8)
    return Safetensors(_read_header(path, data), data.nbytes)


def open_folder(folder: Path) -> Safetensors:
    """All tensors of a checkpoint: ``model.safetensors``, or the shards that its index names. Raises as `open_file`."""
    single, index = folder / SINGLE_FILE, folder / INDEX_FILE
    if single.exists():
        return open_file(single)
    if not index.exists():
        hint = "only safetensors and GGUF weights can be read; pickled .bin checkpoints cannot"
        raise ModelNotFound(f"{folder} has neither {SINGLE_FILE} nor {INDEX_FILE}", hint=hint)
    shard_of = read_index(index)
    files = {shard: open_file(folder / shard) for shard in dict.fromkeys(shard_of.values())}
    for name, shard in shard_of.items():
        if name not in files[shard]:
            raise FormatError(f"{index} places tensor '{name}' in {shard}, which does not hold it", hint=DAMAGED)
    entries = {name: files[shard].entries[name] for name, shard in shard_of.items()}
    return Safetensors(entries, sum(file.nbytes for file in files.values()))


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file. Raises `ModelNotFound`, or `FormatError` for what is no object or has a key twice."""
    return _parse_object(bytes(map_file(path)), str(path))


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


def read_index(path: Path) -> dict[str, str]:
    """The file of each tensor. Raises `ModelNotFound`, or `FormatError` for what is no index."""
    weight_map = read_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise FormatError(f"{path} has no 'weight_map' of tensors to files", hint=DAMAGED)
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or not re.fullmatch(r"[^/\\]+\.safetensors", shard):
            raise FormatError(f"{path}: tensor '{name}' is placed in {shard!r}, which is no plain file name")
    return weight_map


def _read_header(path: Path, data: npt.NDArray[np.uint8]) -> dict[str, TensorEntry]:
    length = int.from_bytes(data[:8].tobytes(), "little")
    if length > min(MAX_HEADER, len(data) - 8):
        what = f"it announces a header of {length} bytes, but has {len(data)} bytes in all"
        raise FormatError(f"{path} is no safetensors file or is cut off: {what}", hint=DAMAGED)
    header = _parse_object(data[8 : 8 + length].tobytes(), f"{path}: the header")
    header.pop("__metadata__", None)
    base = 8 + length
    places = {name: _place(path, name, value, base) for name, value in header.items()}
    position, previous = base, "the header"
    for name, (_, _, start, stop) in sorted(places.items(), key=lambda item: item[1][2:]):
        if start != position:
            what = "overlaps" if start < position else "leaves a gap after"
            raise FormatError(f"{path}: tensor '{name}' {what} {previous}", hint=DAMAGED)
        position, previous = stop, f"'{name}'"
    if position != len(data):
        raise FormatError(f"{path}: tensors end at byte {position}, but the file at {len(data)}", hint=DAMAGED)
    return {n: TensorEntry(path, dtype, shape, data[at:to]) for n, (dtype, shape, at, to) in places.items()}


def _place(path: Path, name: str, value: Any, base: int) -> tuple[str, tuple[int, ...], int, int]:
    """Type, shape, and bytes ``[start, stop)`` in the file of a tensor."""
    fields = value if isinstance(value, dict) else {}
    dtype, shape, offsets = fields.get("dtype"), fields.get("shape"), fields.get("data_offsets")
    if not isinstance(dtype, str) or not _counts(shape) or not _counts(offsets) or len(offsets) != 2:
        raise FormatError(f"{path}: tensor '{name}' needs dtype, shape and data_offsets, found {value!r}", hint=DAMAGED)
    start, stop = offsets
    size = _BYTES_OF_DTYPE.get(dtype)
    if stop < start or (size is not None and stop - start != size * math.prod(shape)):
        what = f"({dtype} {tuple(shape)}) cannot have {stop - start} bytes"
        raise FormatError(f"{path}: tensor '{name}' {what}", hint=DAMAGED)
    return dtype, tuple(shape), base + start, base + stop


def _counts(value: Any) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(type(item) is int and item >= 0 for item in value)
