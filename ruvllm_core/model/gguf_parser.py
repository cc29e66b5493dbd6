"""Bounds-checked reading of the pieces a GGUF file is made of.

Every length and count is checked against what is left of the file before anything is allocated for it.
Source: the GGUF specification (docs/gguf.md of the GGML project).
"""

from __future__ import annotations

import mmap
import struct
from enum import IntEnum
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt

from ruvllm_core.errors import FormatError
from ruvllm_core.model.mapping import DAMAGED

MAGIC = b"GGUF"
DEFAULT_ALIGNMENT = 32
MAX_NAME = 64  # bytes of a tensor name, from the specification
MAX_KEY = 65535  # bytes of a metadata key, from the specification
MAX_DIMS = 4
_MAX_NESTING = 4  # arrays within arrays; the specification sets no bound, no known file goes past 2


class ValueType(IntEnum):
    """GGUF metadata value types."""

    U8, I8, U16, I16, U32, I32, F32, BOOL, STRING, ARRAY, U64, I64, F64 = range(13)


# Every fixed-size value type in numpy's terms, which say bytes where GGUF says bits.
FIXED_DTYPES: dict[ValueType, np.dtype[Any]] = {ValueType.BOOL: np.dtype("?")} | {
    kind: np.dtype(f"<{kind.name[0].lower()}{int(kind.name[1:]) // 8}") for kind in ValueType if kind.name[1:].isdigit()
}


class Parser:
    """A bounds-checked cursor. `where` names the field being read, for error messages."""

    def __init__(self, path: Path, buffer: mmap.mmap | bytes) -> None:
        self.path = path
        self.buffer = buffer
        self.position = 0
        self.end = len(buffer)
        self.where = "header"

    def fail(self, message: str, hint: str = DAMAGED) -> NoReturn:
        raise FormatError(f"{self.path}: {self.where}: {message}", hint=hint)

    def take(self, count: int) -> int:
        """Advance over `count` bytes; returns where they start."""
        if count > self.end - self.position:
            self.fail(f"needs {count} bytes at offset {self.position}, but the file ends at {self.end}")
        start = self.position
        self.position += count
        return start

    def u32(self) -> int:
        return int.from_bytes(self.buffer[(at := self.take(4)) : at + 4], "little")

    def u64(self) -> int:
        return int.from_bytes(self.buffer[(at := self.take(8)) : at + 8], "little")

    def header(self) -> tuple[int, int, int]:
        """Version, number of tensors, number of metadata entries."""
        magic = self.buffer[:4]
        if magic != MAGIC:
            hint = "give a .gguf file, or the folder that holds config.json and *.safetensors"
            self.fail(f"a GGUF file starts with {MAGIC!r}, this one with {magic!r}", hint)
        self.take(4)
        version = self.u32()
        if version and not version & 0xFFFF:
            self.fail("the file is big-endian, which is not supported", "convert the model again for little-endian")
        if version not in (2, 3):
            self.fail(f"GGUF version {version} is not supported, only 2 and 3", "convert the model again")
        tensors, entries = self.u64(), self.u64()
        left = self.end - self.position
        # The shortest entry takes 14 bytes (one-byte key and value), the shortest tensor 33 (one-byte name, one axis).
        if entries > left // 14 or tensors > left // 33:
            self.fail(f"{tensors} tensors and {entries} metadata entries do not fit into {self.end} bytes")
        return version, tensors, entries

    def name(self, limit: int) -> str:
        """A non-empty UTF-8 string of at most `limit` bytes."""
        length = self.u64()
        if not 1 <= length <= limit:
            self.fail(f"a name of {length} bytes, expected 1 to {limit}")
        at = self.take(length)
        try:
            return str(self.buffer[at : at + length], "utf-8")
        except UnicodeDecodeError:
            self.fail(f"the name at offset {at} is not UTF-8")

    def value_type(self) -> ValueType:
        number = self.u32()
        if number >= len(ValueType):
            self.fail(f"unknown value type {number}", "a newer version of ruvllm may know it")
        return ValueType(number)

    def value(self, kind: ValueType, depth: int = 0) -> tuple[Any, tuple[ValueType, ...]]:
        """A metadata value and its type, elements' type included."""
        if kind is ValueType.STRING:
            return self.strings(1)[0], (kind,)
        if kind is not ValueType.ARRAY:
            return self.fixed(kind, 1)[0].item(), (kind,)
        if depth == _MAX_NESTING:
            self.fail(f"arrays nested deeper than {_MAX_NESTING}")
        element, count = self.value_type(), self.u64()
        types = (kind, element)
        if element is ValueType.STRING:
            return self.strings(count), types
        if element is ValueType.ARRAY:
            self.check_count(count, 12)  # element type and count
            return [self.value(element, depth + 1)[0] for _ in range(count)], types
        return self.fixed(element, count), types

    def fixed(self, kind: ValueType, count: int) -> npt.NDArray[Any]:
        dtype = FIXED_DTYPES[kind]
        self.check_count(count, dtype.itemsize)
        at = self.take(count * dtype.itemsize)
        if kind is ValueType.BOOL and self.buffer[at : at + count].strip(b"\0\1"):
            self.fail("a truth value that is neither 0 nor 1")
        values: npt.NDArray[Any] = np.frombuffer(self.buffer, dtype=dtype, count=count, offset=at).copy()
        return values

    def strings(self, count: int) -> list[str]:
        """`count` strings. The one loop that runs a hundred thousand times, so it keeps everything in locals."""
        self.check_count(count, 8)
        buffer, position, end = self.buffer, self.position, self.end
        unpack = struct.Struct("<Q").unpack_from
        result: list[str] = []
        for _ in range(count):
            start = position + 8
            if start > end or (length := unpack(buffer, position)[0]) > end - start:
                self.position = position
                self.fail(f"string {len(result)} at offset {position} reaches past the end of the file at {end}")
            position = start + length
            result.append(str(buffer[start:position], "utf-8", "surrogateescape"))
        self.position = position
        return result

    def check_count(self, count: int, smallest: int) -> None:
        """Refuse `count` elements of at least `smallest` bytes before anything is allocated for them."""
        if count > (self.end - self.position) // smallest:
            self.fail(f"{count} elements do not fit into the {self.end - self.position} bytes left")
