"""Adapters as the C library reads them, made once for each."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np

from ruvllm_core.model.spec import ModelSpec
from ruvllm_core.protocols import Adapter
from ruvllm_kernels_cpu import abi


class AdapterTables:
    """For each adapter its low-rank deltas ``[layers][sites]``; the ``final`` site is not the decoder's."""

    def __init__(self, spec: ModelSpec) -> None:
        self._spec = spec
        self._tables: WeakKeyDictionary[Adapter, tuple[Any, Any]] = WeakKeyDictionary()

    def pointers(self, adapters: Sequence[Adapter | None], keep: list[Any]) -> int | None:
        """Address of one pointer a sequence, or None if none has deltas here; `keep` takes what must stay alive.

        Raises `ValueError` for matrices that do not fit the model.
        """
        if not any(one is not None and one.changes_cache for one in adapters):
            return None
        found = (ctypes.c_void_p * len(adapters))()
        for index, adapter in enumerate(adapters):
            if adapter is None or not adapter.changes_cache:
                continue
            if adapter not in self._tables:
                self._tables[adapter] = self._table(adapter)
            keep.append(self._tables[adapter])
            found[index] = ctypes.addressof(self._tables[adapter][0])
        keep.append(found)
        return ctypes.addressof(found)

    def _table(self, adapter: Adapter) -> tuple[Any, Any]:
        """The C structure and its numbers: one array in the order in which a step reads it, as memory likes best."""
        sites = [f"layers.{n}.{site}" for n in range(self._spec.num_layers) for site in abi.SITES]
        found = {index: adapter.sites[site] for index, site in enumerate(sites) if site in adapter.sites}
        for index, delta in found.items():
            width, height = _site_shape(self._spec, abi.SITES[index % len(abi.SITES)])
            rank = len(delta.a)
            if delta.a.shape != (rank, width) or delta.b.shape != (height, rank) or rank < 1:
                raise ValueError(
                    f"adapter {adapter.version}, {sites[index]}: a {delta.a.shape} and b {delta.b.shape} "
                    f"must be [r, {width}] and [{height}, r]"
                )
        table = (abi.LowRank * len(sites))()
        numbers = np.empty(sum(delta.a.size + delta.b.size for delta in found.values()), dtype=np.float32)
        at = 0
        for index, delta in found.items():
            places = []
            for factor in (delta.a, delta.b.T):
                numbers[at : at + factor.size] = np.ravel(factor)
                places.append(numbers.ctypes.data + 4 * at)
                at += factor.size
            table[index] = abi.LowRank(*places, delta.scale, len(delta.a))
        return table, numbers


def _site_shape(spec: ModelSpec, site: str) -> tuple[int, int]:
    """Columns and rows of a layer's matrix."""
    hidden, inner = spec.hidden_size, spec.intermediate_size
    q, kv = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
    shapes = {"attn.q": (hidden, q), "attn.k": (hidden, kv), "attn.v": (hidden, kv), "attn.o": (q, hidden)}
    return {**shapes, "mlp.down": (inner, hidden)}.get(site, (hidden, inner))
