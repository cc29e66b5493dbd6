"""A batch as the C structure. Every size and index is checked here: C trusts them."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from ruvllm_core.decode.batch import Batch
from ruvllm_core.model.spec import ModelSpec
from ruvllm_core.protocols import FloatArray
from ruvllm_kernels_cpu import abi, storage
from ruvllm_kernels_cpu.adapters import AdapterTables


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
        return storage.checked(values, dtype, length, name, low, high, keep)

    def pointers(arrays: Sequence[npt.NDArray[Any]]) -> int:
        found = (ctypes.c_void_p * len(arrays))(*(one.ctypes.data for one in arrays))
        keep.append((found, arrays))
        return ctypes.addressof(found)

    count, sequences = len(batch.tokens), batch.num_sequences
    if sequences < 1 or batch.cu_q[0] != 0 or batch.cu_q[-1] != count or (np.diff(batch.cu_q) < 1).any():
        raise ValueError(f"cu_q must rise from 0 to the {count} tokens, got {batch.cu_q.tolist()}")
    if len(tables) != sequences:
        raise ValueError(f"{len(tables)} rope variants for {sequences} sequences")
    if len(batch.adapters) not in (0, sequences):
        raise ValueError(f"{len(batch.adapters)} adapters for {sequences} sequences")
    view, newest = batch.kv, batch.kv.segments[-1].storage
    if newest.scheme not in storage.FLOATS:
        raise ValueError(f"new keys and values are written to the last segment: it must be floats, not {newest.scheme}")
    segments = (abi.Segment * len(view.segments))(
        *(storage.segment(one, spec, sequences, keep) for one in view.segments)
    )
    moves = storage.moves(view.moves, spec, max_context, keep)
    keep += [segments, moves]
    args = abi.BatchArgs(
        tokens_count=count,
        sequences=sequences,
        rows_count=len(batch.rows),
        segments_count=len(segments),
        tokens=array(batch.tokens, np.int64, count, "tokens", 0, spec.vocab_size),
        positions=array(batch.positions, np.int64, count, "positions", 0, max_context),
        cu_q=array(batch.cu_q, np.int32, sequences + 1, "cu_q", 0, count + 1),
        rows=array(batch.rows, np.int64, len(batch.rows), "rows", 0, count),
        slots=array(view.slots, np.int64, count, "slots", 0, newest.num_blocks * newest.block_size),
        cos=pointers([cos for cos, _ in tables]),
        sin=pointers([sin for _, sin in tables]),
        segments=ctypes.addressof(segments),
        adapters=adapters.pointers(batch.adapters, keep),
        boundary=None if view.boundary is None else array(view.boundary, np.int32, count, "boundary", 0, 2**31 - 1),
        moves=ctypes.addressof(moves),
        moves_count=len(moves),
    )
    return args, keep
