"""RMS norm (arXiv 1910.07467), alone or behind the addition to the residual stream.

Memory bounds it: a row is read and written once, and stays in registers between. At batch 1 what counts is the
latency of one load, one reduction and one store, so a row is one program with 16 or so values a thread.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

#: Values of a row that a thread has; a benchmark tries them.
PER_THREAD = (16, 8, 32)


@triton.jit
def _norm(
    x, residual, weight, out, eps, x_stride, residual_stride, out_stride,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, ADD: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < WIDTH
    values = tl.load(x + row * x_stride + column, mask=inside, other=0.0).to(tl.float32)
    scales = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    if ADD:
        values += tl.load(residual + row * residual_stride + column, mask=inside, other=0.0)
        tl.store(residual + row * residual_stride + column, values, mask=inside)
    inverse = 1.0 / tl.sqrt(tl.sum(values * values, 0) / WIDTH + eps)
    tl.store(out + row * out_stride + column, (scales * (values * inverse)).to(out.dtype.element_ty), mask=inside)


def rms_norm(
    x: Tensor, weight: Tensor, eps: float, out: Tensor | None = None, dtype: torch.dtype = torch.bfloat16
) -> Tensor:
    """RMS norm of the rows of ``[T, C]`` times `weight` ``[C]``, computed in float32; `out` is made of `dtype`."""
    return _launch(x, None, weight, eps, out, dtype)


def add_rms_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    eps: float,
    out: Tensor | None = None,
    dtype: torch.dtype = torch.bfloat16,
) -> Tensor:
    """Add `x` ``[T, C]`` to `residual`, float32 and changed in place, and return the RMS norm of the sum."""
    return _launch(x, residual, weight, eps, out, dtype)


def _launch(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, out: Tensor | None, dtype: torch.dtype
) -> Tensor:
    rows, width = x.shape
    out = torch.empty(rows, width, dtype=dtype, device=x.device) if out is None else out
    block = triton.next_power_of_2(width)
    added = x if residual is None else residual
    _norm[(rows,)](
        x, added, weight, out, eps, x.stride(0), added.stride(0), out.stride(0),
        WIDTH=width, BLOCK=block, ADD=residual is not None,
        num_warps=max(1, min(32, block // (32 * PER_THREAD[0]))),
    )  # fmt: skip
    return out
