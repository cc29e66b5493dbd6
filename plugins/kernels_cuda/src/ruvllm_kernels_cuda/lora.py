"""Low-rank deltas of many adapters at once (LoRA, arXiv 2106.09685; batched as Punica's BGMV, arXiv 2310.18547).

Each row of a batch names its adapter; all adapters' factors are in one pool, which may be overwritten between replays
of a CUDA graph. Memory bounds it: r·(in + out) values a row, under 2 % of a layer's weights at rank 16. The first
kernel splits the input among programs, so that one row at batch 1 does not wait for a single multiprocessor; the
second adds their parts in fixed order and writes the output once.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

#: Inputs of a program of the first kernel, outputs of one of the second, and warps; the first is used.
TUNINGS = ((512, 128, 4), (256, 64, 2), (1024, 256, 4))


@dataclass(frozen=True, eq=False)
class LowRankPool:
    """Factors of all adapters at one site; unused ranks are zero.

    Attributes:
        a: ``[slots, r, in]``, of any float type; r is a power of two.
        b: ``[slots, out, r]``, of the same type.
        scale: float32 ``[slots]``.
    """

    a: Tensor
    b: Tensor
    scale: Tensor

    def put(self, slot: int, a: Tensor, b: Tensor, scale: float) -> None:
        """Overwrite an adapter with factors ``[rank, in]`` and ``[out, rank]``; the rank is at most the pool's."""
        rank = a.shape[0]
        self.a[slot, :rank], self.a[slot, rank:] = a, 0
        self.b[slot, :, :rank], self.b[slot, :, rank:] = b, 0
        self.scale[slot] = scale


def low_rank_pool(
    slots: int, rank: int, inputs: int, outputs: int, device: torch.device, dtype: torch.dtype = torch.bfloat16
) -> LowRankPool:
    """An empty pool for adapters of at most `rank`. Every adapter in it adds nothing yet."""
    wide = triton.next_power_of_2(max(rank, 1))
    return LowRankPool(
        torch.zeros(slots, wide, inputs, dtype=dtype, device=device),
        torch.zeros(slots, outputs, wide, dtype=dtype, device=device),
        torch.zeros(slots, dtype=torch.float32, device=device),
    )


@triton.jit
def _shrink(x, a, parts, adapters, width, x_stride, R: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(1)
    adapter = tl.load(adapters + row).to(tl.int64)
    if adapter < 0:
        return
    r = tl.arange(0, R)
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    values = tl.load(x + row.to(tl.int64) * x_stride + column, mask=inside, other=0.0).to(tl.float32)
    places = (adapter * R + r)[:, None] * width + column[None, :]
    factors = tl.load(a + places, mask=inside[None, :], other=0.0).to(tl.float32)
    part = tl.sum(factors * values[None, :], 1)
    tl.store(parts + (row * tl.num_programs(0) + tl.program_id(0)) * R + r, part)


@triton.jit
def _expand(
    y, b, scale, parts, adapters, width, y_stride,
    PARTS: tl.constexpr, PP: tl.constexpr, R: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(1)
    adapter = tl.load(adapters + row).to(tl.int64)
    if adapter < 0:
        return
    r = tl.arange(0, R)
    p = tl.arange(0, PP)
    found = tl.load(parts + (row * PARTS + p)[:, None] * R + r[None, :], mask=(p < PARTS)[:, None], other=0.0)
    inner = tl.sum(found, 0) * tl.load(scale + adapter)
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    factors = tl.load(b + (adapter * width + column)[:, None] * R + r[None, :], mask=inside[:, None], other=0.0)
    delta = tl.sum(factors.to(tl.float32) * inner[None, :], 1)
    place = y + row.to(tl.int64) * y_stride + column
    tl.store(place, (tl.load(place, mask=inside).to(tl.float32) + delta).to(y.dtype.element_ty), mask=inside)


def lora_workspace(tokens: int, pool: LowRankPool, tuning: tuple[int, int, int] = TUNINGS[0]) -> Tensor:
    """Where `add_low_rank` leaves ``A x``: float32, for the most tokens of a step."""
    parts, rank = triton.cdiv(pool.a.shape[2], tuning[0]), pool.a.shape[1]
    return torch.empty(tokens, parts, rank, dtype=torch.float32, device=pool.a.device)


def add_low_rank(
    y: Tensor,
    x: Tensor,
    pool: LowRankPool,
    adapters: Tensor,
    workspace: Tensor | None = None,
    tuning: tuple[int, int, int] = TUNINGS[0],
) -> Tensor:
    """Add ``scale[i] * B[i] (A[i] x[t])`` to row t of `y`, in float32, for its adapter i.

    Args:
        y: ``[T, out]`` of any float type, changed in place; a slice of columns is fine. At the ``final`` site it may be
            `x` itself: the change is computed of `x` as it was.
        x: ``[T, in]``.
        adapters: int32 ``[T]``, each row's slot in the pool; -1 is none.
        workspace: from `lora_workspace` with the same tuning and T or more tokens.
    """
    inputs, outputs, (tokens, rank) = x.shape[1], y.shape[1], (x.shape[0], pool.a.shape[1])
    wide_in, wide_out, warps = tuning
    parts = lora_workspace(tokens, pool, tuning) if workspace is None else workspace
    count = triton.cdiv(inputs, wide_in)
    _shrink[(count, tokens)](x, pool.a, parts, adapters, inputs, x.stride(0), R=rank, BLOCK=wide_in, num_warps=warps)
    _expand[(triton.cdiv(outputs, wide_out), tokens)](
        y, pool.b, pool.scale, parts, adapters, outputs, y.stride(0),
        PARTS=count, PP=triton.next_power_of_2(count), R=rank, BLOCK=wide_out, num_warps=warps,
    )  # fmt: skip
    return y
