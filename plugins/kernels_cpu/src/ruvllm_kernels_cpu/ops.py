"""Single operations for the eager decoder, over PyTorch tensors on the CPU.

Everything is float32 but the keys and values of a cache. Types, shapes and indices are checked here: C trusts them.
"""

from __future__ import annotations

import ctypes
import threading
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ruvllm_core.decode import reference
from ruvllm_core.decode.coded import CodedStorage
from ruvllm_core.decode.kv import KVView, Segment
from ruvllm_core.decode.ops import AttentionInput
from ruvllm_core.errors import ConfigError, OutOfMemoryError
from ruvllm_core.model.quant import SCHEMES, QuantTensor
from ruvllm_kernels_cpu import abi, library, ops_abi
from ruvllm_kernels_cpu.mapping import mapping_under

_KV_TYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
_MOST_ROWS = 2**31 - 1


class Weight:
    """Matrices of equal width, stacked by rows: what `CpuOps.prepare` makes.

    Attributes:
        rows, columns: of the whole.
    """

    def __init__(self, parts: Sequence[QuantTensor]) -> None:
        self.rows, self.columns = sum(part.num_rows for part in parts), parts[0].columns if parts else 0
        if not 0 < self.rows <= _MOST_ROWS or any(len(p.shape) != 2 or p.columns != self.columns for p in parts):
            raise ValueError(f"matrices of equal width are needed, got {[part.shape for part in parts]}")
        self.data = [np.ascontiguousarray(part.data) for part in parts]
        self.matrices = (abi.Matrix * len(parts))(
            *(
                abi.Matrix(
                    data=data.ctypes.data,
                    rows=part.num_rows,
                    cols=part.columns,
                    row_bytes=data.shape[1],
                    scheme=SCHEMES[part.scheme].ggml_type,
                    mapped=mapping_under(data) is not None,
                )
                for part, data in zip(parts, self.data, strict=True)
            )
        )
        self.packed: ctypes.c_void_p | None = None


