"""A batch as the C structure. Every size and index is checked here: C trusts them."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from ruvllm_core.decode.batch import Batch
from ruvllm_core.decode.kv import Segment
from ruvllm_core.errors import ConfigError
from ruvllm_core.model.spec import ModelSpec
from ruvllm_core.protocols import FloatArray
from ruvllm_kernels_cpu import abi
from ruvllm_kernels_cpu.adapters import AdapterTables

#: How keys and values may be stored: the C library's number for it, and the type of the arrays (bf16 as bare bits).
KV_TYPES: dict[str, tuple[int, np.dtype[Any]]] = {
    "f32": (0, np.dtype(np.float32)),
    "f16": (1, np.dtype(np.float16)),
    "bf16": (2, np.dtype(np.uint16)),
}


def convert(
    batch: Batch,
    spec: ModelSpec,
    tables: Sequence[tuple[FloatArray, FloatArray]],
    adapters: AdapterTables,
    max_context: int,
) -> tuple[abi.BatchArgs, list[Any]]:
    """The structure, and the objects whose memory it points to.

    Raises `ValueError` for arrays that do not fit together, and `ConfigError` for storage that is not ours.
    """
    keep: list[Any] = []

    def array(values: npt.NDArray[Any], dtype: Any, length: int, name: str, low: int, high: int) -> int:
        found = np.ascontiguousarray(values, dtype=dtype)
        if found.shape != (length,):
            raise ValueError(f"{name} must be [{length}], got {found.shape}")
        if length and not (low <= found.min() and found.max() < high):
            raise ValueError(f"{name} must be in [{low}, {high}), got {found.min()} … {found.max()}")
        keep.append(found)
        return int(found.ctypes.data)

    def pointers(arrays: Sequence[npt.NDArray[Any]]) -> int:
        found = (ctypes.c_void_p * len(arrays))(*(one.ctypes.data for one in arrays))
        keep.append((found, arrays))
        return ctypes.addressof(found)

    count, sequences = len(batch.tokens), batch.num_sequences
    if sequences < 1 or batch.cu_q[0] != 0 or batch.cu_q[-1] != count or (np.diff(batch.cu_q) < 1).any():
        raise ValueError(f"cu_q must rise from 0 to the {count} tokens, got {batch.cu_q.tolist()}")
    if len(tables) != sequences:
        raise ValueError(f"{len(tables)} rope variants for {sequences} sequences")
    storage = batch.kv.segments[-1].storage
    segments = (abi.Segment * len(batch.kv.segments))(
        *(_segment(one, spec, sequences, array, pointers, keep) for one in batch.kv.segments)
    )
    keep.append(segments)
    args = abi.BatchArgs(
        tokens_count=count,
        sequences=sequences,
        rows_count=len(batch.rows),
        segments_count=len(segments),
        tokens=array(batch.tokens, np.int64, count, "tokens", 0, spec.vocab_size),
        positions=array(batch.positions, np.int64, count, "positions", 0, max_context),
        cu_q=array(batch.cu_q, np.int32, sequences + 1, "cu_q", 0, count + 1),
        rows=array(batch.rows, np.int64, len(batch.rows), "rows", 0, count),
        slots=array(batch.kv.slots, np.int64, count, "slots", 0, storage.num_blocks * storage.block_size),
        cos=pointers([cos for cos, _ in tables]),
        sin=pointers([sin for _, sin in tables]),
        segments=ctypes.addressof(segments),
        adapters=adapters.pointers(batch.adapters, keep),
    )
    return args, keep


def _segment(segment: Segment, spec: ModelSpec, sequences: int, array: Any, pointers: Any, keep: list[Any]) -> Any:
    storage = segment.storage
    if storage.scheme not in KV_TYPES:
        raise ConfigError(
            f"kernels cpu cannot read keys and values in {storage.scheme}", hint=f"use one of {', '.join(KV_TYPES)}"
        )
    kind, dtype = KV_TYPES[storage.scheme]
    size, blocks = storage.block_size, storage.num_blocks
    shape = (blocks, spec.num_kv_heads, size, spec.head_dim)
    for stored in (storage.keys, storage.values):
        if len(stored) != spec.num_layers:
            raise ValueError(f"storage has {len(stored)} layers, the model {spec.num_layers}")
        for one in stored:
            if not (
                isinstance(one, np.ndarray) and one.shape == shape and one.dtype == dtype and one.flags.c_contiguous
            ):
                raise ValueError(f"storage must be contiguous {dtype} arrays {shape}, made by this decoder")
    table = np.ascontiguousarray(segment.block_table, dtype=np.int32)
    if table.ndim != 2 or len(table) != sequences:
        raise ValueError(f"block_table must be [{sequences}, blocks], got {table.shape}")
    keep.append(table)
    lengths = array(segment.lengths, np.int32, sequences, "lengths", 0, table.shape[1] * size + 1)
    used = np.arange(table.shape[1]) * size < segment.lengths[:, None]
    if ((table < 0) | (table >= blocks))[used].any():
        raise ValueError(f"block_table names blocks outside of [0, {blocks})")
    return abi.Segment(
        type=kind,
        block_size=size,
        table_stride=table.shape[1],
        table=table.ctypes.data,
        lengths=lengths,
        starts=array(segment.starts, np.int32, sequences, "starts", 0, 2**31 - 1),
        keys=pointers(storage.keys),
        values=pointers(storage.values),
    )
