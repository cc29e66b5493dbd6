"""Settings of this plugin, ``[plugins.kernels_cpu]``."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict

Isa = Literal["auto", "generic", "avx2", "avx512", "neon", "neon-dotprod", "neon-i8mm"]


class CpuSettings(BaseModel):
    """What can be set.

    Attributes:
        isa: the instruction set to use and no other; ``auto`` is the best that this processor has. The environment
            variable ``RUVLLM_CPU_ISA`` sets it too. ``neon`` and its like are another package's, kernels ``neon``.
        activation_bits: to how many bits activations are rounded for products with quantized weights.
        decoder: execute whole steps; false has core's eager decoder call the operations one by one, in float32.
    """

    model_config = ConfigDict(extra="forbid")

    isa: Isa = "auto"
    activation_bits: Literal[8, 16] = 16
    decoder: bool = True
