"""`FrozenLinear`: a product with weights that are never trained."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ruvllm_core.model.quant import QuantTensor


class FrozenLinear:
    """``x Wᵀ + bias``, float32 in and out, multiplied in `dtype`.

    Args:
        tensors: matrices of equal width, stacked by rows.
        biases: one for each, or none.
        resident: decode once and keep; else decode at every use, also on the way back.
    """

    def __init__(
        self,
        tensors: Sequence[QuantTensor],
        biases: Sequence[Tensor],
        device: torch.device,
        dtype: torch.dtype,
        resident: bool,
    ) -> None:
        self._tensors, self._device, self._dtype = tensors, device, dtype
        self._bias = torch.cat(list(biases)) if biases else None
        self.weight: Tensor | None = self._decode() if resident else None

    @property
    def exact(self) -> bool:
        """Whether the weight that is kept is what the file says, to the last bit."""
        return self._dtype == torch.float32

    def __call__(self, x: Tensor) -> Tensor:
        if self.weight is not None:
            y = F.linear(x.to(self._dtype), self.weight).float()
        else:
            y = _Decoded.apply(x, self)
        return y if self._bias is None else y + self._bias

    def _decode(self) -> Tensor:
        values = np.concatenate([tensor.dequantize() for tensor in self._tensors])
        return torch.from_numpy(values).to(self._device, self._dtype)


class _Decoded(torch.autograd.Function):
    """A product whose weights exist only while they are used."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: FrozenLinear) -> Tensor:
        ctx.layer = layer
        return F.linear(x.to(layer._dtype), layer._decode()).float()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (grad,) = grads
        layer: FrozenLinear = ctx.layer
        return (grad.to(layer._dtype) @ layer._decode()).float(), None
