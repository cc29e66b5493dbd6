"""What changes from step to step, on its way to the device in one copy."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Array = npt.NDArray[Any]
_ALIGNED = 16  # bytes
_TORCH = {"int32": torch.int32, "int64": torch.int64, "float32": torch.float32, "float64": torch.float64}


class Packet:
    """Arrays in pinned host memory and the same on the device; `send` copies all of them at once.

    Attributes:
        host: NumPy views to be written before `send`.
        device: tensors of the same names, shapes and types, at the same addresses as long as this object lives.

    Args:
        fields: type (``int32``, ``int64``, ``float32`` or ``float64``) and shape of each.
    """

    def __init__(self, fields: Mapping[str, tuple[str, tuple[int, ...]]], device: torch.device) -> None:
        places, total = {}, 0
        for name, (dtype, shape) in fields.items():
            count = int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize
            places[name] = total, count
            total += -(-count // _ALIGNED) * _ALIGNED
        self._event = torch.cuda.Event() if device.type == "cuda" else None
        self._from = torch.zeros(total, dtype=torch.uint8, pin_memory=self._event is not None)
        self._to = torch.zeros(total, dtype=torch.uint8, device=device)
        self.host: dict[str, Array] = {}
        self.device: dict[str, Tensor] = {}
        for name, (dtype, shape) in fields.items():
            start, count = places[name]
            self.host[name] = self._from[start : start + count].numpy().view(dtype).reshape(shape)
            self.device[name] = self._to[start : start + count].view(_TORCH[dtype]).view(shape)

    def ready(self) -> None:
        """Wait until what was last sent has been read, so that the host's arrays may be written."""
        if self._event is not None:
            self._event.synchronize()

    def send(self) -> None:
        self._to.copy_(self._from, non_blocking=True)
        if self._event is not None:
            self._event.record()