class CpuOps:
    """The operations, with threads of their own; see `ruvllm_core.decode.ops.Ops` for what each computes.

    Any thread may call them, one at a time goes through. Raises `ConfigError` for tensors that are not float32 or not
    on the CPU, `ValueError` for shapes that do not fit together or indices out of range, and `OutOfMemoryError`.

    Args:
        kernels: a table of `library.kernels`.
        threads: how many threads compute.
        activation_bits: 8 or 16, of activations in products with quantized weights.
    """

    def __init__(self, kernels: ctypes.c_void_p, threads: int, activation_bits: int) -> None:
        self._library = ops_abi.declare(library.load())
        self._lock = threading.Lock()
        self._handle = ctypes.c_void_p()
        _check(self._library.rv_ops_open(kernels, threads, activation_bits, ctypes.byref(self._handle)))
        weakref.finalize(self, self._library.rv_ops_close, self._handle)

    def table(self) -> Mapping[str, Callable[..., Any]]:
        """All of them by name."""
        names = ("prepare", "linear", "embed", "rms_norm", "add_rms_norm", "rope", "kv_append", "attention", "gated")
        return {name: getattr(self, name) for name in names}

    def prepare(self, tensors: Sequence[QuantTensor]) -> Weight:
        # Packed when first multiplied with: embeddings that are only looked up are read from where they are.
        return Weight(tensors)

    def linear(self, x: Tensor, weight: Weight) -> Tensor:
        x = _floats(x, "x", (None, weight.columns))
        if weight.packed is None:
            packed = ctypes.c_void_p()
            self._call("rv_op_prepare", weight.matrices, len(weight.matrices), ctypes.byref(packed))
            weight.packed = packed
            weakref.finalize(weight, self._library.rv_op_release, packed)
        out = torch.empty((len(x), weight.rows))
        if len(x):
            self._call("rv_op_linear", weight.packed, x.data_ptr(), len(x), out.data_ptr())
        return out

    def embed(self, weight: Weight, tokens: Tensor) -> Tensor:
        if len(weight.matrices) != 1:
            raise ValueError("embeddings are one matrix")
        ids = np.ascontiguousarray(tokens.numpy(), dtype=np.int64)
        _within(ids, (None,), 0, weight.rows, "tokens")
        out = torch.empty((len(ids), weight.columns))
        if len(ids):
            self._call("rv_op_embed", weight.matrices, ids.ctypes.data, len(ids), out.data_ptr())
        return out

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        return self._norm(_floats(x, "x", (None, None)), None, weight, eps)

    def add_rms_norm(self, x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        total = _floats(x, "x", (None, None)).clone()
        return total, self._norm(total, _floats(residual, "residual", tuple(x.shape)), weight, eps)

    def _norm(self, total: Tensor, add: Tensor | None, weight: Tensor, eps: float) -> Tensor:
        count, columns = total.shape
        scale, out = _floats(weight, "weight", (columns,)), torch.empty_like(total)
        if count:
            added = None if add is None else add.data_ptr()
            sizes = count, columns, float(eps)
            self._call("rv_op_norm", total.data_ptr(), added, scale.data_ptr(), *sizes, out.data_ptr())
        return out

    def rope(self, x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
        out = _floats(x, "x", (None, None, None)).clone(memory_format=torch.contiguous_format)
        count, heads, dim = out.shape
        cos = _floats(cos, "cos", (count, None))
        sin, half = _floats(sin, "sin", tuple(cos.shape)), cos.shape[1]
        if 2 * half > dim:
            raise ValueError(f"cos has {half} columns, heads have {dim} values")
        shape = ops_abi.Shape(heads=heads, head_dim=dim, rope_dim=2 * half, rope_interleaved=interleaved)
        if out.numel():
            self._call("rv_op_rope", out.data_ptr(), count, shape, cos.data_ptr(), sin.data_ptr())
        return out

    def gated(self, gate_up: Tensor, activation: str) -> Tensor:
        both = _floats(gate_up, "gate_up", (None, None))
        count, inner = len(both), both.shape[1] // 2
        if 2 * inner != both.shape[1] or activation not in abi.ACTIVATIONS:
            raise ValueError(f"gate_up {tuple(both.shape)} has no halves, or {activation!r} is no activation")
        out = torch.empty((count, inner))
        if count:
            kind = abi.ACTIVATIONS.index(activation)
            self._call("rv_op_gated", both.data_ptr(), count, inner, kind, out.data_ptr())
        return out

    def kv_append(self, view: KVView, layer: int, key: Tensor, value: Tensor) -> None:
        """The reference does it where tokens are moved, or storages are quantized: here only whole steps do."""
        if _has_tiers(view):
            return reference.kv_append(view, layer, key, value)
        keep: list[Any] = []
        segment, shape = _segment(view.segments[-1], layer, key.shape[1], key.shape[2], keep)
        key = _floats(key, "key", (len(view.slots), shape.kv_heads, shape.head_dim))
        value = _floats(value, "value", tuple(key.shape))
        slots = np.ascontiguousarray(view.slots, dtype=np.int64)
        storage = view.segments[-1].storage
        _within(slots, (None,), 0, storage.num_blocks * storage.block_size, "slots")
        if len(slots):
            where = slots.ctypes.data, len(slots)
            self._call("rv_op_kv_append", segment, shape, *where, key.data_ptr(), value.data_ptr())
        return None

    def attention(self, call: AttentionInput) -> Tensor:
        """The reference does it where segments overlap or are quantized."""
        if _has_tiers(call.view):
            return reference.attention(call)
        keep: list[Any] = []
        query = _floats(call.query, "query", (None, None, None))
        count, heads, dim = query.shape
        cu_q = np.array(call.cu_q, dtype=np.int32)
        starts = np.array(call.positions, dtype=np.int64)
        _within(starts, (len(cu_q) - 1,), 0, 2**31 - count, "positions")
        if len(cu_q) < 2 or cu_q[0] != 0 or cu_q[-1] != count or (np.diff(cu_q) < 1).any():
            raise ValueError(f"cu_q must rise from 0 to the {count} tokens, got {cu_q.tolist()}")
        kv_heads = call.view.segments[0].storage.keys[call.layer].shape[1]
        if heads % kv_heads:
            raise ValueError(f"{heads} query heads cannot share {kv_heads} key/value heads")
        found = [_segment(segment, call.layer, kv_heads, dim, keep, len(starts)) for segment in call.view.segments]
        segments = (abi.Segment * len(found))(*(segment for segment, _ in found))
        runs = zip(cu_q[:-1], cu_q[1:], starts, strict=True)
        positions = np.concatenate([np.arange(stop - at, dtype=np.int64) + start for at, stop, start in runs])
        batch = abi.BatchArgs(
            tokens_count=count,
            sequences=len(starts),
            segments_count=len(segments),
            positions=positions.ctypes.data,
            cu_q=cu_q.ctypes.data,
            segments=ctypes.addressof(segments),
        )
        shape = ops_abi.Shape(
            heads=heads,
            kv_heads=kv_heads,
            head_dim=dim,
            window=call.window or 0,
            scale=call.scale,
            softcap=call.softcap or 0.0,
        )
        out = torch.empty_like(query)
        self._call("rv_op_attention", batch, shape, query.data_ptr(), out.data_ptr())
        return out

    def _call(self, name: str, *arguments: Any) -> None:
        with self._lock:
            _check(getattr(self._library, name)(self._handle, *arguments))


def _has_tiers(view: KVView) -> bool:
    coded = any(isinstance(segment.storage, CodedStorage) for segment in view.segments)
    return coded or bool(view.moves) or view.boundary is not None


def _floats(x: Tensor, name: str, shape: tuple[int | None, ...]) -> Tensor:
    """`x` without gaps. Raises unless it is float32 on the CPU and of `shape`, where None is any number."""
    if x.dtype != torch.float32 or x.device.type != "cpu":
        raise ConfigError(
            f"kernels cpu: {name} is {x.dtype} on {x.device}, operations compute in float32 on the CPU",
            hint="set dtype float32",
        )
    if len(x.shape) != len(shape) or any(b is not None and a != b for a, b in zip(x.shape, shape, strict=True)):
        raise ValueError(f"{name} must be {list(shape)}, got {list(x.shape)}")
    return x.contiguous()


def _within(values: npt.NDArray[Any], shape: tuple[int | None, ...], low: int, high: int, name: str) -> None:
    if len(values.shape) != len(shape) or any(
        b is not None and a != b for a, b in zip(values.shape, shape, strict=True)
    ):
        raise ValueError(f"{name} must be {list(shape)}, got {list(values.shape)}")
    if values.size and not (low <= values.min() and values.max() < high):
        raise ValueError(f"{name} must be in [{low}, {high}), got {values.min()} … {values.max()}")


def _segment(
    segment: Segment, layer: int, kv_heads: int, dim: int, keep: list[Any], sequences: int | None = None
) -> tuple[abi.Segment, ops_abi.Shape]:
    """One layer of a segment, and its shape; `keep` takes what it points to. Sequences are looked at where given."""
    storage = segment.storage
    size, blocks = storage.block_size, storage.num_blocks
    pointers = []
    for stored in (storage.keys[layer], storage.values[layer]):
        if not isinstance(stored, Tensor) or stored.dtype not in _KV_TYPES or stored.device.type != "cpu":
            raise ConfigError(
                f"kernels cpu cannot read keys and values in {storage.scheme}", hint="use f32, f16 or bf16"
            )
        if tuple(stored.shape) != (blocks, kv_heads, size, dim) or not stored.is_contiguous():
            raise ValueError(f"storage must be contiguous {[blocks, kv_heads, size, dim]}, got {list(stored.shape)}")
        pointers.append((ctypes.c_void_p * 1)(stored.data_ptr()))
    if storage.keys[layer].dtype != storage.values[layer].dtype:
        raise ValueError("keys and values must be of one type")
    keep += pointers
    found = abi.Segment(
        type=_KV_TYPES[storage.keys[layer].dtype],
        block_size=size,
        keys=ctypes.addressof(pointers[0]),
        values=ctypes.addressof(pointers[1]),
    )
    if sequences is not None:
        table, lengths, starts = (
            np.ascontiguousarray(values, dtype=np.int32)
            for values in (segment.block_table, segment.lengths, segment.starts)
        )
        _within(table, (sequences, None), -(2**31), 2**31, "block_table")
        _within(lengths, (sequences,), 0, table.shape[1] * size + 1, "lengths")
        _within(starts, (sequences,), 0, 2**31 - 1, "starts")
        used = np.arange(table.shape[1]) * size < lengths[:, None]
        if ((table < 0) | (table >= blocks))[used].any():
            raise ValueError(f"block_table names blocks outside of [0, {blocks})")
        keep += [table, lengths, starts]
        found.table_stride = table.shape[1]
        found.table, found.lengths, found.starts = (one.ctypes.data for one in (table, lengths, starts))
    return found, ops_abi.Shape(kv_heads=kv_heads, head_dim=dim)


def _check(status: int) -> None:
    if status == 1:
        raise OutOfMemoryError("kernels cpu: no memory for an operation", hint="use a smaller prefill_chunk")
    if status:
        raise OutOfMemoryError(f"kernels cpu: an operation failed ({status})", hint="set threads lower")
