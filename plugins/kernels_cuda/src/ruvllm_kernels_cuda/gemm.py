"""Products of many activation rows: packed weights and tensor cores.

A program unpacks a tile of weights to bfloat16 and multiplies it, as the left operand, with the activations of up to
128 rows: at few rows the weights fill the matrix instructions' 64 rows, and the activations only as many of their
columns as there are. Unpacking costs about eight instructions a weight, so a program should have as many activation
rows as there are (up to 128), and for thousands it is cheaper to unpack a matrix once and leave the product to cuBLAS.
"""

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor

from ruvllm_kernels_cuda.blocks import ONE, finish, weights_tile
from ruvllm_kernels_cuda.packing import RECORD, PackedPart
from ruvllm_kernels_cuda.scratch import Scratch


@dataclass(frozen=True)
class TileConfig:
    """How a product is cut up.

    Attributes:
        rows: of the matrix a program has; 64 or 128.
        tokens: activation rows a program has, 16 to 256.
        groups: of 32 columns multiplied at a time: 2, 4 or 8.
        warps: of a program.
        stages: of the pipeline that fetches activations and weights.
        split: programs that share the columns of a row.
    """

    rows: int = 64
    tokens: int = 16
    groups: int = 4
    warps: int = 4
    stages: int = 3
    split: int = 1


#: What a benchmark should try, with each number of tokens and with several splits: rows, groups, warps, stages.
TILE_CANDIDATES = tuple(
    TileConfig(rows=rows, groups=groups, warps=warps, stages=stages)
    for rows, groups, warps, stages in (
        (64, 2, 4, 3),
        (64, 4, 4, 2),
        (64, 4, 4, 3),
        (64, 4, 4, 4),
        (64, 8, 4, 2),
        (128, 4, 4, 3),
        (128, 2, 8, 3),
        (128, 4, 8, 3),
        (128, 8, 8, 2),
    )
)


@triton.jit
def _tile_kernel(
    x,
    data,
    factors,
    bias,
    residual,
    out,
    partial,
    arrived,
    count,
    rows,
    columns,
    steps,
    x_stride,
    residual_stride,
    out_stride,
    one,
    SCALES: tl.constexpr,
    BITS: tl.constexpr,
    CHUNKS: tl.constexpr,
    ROWS: tl.constexpr,
    TOKENS: tl.constexpr,
    GROUPS: tl.constexpr,
    SPLIT: tl.constexpr,
    BIAS: tl.constexpr,
    RESIDUAL: tl.constexpr,
    EVEN: tl.constexpr,
    FACTOR: tl.constexpr,
):
    # Tiles that share weights are neighbours in the order of launching, so that the weights come from memory once.
    tile_m, tile_n, piece = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    n = tile_n * ROWS + tl.arange(0, ROWS)
    m = tile_m * TOKENS + tl.arange(0, TOKENS)
    keep_n, keep_m = n < rows, m < count
    total = tl.zeros((ROWS, TOKENS), tl.float32)
    pieces = tl.num_programs(2)
    per = tl.cdiv(steps, pieces)
    for step in range(piece * per, min(steps, (piece + 1) * per)):
        g0 = (step % (8 // GROUPS)) * GROUPS
        w = weights_tile(
            data, factors, step // (8 // GROUPS), g0, n, keep_n, rows, one, SCALES, BITS, CHUNKS, GROUPS, tl.bfloat16
        )
        k = step * (32 * GROUPS) + tl.arange(0, 32 * GROUPS)
        keep = keep_m[None, :] if EVEN else keep_m[None, :] & (k < columns)[:, None]
        a = tl.load(x + m[None, :] * x_stride + k[:, None], mask=keep, other=0.0).to(tl.bfloat16)
        total = tl.dot(w.to(FACTOR), a.to(FACTOR), total)
    finish(
        total,
        m[None, :],
        n[:, None],
        tile_n * tl.num_programs(0) + tile_m,
        piece,
        pieces,
        rows,
        count,
        bias,
        residual,
        out,
        partial,
        arrived,
        residual_stride,
        out_stride,
        SPLIT,
        BIAS,
        RESIDUAL,
        -1,
    )


def tile_config_for(part: PackedPart, count: int, processors: int) -> TileConfig:
    """A configuration by rule: all activation rows in one program up to 128, two programs a multiprocessor."""
    tokens = min(128, max(16, triton.next_power_of_2(count)))
    rows, warps = (64, 4) if tokens <= 64 else (128, 8)
    tiles = -(-part.rows // rows) * -(-count // tokens)
    groups = 4 if tokens <= 64 else 2
    split = min(-(-2 * processors // tiles), -(-part.records // 2))
    return TileConfig(rows, tokens, groups, warps, 3, max(split, 1))


def gemm(
    x: Tensor,
    part: PackedPart,
    out: Tensor,
    scratch: Scratch,
    config: TileConfig,
    *,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """``out = x @ partᵀ + bias + residual`` for a part that has a layout; x is rounded to bfloat16. See `gemv`."""
    layout = part.layout
    assert layout is not None, "float matrices are cuBLAS's"
    count, rows = x.shape[0], part.rows
    flags = {"BIAS": bias is not None, "RESIDUAL": residual is not None}
    bias, residual = x if bias is None else bias, out if residual is None else residual
    tiles = triton.cdiv(count, config.tokens), triton.cdiv(rows, config.rows)
    split = config.split
    if split * count * rows > scratch.partial.numel() or tiles[0] * tiles[1] > scratch.arrived.numel():
        split = 1
    factors = part.data if part.factors is None else part.factors
    # The interpreter takes the bits of bfloat16 for integers when it multiplies: it gets the rounded values as float32.
    factor = tl.float32 if x.device.type == "cpu" else tl.bfloat16
    grid = (*tiles, split)
    _tile_kernel[grid](
        x, part.data, factors, bias, residual, out, scratch.partial, scratch.arrived,
        count, rows, part.columns, part.records * (8 // config.groups),
        x.stride(0), residual.stride(0), out.stride(0), ONE,
        SCALES=layout.scales, BITS=layout.bits, CHUNKS=layout.chunks,
        ROWS=config.rows, TOKENS=config.tokens, GROUPS=config.groups, SPLIT=split > 1,
        EVEN=part.columns % RECORD == 0, FACTOR=factor, num_warps=config.warps, num_stages=config.stages, **flags,
    )  # fmt: skip
    return out
