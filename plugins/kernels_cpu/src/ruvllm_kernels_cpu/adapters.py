"""Adapters as the C library reads them, made once for each."""

from __future__ import annotations

import ctypes
from bisect import bisect_right
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import numpy as np

from ruvllm_core.decode.batch import Batch
from ruvllm_core.decode.lora import FINAL_SITE
from ruvllm_core.model.spec import ModelSpec
from ruvllm_core.protocols import Adapter, FloatArray, LowRank
from ruvllm_kernels_cpu import abi

#: Sites of a layer that read the same input, first and last + 1.
_INPUTS = ((0, 3), (3, 4), (4, 6), (6, 7))
_LARGE_PAGE, _NUMPY_ASKS = 2**21 // 4, 2**22 // 4  # floats
_PANEL = 16  # rows of b that stand together: of rank 1, a line of memory


class _Table(NamedTuple):
    """Where the C structure of an adapter is, and what has to live as long."""

    address: int
    owners: tuple[Any, ...]


class AdapterTables:
    """For each adapter its low-rank deltas in all layers and at the final site."""

    def __init__(self, spec: ModelSpec) -> None:
        names = [f"layers.{n}.{site}" for n in range(spec.num_layers) for site in abi.SITES]
        self._shapes = {name: _site_shape(spec, name.split(".", 2)[2]) for name in names}
        self._shapes[FINAL_SITE] = spec.hidden_size, spec.hidden_size
        self._tables: WeakKeyDictionary[Adapter, _Table] = WeakKeyDictionary()
        self._last: tuple[tuple[Adapter | None, ...], int | None, tuple[Any, ...]] = (), None, ()

    def pointers(self, adapters: tuple[Adapter | None, ...], keep: list[Any]) -> int | None:
        """Address of one pointer for each of `adapters`, or None if all are None; `keep` takes what must stay alive.

        Raises `ValueError` for matrices that do not fit the model.
        """
        if adapters != self._last[0]:  # mostly they are those of the step before, and no code is near after a step
            tables = [self._find(adapter) if adapter else None for adapter in adapters]
            found = (ctypes.c_void_p * len(adapters))(*(table and table.address for table in tables))
            self._last = adapters, ctypes.addressof(found) if any(tables) else None, (found, tables)
        _, address, owners = self._last
        keep.append(owners)
        return address

    def of_rows(self, batch: Batch, count: int, keep: list[Any]) -> int | None:
        """`pointers` to the adapters of the wanted rows of a batch. Raises `ValueError` unless they are `count`."""
        if len(batch.rows) != count:
            raise ValueError(f"{count} hidden states for the {len(batch.rows)} rows of a batch")
        if len(batch.adapters) == 1:
            return self.pointers(batch.adapters * len(batch.rows), keep)
        ends = batch.cu_q[1:].tolist()
        return self.pointers(tuple(batch.adapters[bisect_right(ends, row)] for row in batch.rows.tolist()), keep)

    def _find(self, adapter: Adapter) -> _Table:
        try:
            return self._tables[adapter]
        except KeyError:
            found = self._tables[adapter] = self._table(adapter)
            return found

    def _table(self, adapter: Adapter) -> _Table:
        """The C structure and what it points to: all numbers in the order in which a step reads them."""
        deltas = [self._delta(adapter, name) for name in self._shapes]
        room = sum(_room(one.a.size) + _room(len(one.b)) * len(one.a) for one in deltas if one)
        numbers = _floats(room)
        base, at, widest = numbers.ctypes.data, 0, 0
        sites = (abi.LowRank * len(deltas))()
        final = len(deltas) - 1
        runs = [(layer + i, layer + j) for layer in range(0, final, len(abi.SITES)) for i, j in _INPUTS]
        for first, last in [*runs, (final, final + 1)]:
            found = [(n, one) for n in range(first, last) if (one := deltas[n]) is not None]
            if first < final:
                widest = max(widest, sum(len(delta.a) for _, delta in found))
            for n, delta in found:
                numbers[at : at + delta.a.size] = delta.a.ravel()
                sites[n] = abi.LowRank(base + 4 * at, None, delta.scale, len(delta.a))
                at += delta.a.size
            at = _room(at)
            for n, delta in found:
                panels = _panels(delta.b)
                numbers[at : at + panels.size] = panels.ravel()
                sites[n].b = base + 4 * at
                at += panels.size
        head = abi.Adapter(ctypes.addressof(sites), widest)
        return _Table(ctypes.addressof(head), (head, sites, numbers))

    def _delta(self, adapter: Adapter, name: str) -> LowRank | None:
        delta = adapter.sites.get(name)
        if delta is None:
            return None
        (width, height), rank = self._shapes[name], len(delta.a)
        if delta.a.shape != (rank, width) or delta.b.shape != (height, rank) or rank < 1:
            raise ValueError(
                f"adapter {adapter.version}, {name}: a {delta.a.shape} and b {delta.b.shape} "
                f"must be [r, {width}] and [{height}, r]"
            )
        return delta


def _room(count: int) -> int:
    return -(-count // _PANEL) * _PANEL


def _floats(count: int) -> FloatArray:
    """Floats that begin on a line, and if they are many on a large page.

    Of such NumPy asks the system for, on Linux, where an array has 4 MiB.
    """
    unit, least = (_LARGE_PAGE, _NUMPY_ASKS) if count > _LARGE_PAGE // 8 else (_PANEL, 0)
    numbers = np.empty(max(count, least) + unit, dtype=np.float32)
    start = -(numbers.ctypes.data // 4) % unit
    found: FloatArray = numbers[start : start + count]
    return found


def _panels(b: FloatArray) -> FloatArray:
    """``[rows, rank]`` as ``[rows / 16, rank, 16]``, the last filled up with zeros."""
    rows, rank = b.shape
    if rows % _PANEL:
        b = np.concatenate([b, np.zeros((-rows % _PANEL, rank), np.float32)])
    panels: FloatArray = b.reshape(-1, _PANEL, rank).transpose(0, 2, 1)
    return panels


def _site_shape(spec: ModelSpec, site: str) -> tuple[int, int]:
    """Columns and rows of a layer's matrix."""
    hidden, inner = spec.hidden_size, spec.intermediate_size
    q, kv = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
    shapes = {"attn.q": (hidden, q), "attn.k": (hidden, kv), "attn.v": (hidden, kv), "attn.o": (q, hidden)}
    return {**shapes, "mlp.down": (inner, hidden)}.get(site, (hidden, inner))
