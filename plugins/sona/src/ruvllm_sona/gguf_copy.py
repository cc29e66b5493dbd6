"""`write_copy`: a GGUF file again, with some tensors replaced or added.

Metadata are copied as bytes, so nothing of them is lost or written differently. Tensors follow each other in the order
of the source; if no size changes, all offsets stay as a dense file had them.
Source: the GGUF specification (docs/gguf.md of the GGML project).
"""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from ruvllm_core.errors import ModelError
from ruvllm_core.model.gguf import GGUFFile
from ruvllm_core.model.gguf_parser import MAX_KEY, Parser
from ruvllm_core.model.mapping import map_file
from ruvllm_core.model.quant import SCHEMES, QuantTensor

_COUNTS = 8  # after magic and version: the number of tensors
_METADATA = 24  # after that of metadata entries


@dataclass(frozen=True)
class NewTensor:
    """A tensor in place of one of the source, or one more.

    Attributes:
        shape: row-major.
        scheme: a key of `ruvllm_core.model.quant.SCHEMES`.
        chunks: called once; yields the rows from first to last, in pieces of any number of rows.
    """

    shape: tuple[int, ...]
    scheme: str
    chunks: Callable[[], Iterable[QuantTensor]]


def write_copy(
    source: GGUFFile, path: Path, changed: Mapping[str, NewTensor], progress: Callable[[int], None] | None = None
) -> int:
    """Write `source` with the tensors of `changed` to `path`, which appears complete or not at all.

    Those that `source` lacks come last. Returns the size of the file in bytes.

    Raises:
        ModelError: too little disk space, or the operating system refuses.
    """
    tensors = {name: changed.get(name, _kept(tensor)) for name, tensor in source.tensors.items()}
    tensors |= {name: tensor for name, tensor in changed.items() if name not in tensors}
    sizes = {name: _aligned(_nbytes(tensor), source.alignment) for name, tensor in tensors.items()}
    header = _header(source, tensors, sizes)
    total = len(header) + sum(sizes.values())
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        free = shutil.disk_usage(path.parent).free
        if free < total:
            what = f"{path} needs {total / 1e6:.0f} MB, but {path.parent} has {free / 1e6:.0f} MB left"
            raise ModelError(what, hint="free some space or choose another folder")
        with temporary.open("xb") as file:
            file.write(header)
            for name, tensor in tensors.items():
                _write(file, tensor, sizes[name], progress)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        raise ModelError(f"cannot write {path}: {error}", hint="choose another folder") from error
    finally:
        temporary.unlink(missing_ok=True)
    return total


def _kept(tensor: QuantTensor) -> NewTensor:
    return NewTensor(tensor.shape, tensor.scheme, lambda: (tensor,))


def _nbytes(tensor: NewTensor) -> int:
    return SCHEMES[tensor.scheme].row_bytes(tensor.shape[-1]) * math.prod(tensor.shape[:-1])


def _aligned(size: int, alignment: int) -> int:
    return -(-size // alignment) * alignment


def _write(file: BinaryIO, tensor: NewTensor, size: int, progress: Callable[[int], None] | None) -> None:
    written = 0
    for piece in tensor.chunks():
        file.write(np.ascontiguousarray(piece.data).data)
        written += piece.nbytes
        if progress:
            progress(piece.nbytes)
    file.write(bytes(size - written))


def _header(source: GGUFFile, tensors: Mapping[str, NewTensor], sizes: Mapping[str, int]) -> bytes:
    """Everything before the data: the source's, but for the list of tensors."""
    buffer = map_file(source.path)
    parser = Parser(source.path, buffer)
    _, _, entries = parser.header()
    for _ in range(entries):
        parser.name(MAX_KEY)
        parser.value(parser.value_type())
    out = bytearray(buffer[:_COUNTS] + _int(len(tensors), 8) + buffer[_METADATA - 8 : parser.position])
    offset = 0
    for name, tensor in tensors.items():
        raw = name.encode()
        out += _int(len(raw), 8) + raw + _int(len(tensor.shape), 4)
        out += b"".join(_int(axis, 8) for axis in reversed(tensor.shape))
        out += _int(SCHEMES[tensor.scheme].ggml_type, 4) + _int(offset, 8)
        offset += sizes[name]
    return bytes(out) + bytes(_aligned(len(out), source.alignment) - len(out))


def _int(value: int, width: int) -> bytes:
    return value.to_bytes(width, "little")
