"""Applying low-rank adapters (LoRA, arXiv 2106.09685) to hidden states on the host."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence

import numpy as np

from ruvllm_core.decode.batch import Batch
from ruvllm_core.protocols import Adapter, FloatArray, LowRank

FINAL_SITE = "final"


def apply_final(hidden: FloatArray, batch: Batch) -> FloatArray:
    """Hidden states ``[R, C]`` with each row's own ``final`` adapter added; the same array if nobody has one."""
    if not any(adapter is not None and FINAL_SITE in adapter.sites for adapter in batch.adapters):
        return hidden
    changed: FloatArray = hidden.copy()
    ends = batch.cu_q[1:].tolist()  # lists and `dot` are NumPy's shortest ways: after a step no code of it is near
    for row, token in enumerate(batch.rows.tolist()):
        adapter = batch.adapters[bisect_right(ends, token)]
        delta = adapter.sites.get(FINAL_SITE) if adapter is not None else None
        if delta is not None:
            changed[row] += delta.b.dot(delta.a.dot(hidden[row]) * delta.scale)
    return changed


def combine(adapters: Sequence[Adapter]) -> Adapter:
    """One adapter that does what all do together: a sum of low-rank deltas is their factors side by side."""
    if len(adapters) == 1:
        return adapters[0]
    sites: dict[str, LowRank] = {}
    for site in sorted({site for adapter in adapters for site in adapter.sites}):
        deltas = [adapter.sites[site] for adapter in adapters if site in adapter.sites]
        sites[site] = LowRank(
            a=np.concatenate([delta.a for delta in deltas]),
            b=np.concatenate([delta.b * np.float32(delta.scale) for delta in deltas], axis=1),
        )
    return Adapter("+".join(adapter.version for adapter in adapters), sites)
