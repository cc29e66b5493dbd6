"""What this plugin registers: the kernels named ``neon``."""

from __future__ import annotations

from ruvllm_core.hookspecs import Offer, hookimpl
from ruvllm_kernels_cpu.settings import CpuSettings

RUVLLM_API_VERSION = 1
Settings = CpuSettings
ENVIRONMENT = {"RUVLLM_CPU_ISA": "isa"}


def probe() -> str | None:
    """Why the kernels cannot run here, or None."""
    from ruvllm_kernels_neon.library import missing

    return missing()


@hookimpl
def kernels() -> list[Offer]:
    about = "a whole step in C++ with the vector instructions of ARM64 processors"
    # Just before the kernels named cpu, whose portable code would run instead.
    return [Offer("neon", "ruvllm_kernels_neon.provider:NeonKernels", about, probe, priority=11, devices=("cpu",))]
