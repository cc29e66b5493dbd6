"""A packed matrix as plain bfloat16, for products that are large enough to be cuBLAS's."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ruvllm_core.errors import ConfigError
from ruvllm_kernels_cuda.blocks import ONE, weights_tile
from ruvllm_kernels_cuda.packing import PackedPart

_ROWS = 16  # of a program: 32 values a thread, which leaves room for many programs


@triton.jit
def _dequant_kernel(
    data,
    factors,
    out,
    first,
    count,
    rows,
    columns,
    one,
    SCALES: tl.constexpr,
    BITS: tl.constexpr,
    CHUNKS: tl.constexpr,
    ROWS: tl.constexpr,
):
    record = tl.program_id(1)
    i = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    keep = i < count
    values = weights_tile(
        data, factors, record, 0, first + i, keep, rows, one, SCALES, BITS, CHUNKS, GROUPS=8, TYPE=out.dtype.element_ty
    )
    k = record * 256 + tl.arange(0, 256)
    at = out + i.to(tl.int64)[:, None] * columns + k[None, :]
    tl.store(at, values, mask=keep[:, None] & (k < columns)[None, :])


def dequantize_rows(part: PackedPart, out: Tensor, first: int = 0, count: int | None = None) -> Tensor:
    """Rows ``[first, first + count)`` of a part, into the beginning of `out`.

    Args:
        out: contiguous bfloat16, float16 or float32 with room for ``count * columns`` values, of any shape.
        first: of the part, not of the matrix.

    Returns a view ``[count, columns]`` of `out`. Raises `ConfigError` if it has no room.
    """
    count = part.rows - first if count is None else count
    if not (first >= 0 and 0 < count <= part.rows - first and out.numel() >= count * part.columns):
        raise ConfigError(
            f"rows {first}:{first + count} of {part.rows} x {part.columns} do not fit into {out.numel()} values"
        )
    view = out.view(-1)[: count * part.columns].view(count, part.columns)
    layout = part.layout
    if layout is None:
        return view.copy_(part.data[first : first + count])
    factors = part.data if part.factors is None else part.factors
    _dequant_kernel[(triton.cdiv(count, _ROWS), part.records)](
        part.data, factors, view, first, count, part.rows, part.columns, ONE,
        SCALES=layout.scales, BITS=layout.bits, CHUNKS=layout.chunks, ROWS=_ROWS, num_warps=4,
    )  # fmt: skip
    return view
