"""Attention of one or a few queries a sequence, its cache split among many programs ("flash decoding").

Memory bounds it: keys and values are read once, 2·K·D values a token. At batch 1 there are only K programs without
splitting, so the tiles of a sequence are dealt out to as many programs as the GPU holds at a time; each leaves its
weighted mean and the logarithm of its sum, and a second kernel adds them in fixed order, so that the same input gives
the same bits. The parts are under 6 % of what is read at depth 8192. Coded segments are decoded after they are loaded:
about four instructions a value, which is close to what 132 multiprocessors do while memory delivers 4-bit codes.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ruvllm_kernels_cuda.attention_kernel import Attention, Tuning, launch
from ruvllm_kernels_cuda.segments import CodedKV, DeviceSegment

#: Keys of a tile, warps and stages that a benchmark tries; the first is used. Rows follow from the group.
TUNINGS = ((64, 4, 3), (64, 4, 4), (64, 4, 5), (32, 4, 4), (64, 8, 3), (128, 4, 2), (128, 8, 3), (32, 2, 4))
#: The same where a segment is coded.
CODED_TUNINGS = ((64, 4, 3), (64, 8, 3), (32, 4, 3), (128, 8, 2))
PROGRAMS = 2  # a multiprocessor, so that one computes while another waits for memory
MOST_ROWS = 64  # of one program: with more, `prefill_attention` is the faster one


@triton.jit(do_not_specialize=["splits"])
def _combine(parts, sums, out, splits, D: tl.constexpr, DP: tl.constexpr, SPLITS: tl.constexpr):
    """Parts ``[lines, splits, D]`` and logarithms of their sums, base 2, to ``[lines, D]``. One program a line."""
    line = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, DP)
    s = tl.arange(0, SPLITS)
    best = float("-inf")
    for at in range(0, splits, SPLITS):
        found = tl.load(sums + line * splits + at + s, mask=at + s < splits, other=float("-inf"))
        best = tl.maximum(best, tl.max(found, 0))
    best = tl.where(best == float("-inf"), 0.0, best)
    total = 0.0
    mixed = tl.zeros((DP,), tl.float32)
    for at in range(0, splits, SPLITS):
        found = tl.load(sums + line * splits + at + s, mask=at + s < splits, other=float("-inf"))
        weight = tl.exp2(found - best)
        wanted = (weight > 0.0)[:, None] & (d < D)[None, :]  # what is not there was not written
        part = tl.load(parts + (line * splits + at + s)[:, None] * D + d[None, :], mask=wanted, other=0.0)
        mixed += tl.sum(part * weight[:, None], 0)
        total += tl.sum(weight, 0)
    answer = mixed / tl.where(total > 0.0, total, 1.0)
    tl.store(out + line * D + d, answer.to(out.dtype.element_ty), mask=d < D)


def decode_rows(heads: int, kv_heads: int, max_tokens: int) -> int:
    """Query rows of a program: a power of two, 16 at least, as the matrix units want them."""
    return max(16, int(triton.next_power_of_2(heads // kv_heads * max_tokens)))


def plan_splits(sequences: int, kv_heads: int, max_context: int, processors: int = 132, tile: int = 64) -> int:
    """Into how many parts each sequence's cache is split, so that all programs fit on the GPU at a time.

    It is fixed when a graph is captured; `max_context` is the longest that a sequence of that graph may become.
    """
    return max(1, min(PROGRAMS * processors // (sequences * kv_heads), -(-max_context // tile)))


def decode_workspace(
    tokens: int, heads: int, head_dim: int, splits: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Where `decode_attention` leaves parts and logarithms of their sums: float32, for the most tokens of a step."""
    return (
        torch.empty(tokens, heads, splits, head_dim, dtype=torch.float32, device=device),
        torch.empty(tokens, heads, splits, dtype=torch.float32, device=device),
    )


def decode_attention(
    query: Tensor,
    segments: Sequence[DeviceSegment],
    call: Attention,
    max_tokens: int,
    splits: int,
    workspace: tuple[Tensor, Tensor] | None = None,
    out: Tensor | None = None,
    tuning: tuple[int, int, int] | None = None,
) -> Tensor:
    """Causal attention ``[T, H, D]`` of at most `max_tokens` queries a sequence over its segments, oldest first.

    `splits` comes from `plan_splits`, `workspace` from `decode_workspace` with the same splits and T or more tokens.
    Tokens that no sequence owns come out undefined. Raises `ConfigError` for segments that no cache policy makes.
    """
    tokens, heads, dim = query.shape
    out = torch.empty_like(query) if out is None else out
    if tuning is None:
        tuning = (CODED_TUNINGS if any(isinstance(one.kv, CodedKV) for one in segments) else TUNINGS)[0]
    tile, warps, stages = tuning
    rows = min(decode_rows(heads, segments[-1].kv.keys.shape[1], max_tokens), MOST_ROWS)
    blocks = -(-max_tokens * (heads // segments[-1].kv.keys.shape[1]) // rows)
    shape = Tuning(rows, tile, warps, stages)
    if splits == 1:
        launch(query, segments, call, out, None, shape, blocks, 1)
        return out
    parts, sums = decode_workspace(tokens, heads, dim, splits, query.device) if workspace is None else workspace
    launch(query, segments, call, parts, sums, shape, blocks, splits)
    padded = triton.next_power_of_2(dim)
    _combine[(tokens * heads,)](parts, sums, out, splits, D=dim, DP=padded, SPLITS=16, num_warps=4)
    return out
