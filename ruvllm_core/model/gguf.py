"""Strict reader for GGUF v2 and v3 files over a memory mapping.

Nothing in the file is trusted: every length, count, offset, type and alignment is checked against what is left of the
file before it is used, so a damaged or hostile file gives a `FormatError` and never a huge allocation, a hang, or a
read outside the mapping. Tensor data stays on disk until somebody touches it.
Source: the GGUF specification (docs/gguf.md of the GGML project).
"""

from __future__ import annotations

import math
import mmap
from pathlib import Path
from typing import Any

import numpy as np

from ruvllm_core.model.gguf_parser import DEFAULT_ALIGNMENT, MAX_DIMS, MAX_KEY, MAX_NAME, Parser, ValueType
from ruvllm_core.model.mapping import map_file
from ruvllm_core.model.quant import SCHEME_OF_GGML_TYPE, SCHEMES, QuantTensor, Scheme


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
        tensors: by name, for example ``blk.0.attn_q.weight``, in the order of the file: read-only views of the
            mapping, of which nothing is read yet. Shapes are row-major, that is GGUF's dimensions reversed.
    """

    def __init__(self, path: Path, mapping: mmap.mmap | bytes) -> None:
        """Parse `mapping`, the whole content of `path`. Raises `FormatError`."""
        self.path = path
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
        self.tensors = _read_tensors(parser, tensor_count, self.alignment)

    @classmethod
    def open(cls, path: str | Path) -> GGUFFile:
        """Map and parse a file.

        Raises:
            ModelNotFound: there is no such file.
            FormatError: the file breaks the rules of GGUF, or is not GGUF at all.
            ModelError: the operating system refuses to read it.
        """
        return cls(Path(path), map_file(Path(path)))


def _read_tensors(parser: Parser, count: int, alignment: int) -> dict[str, QuantTensor]:
    found: dict[str, tuple[Scheme, tuple[int, ...], int, int]] = {}  # scheme, shape, first byte of the data, size
    for index in range(count):
        parser.where = f"tensor {index}"
        name = parser.name(MAX_NAME)
        parser.where = f"tensor '{name}'"
        if name in found:
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
        found[name] = (scheme, shape, offset, nbytes)
    data_start = -(-parser.position // alignment) * alignment
    previous, free = "", 0
    for name, (_, _, offset, nbytes) in sorted(found.items(), key=lambda item: item[1][2]):
        parser.where = f"tensor '{name}'"
        if offset < free:
            parser.fail(f"overlaps tensor '{previous}'")
        previous, free = name, offset + nbytes
        if data_start + free > parser.end:
            parser.fail(f"its data end at byte {data_start + free}, but the file at {parser.end}")
    data = np.frombuffer(parser.buffer, dtype=np.uint8)[data_start:]
    return {
        name: QuantTensor(scheme.name, shape, data[at : at + nbytes].reshape(-1, scheme.row_bytes(shape[-1])))
        for name, (scheme, shape, at, nbytes) in found.items()
    }
