"""Settings of this plugin, ``[plugins.kernels_cpu]``."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict

Isa = Literal["auto", "generic", "avx2", "avx512", "neon"]


class CpuSettings(BaseModel):
    """What can be set.

    Attributes:
        isa: the instruction set to use and no other; ``auto`` is the best that this processor has. The environment
            variable ``RUVLLM_CPU_ISA`` sets it too. ``neon`` comes with another package, as kernels ``neon``.
    """

    model_config = ConfigDict(extra="forbid")

    isa: Isa = "auto"
