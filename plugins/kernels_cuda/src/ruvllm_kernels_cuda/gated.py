"""The gate of a feed-forward layer: ``act(gate) * up``.

Memory bounds it: three values move for one activation, so a program takes so many of a row that loads are wide and
the grid still fills the GPU at batch 1.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

#: Values of a program that a benchmark tries, and its warps; the first is used.
TUNINGS = ((512, 4), (256, 2), (1024, 4), (2048, 8))
#: Activations as kernels know them.
KINDS = {"silu": 0, "gelu_tanh": 1, "gelu": 2}


@triton.jit
def opened(gate, up, KIND: tl.constexpr):
    """``act(gate) * up``."""
    if KIND == 0:
        gate = gate * tl.sigmoid(gate)
    elif KIND == 1:  # x (1 + tanh(y)) / 2 = x sigmoid(2y)
        gate = gate * tl.sigmoid(1.5957691216057308 * (gate + 0.044715 * gate * gate * gate))
    else:
        gate = 0.5 * gate * (1.0 + tl.erf(0.7071067811865476 * gate))
    return gate * up


@triton.jit
def _gated(gate_up, out, width, in_stride, out_stride, KIND: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(1).to(tl.int64)
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    gate = tl.load(gate_up + row * in_stride + column, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * in_stride + width + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * out_stride + column, opened(gate, up, KIND).to(out.dtype.element_ty), mask=inside)


def gated(gate_up: Tensor, activation: str, out: Tensor | None = None, tuning: tuple[int, int] = TUNINGS[0]) -> Tensor:
    """``act(gate) * up`` of ``[T, 2I]``, gates first, as ``[T, I]`` bfloat16 or the type of `out`.

    `activation` is ``silu``, ``gelu_tanh`` or ``gelu``, as in `ruvllm_core.decode.ops.Ops`.
    """
    rows, width = gate_up.shape[0], gate_up.shape[1] // 2
    out = torch.empty(rows, width, dtype=torch.bfloat16, device=gate_up.device) if out is None else out
    block, warps = tuning
    _gated[(triton.cdiv(width, block), rows)](
        gate_up, out, width, gate_up.stride(0), out.stride(0), KIND=KINDS[activation], BLOCK=block, num_warps=warps
    )
    return out
