"""The kernel provider named ``neon``."""

from __future__ import annotations

from typing import Any

import ruvllm_kernels_cpu.library as cpu
from ruvllm_core.protocols import DecoderOptions
from ruvllm_kernels_cpu.provider import CpuKernels
from ruvllm_kernels_cpu.settings import CpuSettings
from ruvllm_kernels_neon import library


class NeonKernels(CpuKernels):
    """`CpuKernels` with the micro-kernels of ARM64 processors.

    Args:
        options: see `CpuKernels`.
        isa: goes before the setting ``isa``: ``auto``, or one of ``neon``, ``neon-dotprod`` and ``neon-i8mm``.
        more: the other arguments of `CpuKernels`.

    Raises `PluginError` on other processors, else what `CpuKernels` does.
    """

    def __init__(self, options: DecoderOptions, isa: str | None = None, **more: Any) -> None:
        settings: CpuSettings = options.plugin or CpuSettings()
        table = library.kernels(isa or settings.isa)
        super().__init__(options, isa="generic", **more)
        self._table = table
        self.isa = cpu.name(table)
