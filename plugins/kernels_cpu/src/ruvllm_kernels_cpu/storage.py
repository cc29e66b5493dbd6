"""Storages of keys and values as this library has them, and as C structures."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import numpy.typing as npt

from ruvllm_core.decode.kv import STORE_BITS, KVStorage, Move, Segment, store_group, store_row_bytes
from ruvllm_core.errors import ConfigError
from ruvllm_core.machine import require_memory
from ruvllm_core.model.spec import ModelSpec
from ruvllm_kernels_cpu import abi

#: How floats may be stored: the type of the arrays (bf16 as bare bits).
FLOATS: dict[str, np.dtype[Any]] = {
    "f32": np.dtype(np.float32),
    "f16": np.dtype(np.float16),
    "bf16": np.dtype(np.uint16),
}
#: The C library's number of each scheme.
KV_TYPES = {name: number for number, name in enumerate((*FLOATS, "q8", "q4"))}
_PANEL = 16  # tokens that stand together in a quantized block
_LINE = 64  # bytes on whose lines arrays begin
_Array = npt.NDArray[Any]
#: The model that storage was described for, its description, and what that points to.
_described: WeakKeyDictionary[KVStorage, tuple[ModelSpec, abi.Segment, list[Any]]] = WeakKeyDictionary()


@dataclass(eq=False)
class CodedStorage(KVStorage):
    """Keys and values as ``native/store.h`` lays them out: uint8 ``[K, N, S * bytes]`` a layer.

    Attributes:
        means: of the keys of each block, uint8 ``[K, N, D + 2]`` a layer.
    """

    means: Sequence[_Array] = field(default_factory=list)


def allocate(spec: ModelSpec, num_blocks: int, block_size: int, scheme: str) -> KVStorage:
    """Zeroed storage. Raises `ConfigError` for what a quantized scheme cannot hold, and `OutOfMemoryError`."""
    if scheme in STORE_BITS and block_size % _PANEL:
        hint = f"use a block size that is a multiple of {_PANEL}"
        raise ConfigError(f"quantized keys and values: blocks of {block_size} tokens", hint=hint)
    shapes, dtype = _shapes(spec, num_blocks, block_size, scheme)
    coded = scheme in STORE_BITS
    nbytes = spec.num_layers * sum(math.prod(shape) * dtype.itemsize + _LINE for shape in shapes)
    require_memory(nbytes, "keys and values", "set a smaller max_context, or cache.precision f16")
    arrays = [[_zeros(shape, dtype) for _ in range(spec.num_layers)] for shape in shapes]
    if coded:
        return CodedStorage(scheme, num_blocks, block_size, arrays[0], arrays[1], nbytes, arrays[2])
    return KVStorage(scheme, num_blocks, block_size, arrays[0], arrays[1], nbytes)


def describe(storage: KVStorage, spec: ModelSpec, keep: list[Any]) -> abi.Segment:
    """Storage as a segment of nobody's tokens; `keep` takes what it points to.

    Raises `ConfigError` for a scheme that is not ours, and `ValueError` for arrays that are not.
    """
    known = _described.get(storage)
    if (
        known is None or known[0] is not spec
    ):  # once for each: there are dozens of arrays, and a step takes milliseconds
        known = _described[storage] = spec, *_describe(storage, spec)
    keep.append(known[2])
    return abi.Segment.from_buffer_copy(known[1])


def _describe(storage: KVStorage, spec: ModelSpec) -> tuple[abi.Segment, list[Any]]:
    """The structure, and what it points to."""
    if storage.scheme not in KV_TYPES:
        raise ConfigError(
            f"kernels cpu cannot read keys and values in {storage.scheme}", hint=f"use one of {', '.join(KV_TYPES)}"
        )
    shapes, dtype = _shapes(spec, storage.num_blocks, storage.block_size, storage.scheme)
    runs = [storage.keys, storage.values]
    if storage.scheme in STORE_BITS:
        if not isinstance(storage, CodedStorage) or storage.block_size % _PANEL:
            raise ValueError(f"{storage.scheme} storage must be made by this decoder")
        runs.append(storage.means)
    addresses, kept = [], list[Any]()
    for arrays, shape in zip(runs, shapes, strict=True):
        if len(arrays) != spec.num_layers:
            raise ValueError(f"storage has {len(arrays)} layers, the model {spec.num_layers}")
        for one in arrays:
            if not (
                isinstance(one, np.ndarray) and one.shape == shape and one.dtype == dtype and one.flags.c_contiguous
            ):
                raise ValueError(f"storage must be contiguous {dtype} arrays {shape}, made by this decoder")
        pointers = (ctypes.c_void_p * len(arrays))(*(one.ctypes.data for one in arrays))
        kept.append((pointers, list(arrays)))
        addresses.append(ctypes.addressof(pointers))
    found = abi.Segment(type=KV_TYPES[storage.scheme], block_size=storage.block_size, num_blocks=storage.num_blocks)
    found.keys, found.values, found.means = (*addresses, None)[:3]
    return found, kept


def segment(one: Segment, spec: ModelSpec, sequences: int, keep: list[Any]) -> abi.Segment:
    """A segment of a view. Raises `ValueError` for tables, lengths or starts that do not fit."""
    storage, found = one.storage, describe(one.storage, spec, keep)
    size, blocks = storage.block_size, storage.num_blocks
    table = np.ascontiguousarray(one.block_table, dtype=np.int32)
    if table.ndim != 2 or len(table) != sequences:
        raise ValueError(f"block_table must be [{sequences}, blocks], got {table.shape}")
    keep.append(table)
    found.table, found.table_stride = table.ctypes.data, table.shape[1]
    found.lengths = checked(one.lengths, np.int32, sequences, "lengths", 0, table.shape[1] * size + 1, keep)
    found.starts = checked(one.starts, np.int32, sequences, "starts", 0, 2**31 - 1 - table.shape[1] * size, keep)
    used = np.arange(table.shape[1]) * size < one.lengths[:, None]
    if ((table < 0) | (table >= blocks))[used].any():
        raise ValueError(f"block_table names blocks outside of [0, {blocks})")
    return found


def moves(wanted: Sequence[Move], spec: ModelSpec, max_context: int, keep: list[Any]) -> Any:
    """An array of structures. Raises `ValueError` for slots and positions that do not fit."""
    return (abi.Move * len(wanted))(*(_move(one, spec, max_context, keep) for one in wanted))


def _move(move: Move, spec: ModelSpec, max_context: int, keep: list[Any]) -> abi.Move:
    count, source, target = len(move.from_slots), move.source, move.target

    def slots(values: _Array, storage: KVStorage, name: str) -> int:
        return checked(values, np.int64, count, name, 0, storage.num_blocks * storage.block_size, keep)

    found = abi.Move(
        source=describe(source, spec, keep),
        target=describe(target, spec, keep),
        count=count,
        from_slots=slots(move.from_slots, source, "from_slots of a move"),
        to_slots=slots(move.to_slots, target, "to_slots of a move"),
        positions=checked(move.positions, np.int64, count, "positions of a move", 0, max_context, keep),
    )
    if len(np.unique(move.to_slots)) != count:  # two threads would write there
        raise ValueError("to_slots of a move name a place twice")
    if source is target and np.isin(move.to_slots, move.from_slots).any():
        raise ValueError("to_slots of a move are among its from_slots")
    size = target.block_size
    if target.scheme in STORE_BITS:
        whole = count % size == 0 and (move.to_slots[::size] % size == 0).all()
        if not whole or (np.diff(move.to_slots.reshape(-1, size)) != 1).any():
            raise ValueError(f"to_slots of a move into {target.scheme} must be whole blocks of {size} tokens in order")
    return found


def checked(values: _Array, dtype: Any, length: int, name: str, low: int, high: int, keep: list[Any]) -> int:
    """The address of `values` as an array that `keep` takes. Raises `ValueError` if it does not fit."""
    found = np.ascontiguousarray(values, dtype=dtype)
    if found.shape != (length,):
        raise ValueError(f"{name} must be [{length}], got {found.shape}")
    if length and not (low <= found.min() and found.max() < high):
        raise ValueError(f"{name} must be in [{low}, {high}), got {found.min()} … {found.max()}")
    keep.append(found)
    return int(found.ctypes.data)


def _shapes(
    spec: ModelSpec, num_blocks: int, block_size: int, scheme: str
) -> tuple[list[tuple[int, ...]], np.dtype[Any]]:
    """Of the arrays of a layer: keys, values and, of quantized schemes, means."""
    heads, dim = spec.num_kv_heads, spec.head_dim
    if scheme in FLOATS:
        return [(num_blocks, heads, block_size, dim)] * 2, FLOATS[scheme]
    store_group(dim)  # whether it can be divided
    row = (heads, num_blocks, block_size * store_row_bytes(dim, scheme))
    return [row, row, (heads, num_blocks, dim + 2)], np.dtype(np.uint8)


def _zeros(shape: tuple[int, ...], dtype: np.dtype[Any]) -> _Array:
    """An array that begins on a line. Its pages take no memory until they are written.

    Each array is a mapping of its own: the system would back one for all layers with pages so large that the first
    token of a long context took most of it.
    """
    size = math.prod(shape) * dtype.itemsize
    plain = np.zeros(size + _LINE, np.uint8)
    skip = -plain.ctypes.data % _LINE
    return plain[skip : skip + size].view(dtype).reshape(shape)
