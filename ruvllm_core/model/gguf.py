"""Strict reader for GGUF v2 and v3 files over a memory mapping.

Nothing in the file is trusted: every length, count, offset, type and alignment is checked against what is left of the
file before it is used, so a damaged or hostile file gives a `FormatError` and never a huge allocation, a hang, or a
read outside the mapping. Tensor data stays on disk until somebody touches it.
Source: the GGUF specification (docs/gguf.md of the GGML project).
"""

from __future__ import annotations

import math
import mmap
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ruvllm_core.model.gguf_parser import DEFAULT_ALIGNMENT, MAX_DIMS, MAX_KEY, MAX_NAME, Parser, ValueType
from ruvllm_core.model.mapping import map_file
from ruvllm_core.model.quant import SCHEME_OF_GGML_TYPE, SCHEMES, QuantTensor


@dataclass(frozen=True)
class TensorInfo:
    """Where one tensor lies.

    Attributes:
        name: as in the file, for example ``blk.0.attn_q.weight``.
        shape: row-major, that is GGUF's dimensions reversed: a matrix is ``(rows, columns)``.
        scheme: a key of `ruvllm_core.model.quant.SCHEMES`.
        offset: bytes from the start of the file.
        nbytes: encoded size.
    """

    name: str
    shape: tuple[int, ...]
    scheme: str
    offset: int
    nbytes: int


class GGUFFile:
    """An open GGUF file; make one with `GGUFFile.open`. The last tensor to die unmaps it.

    Attributes:
        path: the file.
        version: 2 or 3.
        metadata: scalars as Python values; arrays of numbers as numpy arrays; arrays of strings as ``list[str]``;
            arrays of arrays as lists. Strings are decoded as UTF-8 with ``surrogateescape``, so
            ``s.encode("utf-8", "surrogateescape")`` gives back the exact bytes even where they are not UTF-8.
        types: the value type of every key; for an array, ``ARRAY`` followed by its element type. With `metadata` this
            is what a writer needs to reproduce the metadata exactly.
        alignment: of tensor data, in bytes.
        tensors: by name, in the order of the file.
    """

    def __init__(self, path: Path, mapping: mmap.mmap | bytes) -> None:
        """Parse `mapping`, the whole content of `path`. Raises `FormatError`."""
        self.path = path
        self._bytes = np.frombuffer(mapping, dtype=np.uint8)
        parser = Parser(path, mapping)
        self.version, tensor_count, metadata_count = parser.header()
        self.metadata: dict[str, Any] = {}
        self.types: dict[str, tuple[ValueType, ...]] = {}
        for index in range(metadata_count):
            parser.where = f"metadata entry {index}"
            key = parser.name(MAX_KEY)
            parser.where = f"metadata '{key}'"
            if key in self.metadata:
                parser.fail("the key occurs twice")
            value_type = parser.value_type()
            self.metadata[key], self.types[key] = parser.value(value_type)
        parser.where = "metadata 'general.alignment'"
        self.alignment = self.metadata.get("general.alignment", DEFAULT_ALIGNMENT)
        if type(self.alignment) is not int or self.alignment < 8 or self.alignment & (self.alignment - 1):
            parser.fail(f"{self.alignment!r} is not a power of two of at least 8")
        self.tensors = _read_tensor_infos(parser, tensor_count, self.alignment)

    @classmethod
    def open(cls, path: str | Path) -> GGUFFile:
        """Map and parse a file.

        Raises:
            ModelNotFound: there is no such file.
            FormatError: the file breaks the rules of GGUF, or is not GGUF at all.
            ModelError: the operating system refuses to read it.
        """
        return cls(Path(path), map_file(Path(path)))

    def tensor(self, name: str) -> QuantTensor:
        """The tensor called `name`, which must be there, as a read-only view of the mapping; nothing is read yet."""
        info = self.tensors[name]
        row_bytes = SCHEMES[info.scheme].row_bytes(info.shape[-1])
        data = self._bytes[info.offset : info.offset + info.nbytes].reshape(-1, row_bytes)
        return QuantTensor(info.scheme, info.shape, data)

    def find(self, name: str) -> QuantTensor | None:
        """The tensor called `name`, or None if there is none."""
        return self.tensor(name) if name in self.tensors else None


def _read_tensor_infos(parser: Parser, count: int, alignment: int) -> dict[str, TensorInfo]:
    infos: dict[str, TensorInfo] = {}
    for index in range(count):
        parser.where = f"tensor {index}"
        name = parser.name(MAX_NAME)
        parser.where = f"tensor '{name}'"
        if name in infos:
            parser.fail("the name occurs twice")
        if not 1 <= (num_dims := parser.u32()) <= MAX_DIMS:
            parser.fail(f"{num_dims} dimensions, expected 1 to {MAX_DIMS}")
        shape = tuple(parser.u64() for _ in range(num_dims))[::-1]
        scheme = SCHEME_OF_GGML_TYPE.get(number := parser.u32())
        if scheme is None:
            known = ", ".join(SCHEMES)
            parser.fail(f"GGML type {number} is not supported", f"use a file quantized with one of {known}")
        if 0 in shape or shape[-1] % scheme.block_size:
            parser.fail(f"shape {shape} does not suit {scheme.name}: rows must fill blocks of {scheme.block_size}")
        nbytes = math.prod(shape) // scheme.block_size * scheme.block_bytes  # checked against the file below
        offset = parser.u64()
        if offset % alignment:
            parser.fail(f"offset {offset} is not a multiple of the alignment {alignment}")
        infos[name] = TensorInfo(name, shape, scheme.name, offset, nbytes)
    data_start = -(-parser.position // alignment) * alignment
    previous, free = "", 0
    for info in sorted(infos.values(), key=lambda i: i.offset):
        parser.where = f"tensor '{info.name}'"
        if info.offset < free:
            parser.fail(f"overlaps tensor '{previous}'")
        previous, free = info.name, info.offset + info.nbytes
        if data_start + free > parser.end:
            parser.fail(f"its data end at byte {data_start + free}, but the file at {parser.end}")
    return {i.name: TensorInfo(i.name, i.shape, i.scheme, data_start + i.offset, i.nbytes) for i in infos.values()}
