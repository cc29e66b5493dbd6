"""Attention of many queries at once (FlashAttention-2, arXiv 2307.08691) over the segments of a cache.

Arithmetic bounds it: 4·D operations a score, so tiles are as large as registers allow and go through the matrix
units. Only tiles on the diagonal are masked. A key/value head's query heads are rows of the same tiles, so that a
block of 128 rows spans few positions and wastes little of the diagonal.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ruvllm_kernels_cuda.attention_kernel import Attention, Tuning, launch
from ruvllm_kernels_cuda.segments import CodedKV, DeviceSegment

#: What a benchmark tries; the first is used.
TUNINGS = (Tuning(128, 64, 8, 3), Tuning(128, 64, 4, 3), Tuning(128, 128, 8, 2), Tuning(64, 64, 4, 3))
#: With a coded segment, whose tiles need more registers.
CODED_TUNINGS = (Tuning(64, 64, 8, 2), Tuning(64, 64, 4, 2), Tuning(128, 64, 8, 2))
#: In float32, which the matrix units do not take.
FLOAT32_TUNING = Tuning(32, 32, 4, 2)


def prefill_attention(
    query: Tensor,
    segments: Sequence[DeviceSegment],
    call: Attention,
    max_tokens: int,
    out: Tensor | None = None,
    tuning: Tuning | None = None,
) -> Tensor:
    """Causal attention of a ragged batch ``[T, H, D]`` over its segments, oldest first; `out` is of the same shape.

    `max_tokens` is the most tokens any sequence has here: programs are launched for so many of each.
    Raises `ConfigError` for segments that no cache policy makes (`sort_segments`).
    """
    out = torch.empty_like(query) if out is None else out
    if tuning is None:
        tuning = _pick(segments)
    group = query.shape[1] // segments[-1].kv.keys.shape[1]
    launch(query, segments, call, out, None, tuning, -(-max_tokens * group // tuning.rows), 1)
    return out


def _pick(segments: Sequence[DeviceSegment]) -> Tuning:
    if segments[-1].kv.keys.dtype == torch.float32:
        return FLOAT32_TUNING
    return (CODED_TUNINGS if any(isinstance(one.kv, CodedKV) for one in segments) else TUNINGS)[0]
