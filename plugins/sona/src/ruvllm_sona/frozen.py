"""`FrozenLinear`: a product with weights that are never trained."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ruvllm_core.model.quant import QuantTensor

_PIECE = 1 << 20  # values that are decoded at a time: a few milliseconds


class FrozenLinear:
    """``x Wᵀ + bias``, float32 in and out, multiplied in `dtype`.

    Args:
        tensors: matrices of equal width, stacked by rows.
        biases: one for each, or none.
        resident: to be decoded once and kept, by `load`; else decoded at every use, also on the way back.
    """

    def __init__(
        self,
        tensors: Sequence[QuantTensor],
        biases: Sequence[Tensor],
        device: torch.device,
        dtype: torch.dtype,
        resident: bool,
    ) -> None:
        self._tensors, self._device, self._dtype, self._resident = tensors, device, dtype, resident
        self._bias = torch.cat(list(biases)) if biases else None
        self.weight: Tensor | None = None

    @property
    def exact(self) -> bool:
        """Whether the weight that is kept is what the file says, to the last bit."""
        return self.weight is not None and self._dtype == torch.float32

    def load(self) -> Iterator[None]:
        """Decode what is to be kept, a piece at a time."""
        if self._resident and self.weight is None:
            weight = torch.empty(self._shape, device=self._device, dtype=self._dtype)
            for at, rows in self._pieces():
                weight[at : at + len(rows)] = rows
                yield
            self.weight = weight

    def __call__(self, x: Tensor) -> Tensor:
        if self.weight is not None:
            y = F.linear(x.to(self._dtype), self.weight).float()
        else:
            y = _Decoded.apply(x, self)  # type: ignore[no-untyped-call]
        return y if self._bias is None else y + self._bias

    @property
    def _shape(self) -> tuple[int, int]:
        return sum(tensor.num_rows for tensor in self._tensors), self._tensors[0].columns

    def _pieces(self) -> Iterator[tuple[int, Tensor]]:
        at = 0
        for tensor in self._tensors:
            step = max(1, _PIECE // tensor.columns)
            for row in range(0, tensor.num_rows, step):
                rows = tensor.rows(row, min(row + step, tensor.num_rows)).dequantize()
                yield at, torch.from_numpy(rows).to(self._device, self._dtype)
                at += len(rows)

    def decode(self) -> Tensor:
        """The whole weight, for one use."""
        return torch.cat([rows for _, rows in self._pieces()])


class _Decoded(torch.autograd.Function):
    """A product whose weights exist only while they are used."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: FrozenLinear) -> Tensor:
        ctx.layer = layer
        return F.linear(x.to(layer._dtype), layer.decode()).float()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (grad,) = grads
        layer: FrozenLinear = ctx.layer
        return (grad.to(layer._dtype) @ layer.decode()).float(), None
