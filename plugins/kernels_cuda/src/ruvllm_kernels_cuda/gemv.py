"""Products of a few activation rows with a packed matrix on the ordinary cores: up to `MOST_ROWS` rows.

How they are computed is in `gemv_kernel.py`; here is how they are cut up and launched.
"""

from __future__ import annotations

from dataclasses import dataclass

import triton
from torch import Tensor

from ruvllm_kernels_cuda.blocks import ONE
from ruvllm_kernels_cuda.gated import KINDS
from ruvllm_kernels_cuda.gemv_kernel import blocks_kernel, float_kernel
from ruvllm_kernels_cuda.packing import RECORD, PackedPart
from ruvllm_kernels_cuda.scratch import Scratch

#: Activation rows that one launch takes.
MOST_ROWS = 4


@dataclass(frozen=True)
class Config:
    """How a product is cut up.

    Attributes:
        repeat: rows of the matrix a lane has; a program has 32 times as many (of float matrices: `repeat` rows).
        warps: of a program; each works on another record (of float matrices: on other columns).
        split: programs that share the columns of a row.
    """

    repeat: int = 4
    warps: int = 4
    split: int = 1


#: What a benchmark should try; each with several splits.
CANDIDATES = tuple(Config(repeat, warps) for repeat in (1, 2, 4) for warps in (2, 4, 8))
FLOAT_CANDIDATES = tuple(Config(repeat, warps) for repeat in (2, 4, 8) for warps in (2, 4, 8))
_WARPS = 16  # for each multiprocessor; those of an H100 have room for 64
_MOST_PIECES = 8  # of a row's columns: with 12, what was measured was slower


def config_for(part: PackedPart, count: int, processors: int) -> Config:
    """A configuration by rule: enough warps for every multiprocessor, as long as there are records for them.

    What is best for one row of activations was measured on an H100 (132 multiprocessors) with q4_k matrices of
    Qwen2.5-7B, by the ranking that is in `benchmarks/product_bench.py`: repeat 2, warps 4, split 4 for 4608 x 3584 and
    3584 x 3584, split 8 for 3584 x 18944; repeat 4, warps 2, split 4 for the gates, 37888 x 3584. The rule gives these.
    Its split of q6_k's 3584 x 18944 is 0.2 µs from the best. For other sizes and schemes, for several rows and other
    devices it is reasoned.
    """
    if part.layout is None:
        return Config(repeat=8 if part.rows >= 8 * 2 * processors else 4, warps=4)
    many = part.rows >= 128 * processors and count == 1 and part.layout.bits == 4  # more bits need more registers
    repeat = 4 if many else 2 if count <= 2 else 1
    warps = min(2 if many else 4, triton.next_power_of_2(part.records))
    tiles = -(-part.rows // (32 * repeat))
    split = min(-(-_WARPS * processors // (tiles * warps)), -(-part.records // warps), _MOST_PIECES)
    return Config(repeat, warps, split)


def gemv(
    x: Tensor,
    part: PackedPart,
    out: Tensor,
    scratch: Scratch,
    config: Config,
    *,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    norm: Tensor | None = None,
    eps: float = 0.0,
    gate: str | None = None,
) -> Tensor:
    """``out = rms_norm(x, norm, eps) @ partᵀ + bias + residual``, each weight read once.

    Args:
        x: ``[T, columns]`` of any float type, T at most `MOST_ROWS`; rows may have gaps between them.
        out: ``[T, rows]``, float32, bfloat16 or float16; as `residual`, which may be the same memory.
        bias: ``[rows]``.
        norm: weights ``[columns]`` of RMSNorm (arXiv 1910.07467); without them x is taken as it is.
        gate: an activation of `gated`, with which the first half of the results gates the second: `out` is
            ``[T, rows / 2]``, and the configuration repeats an even number of rows.

    Shapes are not checked here but in `matmul`.
    """
    count, rows = x.shape[0], part.rows
    m = triton.next_power_of_2(count)
    flags: dict[str, int] = {"NORM": norm is not None, "BIAS": bias is not None, "RESIDUAL": residual is not None}
    flags["GATE"] = -1 if gate is None else KINDS[gate]
    bias, norm = x if bias is None else bias, x if norm is None else norm
    residual = out if residual is None else residual
    strides = x.stride(0), residual.stride(0), out.stride(0)
    layout = part.layout
    if layout is None:
        width = min(256 * config.warps, triton.next_power_of_2(part.columns))
        float_kernel[(triton.cdiv(rows, config.repeat),)](
            x, norm, part.data, bias, residual, out, count, rows, part.columns, *strides, eps,
            M=m, REPEAT=config.repeat, WIDTH=width, WARPS=config.warps, num_warps=config.warps, **flags,
        )  # fmt: skip
        return out
    tiles = triton.cdiv(rows, 32 * config.repeat)
    split = config.split
    if split * count * rows > scratch.partial.numel() or tiles > scratch.arrived.numel():
        split = 1
    factors = part.data if part.factors is None else part.factors
    blocks_kernel[(tiles, split)](
        x, norm, part.data, factors, bias, residual, out, scratch.partial, scratch.arrived,
        count, rows, part.columns, part.records, *strides, eps, ONE,
        SCALES=layout.scales, BITS=layout.bits, CHUNKS=layout.chunks,
        M=m, REPEAT=config.repeat, WARPS=config.warps, SPLIT=split > 1,
        EVEN=part.columns % RECORD == 0, num_warps=config.warps, num_stages=1, **flags,
    )  # fmt: skip
    return out
