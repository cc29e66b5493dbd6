"""Memory that products need while they run."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Scratch:
    """Working memory for one stream; of fixed size, so that captured graphs can go on using it.

    Attributes:
        partial: float32, sums of products whose columns are cut into pieces.
        arrived: int32, zero between launches: how many pieces of each tile are there.
        dense: bfloat16, rows of a matrix that was unpacked.
        processors: multiprocessors of the device, which launches are cut up for.
    """

    partial: Tensor
    arrived: Tensor
    dense: Tensor
    processors: int

    @classmethod
    def on(
        cls, device: torch.device | str, partial: int = 1 << 22, arrived: int = 1 << 14, dense: int = 1 << 27
    ) -> Scratch:
        """Scratch memory of so many elements each; by default 16 MiB, 64 KiB and 256 MiB."""
        device = torch.device(device)
        processors = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
        return cls(
            torch.empty(partial, dtype=torch.float32, device=device),
            torch.zeros(arrived, dtype=torch.int32, device=device),
            torch.empty(dense, dtype=torch.bfloat16, device=device),
            processors,
        )
