"""Operations for the eager decoder; see `ruvllm_core.decode.ops.Ops` for what each computes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ruvllm_core.model.quant import QuantTensor
from ruvllm_kernels_cuda.embed import embed
from ruvllm_kernels_cuda.matmul import Thresholds, matmul
from ruvllm_kernels_cuda.packing import PackedMatrix, pack
from ruvllm_kernels_cuda.scratch import Scratch


class CudaOps:
    """Operations over tensors on one device.

    Args:
        device: where weights go.
        dtype: of embeddings; results of `linear` have the type of their input.
        scratch: working memory on that device.
        thresholds: which kernel computes which product.
    """

    def __init__(self, device: str, dtype: torch.dtype, scratch: Scratch, thresholds: Thresholds) -> None:
        self._device, self._dtype = torch.device(device), dtype
        self._scratch, self._thresholds = scratch, thresholds

    def table(self) -> Mapping[str, Callable[..., Any]]:
        """All of them by name."""
        return {name: getattr(self, name) for name in ("prepare", "linear", "embed")}

    def prepare(self, tensors: Sequence[QuantTensor]) -> PackedMatrix:
        return pack(tensors, self._device)

    def linear(self, x: Tensor, weight: PackedMatrix) -> Tensor:
        return matmul(x, weight, self._scratch, thresholds=self._thresholds)

    def embed(self, weight: PackedMatrix, tokens: Tensor) -> Tensor:
        out = torch.empty((len(tokens), weight.columns), dtype=self._dtype, device=self._device)
        return embed(weight, tokens, out)
