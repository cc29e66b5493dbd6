"""Rows of a packed matrix by token."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ruvllm_kernels_cuda.blocks import ONE, weights_tile
from ruvllm_kernels_cuda.packing import PackedMatrix

_TOKENS = 4  # of a program
_WIDTH = 256  # columns of a program


@triton.jit
def _wanted(tokens, count, first, rows, total, TOKENS: tl.constexpr):
    """Which tokens, their rows in this part, whether it has them, and whether nobody has them."""
    i = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    token = tl.load(tokens + i, mask=i < count, other=0).to(tl.int64)
    here = (i < count) & (token >= first) & (token < first + rows)
    begins = first + 0 * i == 0  # a tile: the interpreter makes no mask of a tile and a scalar
    nowhere = (i < count) & begins & ((token < 0) | (token >= total))
    return i, tl.where(here, token - first, 0).to(tl.int32), here, nowhere


@triton.jit
def _embed_blocks(
    tokens,
    data,
    factors,
    out,
    count,
    first,
    rows,
    total,
    columns,
    one,
    SCALES: tl.constexpr,
    BITS: tl.constexpr,
    CHUNKS: tl.constexpr,
    TOKENS: tl.constexpr,
):
    i, n, here, nowhere = _wanted(tokens, count, first, rows, total, TOKENS)
    record = tl.program_id(1)
    values = weights_tile(data, factors, record, 0, n, here, rows, one, SCALES, BITS, CHUNKS, GROUPS=8, TYPE=tl.float32)
    values = tl.where(nowhere[:, None], float("nan"), values)
    k = record * 256 + tl.arange(0, 256)
    keep = (here | nowhere)[:, None] & (k < columns)[None, :]
    tl.store(out + i[:, None] * columns + k[None, :], values.to(out.dtype.element_ty), mask=keep)


@triton.jit
def _embed_floats(tokens, data, out, count, first, rows, total, columns, TOKENS: tl.constexpr, WIDTH: tl.constexpr):
    i, n, here, nowhere = _wanted(tokens, count, first, rows, total, TOKENS)
    k = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    fits = (k < columns)[None, :]
    at = data + n.to(tl.int64)[:, None] * columns + k[None, :]
    values = tl.load(at, mask=here[:, None] & fits, other=0.0).to(tl.float32)
    values = tl.where(nowhere[:, None], float("nan"), values)
    keep = (here | nowhere)[:, None] & fits
    tl.store(out + i[:, None] * columns + k[None, :], values.to(out.dtype.element_ty), mask=keep)


def embed(packed: PackedMatrix, tokens: Tensor, out: Tensor) -> Tensor:
    """``out[i] = matrix[tokens[i]]``.

    Args:
        tokens: int32 or int64 ``[T]`` on the device. A token that the matrix does not have becomes a row of NaN, which
            shows, where reading beyond the matrix might not.
        out: contiguous ``[T, columns]``, float32, bfloat16 or float16.
    """
    count, columns = tokens.shape[0], packed.columns
    if not count:
        return out
    blocks = triton.cdiv(count, _TOKENS), triton.cdiv(columns, _WIDTH)
    for part in packed.parts:
        layout, where = part.layout, (count, part.first, part.rows, packed.rows, columns)
        if layout is None:
            _embed_floats[blocks](tokens, part.data, out, *where, TOKENS=_TOKENS, WIDTH=_WIDTH, num_warps=4)
        else:
            factors = part.data if part.factors is None else part.factors
            _embed_blocks[blocks](
                tokens, part.data, factors, out, *where, ONE,
                SCALES=layout.scales, BITS=layout.bits, CHUNKS=layout.chunks, TOKENS=_TOKENS, num_warps=4,
            )  # fmt: skip
    return out
