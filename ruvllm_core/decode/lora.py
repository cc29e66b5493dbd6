"""Applying low-rank adapters (LoRA, arXiv 2106.09685) to hidden states on the host."""

from __future__ import annotations

import numpy as np

from ruvllm_core.decode.batch import Batch
from ruvllm_core.protocols import FloatArray

FINAL_SITE = "final"


def apply_final(hidden: FloatArray, batch: Batch) -> FloatArray:
    """Hidden states ``[R, C]`` with each row's own ``final`` adapter added; the same array if nobody has one."""
    if not any(adapter is not None and FINAL_SITE in adapter.sites for adapter in batch.adapters):
        return hidden
    changed = hidden.copy()
    owners = np.searchsorted(batch.cu_q, batch.rows, side="right") - 1
    for row, owner in enumerate(owners):
        adapter = batch.adapters[owner]
        delta = adapter.sites.get(FINAL_SITE) if adapter is not None else None
        if delta is not None:
            changed[row] += delta.scale * (delta.b @ (delta.a @ hidden[row]))
    return changed
