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

#: How keys and values may be stored: the C library's number for it, and the type of the arrays (bf16 as bare bits).
KV_TYPES: dict[str, tuple[int, np.dtype[Any]]] = {
    "f32": (0, np.dtype(np.float32)),
    "f16": (1, np.dtype(np.float16)),
    "bf16": (2, np.dtype(np.uint16)),
}


def convert(
    batch: Batch, spec: ModelSpec, tables: Sequence[tuple[FloatArray, FloatArray]], max_context: int
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
    deltas = _deltas(batch, spec, keep)
    keep += [segments, deltas]
    args = abi.BatchArgs(
        tokens_count=count,
        sequences=sequences,
        rows_count=len(batch.rows),
        segments_count=len(segments),
        deltas_count=len(deltas),
        tokens=array(batch.tokens, np.int64, count, "tokens", 0, spec.vocab_size),
        positions=array(batch.positions, np.int64, count, "positions", 0, max_context),
        cu_q=array(batch.cu_q, np.int32, sequences + 1, "cu_q", 0, count + 1),
        rows=array(batch.rows, np.int64, len(batch.rows), "rows", 0, count),
        slots=array(batch.kv.slots, np.int64, count, "slots", 0, storage.num_blocks * storage.block_size),
        cos=pointers([cos for cos, _ in tables]),
        sin=pointers([sin for _, sin in tables]),
        segments=ctypes.addressof(segments),
        deltas=ctypes.addressof(deltas),
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


def _deltas(batch: Batch, spec: ModelSpec, keep: list[Any]) -> Any:
    """Low-rank deltas at sites inside the layers; the ``final`` site is not the decoder's."""
    found = []
    for b, adapter in enumerate(batch.adapters):
        if adapter is None or not adapter.changes_cache:
            continue
        for n in range(spec.num_layers):
            for index, site in enumerate(abi.SITES):
                delta = adapter.sites.get(f"layers.{n}.{site}")
                if delta is None:
                    continue
                a, b_factor = (np.ascontiguousarray(one, dtype=np.float32) for one in (delta.a, delta.b))
                width, height = _site_shape(spec, site)
                rank = len(a)
                if a.shape != (rank, width) or b_factor.shape != (height, rank) or not 0 < rank <= spec.hidden_size:
                    raise ValueError(
                        f"adapter {adapter.version}, layers.{n}.{site}: a {a.shape} and b {b_factor.shape} "
                        f"must be [r, {width}] and [{height}, r]"
                    )
                keep += [a, b_factor]
                found.append(
                    abi.Delta(
                        layer=n,
                        site=index,
                        rank=rank,
                        begin=int(batch.cu_q[b]),
                        end=int(batch.cu_q[b + 1]),
                        a=a.ctypes.data,
                        b=b_factor.ctypes.data,
                        scale=delta.scale,
                    )
                )
    return (abi.Delta * len(found))(*found)


def _site_shape(spec: ModelSpec, site: str) -> tuple[int, int]:
    """Columns and rows of a layer's matrix."""
    hidden, inner = spec.hidden_size, spec.intermediate_size
    q, kv = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
    shapes = {"attn.q": (hidden, q), "attn.k": (hidden, kv), "attn.v": (hidden, kv), "attn.o": (q, hidden)}
    return {**shapes, "mlp.down": (inner, hidden)}.get(site, (hidden, inner))
