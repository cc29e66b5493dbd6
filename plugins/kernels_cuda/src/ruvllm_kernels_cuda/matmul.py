"""Products with packed matrices: which kernel computes which."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ruvllm_core.errors import ConfigError
from ruvllm_kernels_cuda.dequant import dequantize_rows
from ruvllm_kernels_cuda.gated import gated
from ruvllm_kernels_cuda.gemm import gemm, tile_config_for
from ruvllm_kernels_cuda.gemv import MOST_ROWS, Config, config_for, gemv
from ruvllm_kernels_cuda.packing import PackedMatrix, PackedPart
from ruvllm_kernels_cuda.scratch import Scratch


@dataclass(frozen=True)
class Thresholds:
    """Up to how many activation rows each way is taken, and how the first is cut up.

    Attributes:
        vector: ordinary cores, for packed weights; at most `MOST_ROWS`.
        vector_floats: the same for float matrices, then cuBLAS.
        tiles: tensor cores over packed weights; then a matrix is unpacked and left to cuBLAS.
        configure: of `vector`, for a part, its activation rows and the multiprocessors there are.
    """

    vector: int = 2
    vector_floats: int = MOST_ROWS
    tiles: int = 256
    configure: Callable[[PackedPart, int, int], Config] = config_for


def matmul(
    x: Tensor,
    packed: PackedMatrix,
    scratch: Scratch,
    *,
    out: Tensor | None = None,
    dtype: torch.dtype | None = None,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    norm: Tensor | None = None,
    eps: float = 0.0,
    gate: str | None = None,
    thresholds: Thresholds | None = None,
) -> Tensor:
    """``rms_norm(x, norm, eps) @ packedᵀ + bias + residual``, added up in float32, and gated if that is wanted.

    Nothing here waits for the device or reads from it, so it can be captured in a graph. Apart from `out`, memory is
    allocated only where `x` has to become bfloat16 and, for large products, where the result does not fit `out`.

    Args:
        x: ``[T, columns]`` float32, bfloat16 or float16. More than a few rows are rounded to bfloat16.
        out: ``[T, rows]``, may be the same memory as `residual`; a new tensor of `dtype`, x's by default, if not given.
        bias: ``[rows]``.
        residual: ``[T, rows]``.
        norm: weights ``[columns]`` of RMSNorm (arXiv 1910.07467), computed in the same launch for a few rows.
        gate: an activation of `gated`, with which the first half of the results gates the second, in the same launch
            for a few rows: `out` is ``[T, rows / 2]``, and there is no residual.

    Raises `ConfigError` for shapes that do not fit together or tensors on another device.
    """
    limits = thresholds or Thresholds()
    if out is None:
        width = packed.rows if gate is None else packed.rows // 2
        out = torch.empty((x.shape[0], width), dtype=dtype or x.dtype, device=x.device)
    _check(x, packed, out, bias, residual, norm, gate)
    count = x.shape[0]
    if not count:
        return out
    if gate is not None and not _gates(packed, count, scratch, limits):
        wide = torch.float32 if count <= MOST_ROWS else torch.bfloat16
        both = matmul(x, packed, scratch, dtype=wide, bias=bias, norm=norm, eps=eps, thresholds=thresholds)
        return gated(both, gate, out)
    if x.stride(1) != 1:
        x = x.contiguous()
    vector = [limits.vector_floats if part.layout is None else limits.vector for part in packed.parts]
    if norm is not None and count > min(MOST_ROWS, *vector):
        x = torch.nn.functional.rms_norm(x.float(), (packed.columns,), norm.float(), eps).to(torch.bfloat16)
        norm = None
    given = x
    for part, limit in zip(packed.parts, vector, strict=True):
        rows = slice(part.first, part.first + part.rows)
        target = out[:, rows] if gate is None else out
        more = {
            "bias": None if bias is None else bias[rows],
            "residual": None if residual is None else residual[:, rows],
        }
        if count <= min(limit, MOST_ROWS):
            config = limits.configure(part, count, scratch.processors)
            gemv(given, part, target, scratch, config, norm=norm, eps=eps, gate=gate, **more)
            continue
        x = x.to(torch.bfloat16)
        if count <= limits.tiles and part.layout is not None:
            gemm(x, part, target, scratch, tile_config_for(part, count, scratch.processors), **more)
        else:
            dense_matmul(x, part, target, scratch, **more)
    return out


def dense_matmul(
    x: Tensor, part: PackedPart, out: Tensor, scratch: Scratch, *, bias: Tensor | None, residual: Tensor | None
) -> Tensor:
    """The same by cuBLAS on unpacked weights, as many rows at a time as the scratch memory has room for.

    A product is rounded to bfloat16 before `bias` and `residual` are added in float32.
    """
    step = part.rows if part.scheme == "bf16" else scratch.dense.numel() // part.columns
    if not step:
        raise ConfigError(f"scratch memory of {scratch.dense.numel()} values has no room for {part.columns} columns")
    for start in range(0, part.rows, step):
        here = slice(start, min(start + step, part.rows))
        if part.scheme == "bf16":
            weights = part.data
        else:
            weights = dequantize_rows(part, scratch.dense, start, here.stop - start)
        if out.dtype == x.dtype and residual is None and bias is None:
            torch.mm(x, weights.T, out=out[:, here])
            continue
        total = torch.mm(x, weights.T)
        if bias is not None or residual is not None:
            total = total.float()
        if bias is not None:
            total += bias[here]
        if residual is not None:
            total += residual[:, here]
        out[:, here] = total
    return out


def _gates(packed: PackedMatrix, count: int, scratch: Scratch, limits: Thresholds) -> bool:
    """Whether the kernel that multiplies can gate, which needs both halves of the rows in one part."""
    part = packed.parts[0]
    most = min(limits.vector_floats if part.layout is None else limits.vector, MOST_ROWS)
    few = len(packed.parts) == 1 and count <= most
    return few and limits.configure(part, count, scratch.processors).repeat % 2 == 0


def _check(
    x: Tensor, packed: PackedMatrix, out: Tensor, bias: Tensor | None, residual: Tensor | None, norm: Tensor | None,
    gate: str | None,
) -> None:  # fmt: skip
    count, width = x.shape[0], packed.rows if gate is None else packed.rows // 2
    if gate is not None and (residual is not None or packed.rows % 2):
        raise ConfigError(f"gates of {packed.rows} rows need an even number of them, and no residual")
    wanted = (
        ("x", x, (count, packed.columns)),
        ("out", out, (count, width)),
        ("bias", bias, (packed.rows,)),
        ("residual", residual, (count, packed.rows)),
        ("norm", norm, (packed.columns,)),
    )
    for name, tensor, shape in wanted:
        if tensor is None:
            continue
        if tuple(tensor.shape) != shape:
            raise ConfigError(f"{name} must be {list(shape)}, got {list(tensor.shape)}")
        if tensor.device != packed.device:
            raise ConfigError(f"{name} is on {tensor.device}, the matrix on {packed.device}")
        if name != "x" and tensor.stride(-1) != 1:
            raise ConfigError(f"{name} must not have gaps between its columns", hint="pass a contiguous tensor")
