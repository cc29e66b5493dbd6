"""What this plugin registers: the kernels named ``cpu``."""

from __future__ import annotations

from ruvllm_core.hookspecs import Offer, hookimpl
from ruvllm_kernels_cpu.settings import CpuSettings

RUVLLM_API_VERSION = 1
Settings = CpuSettings
ENVIRONMENT = {"RUVLLM_CPU_ISA": "isa"}


def probe() -> str | None:
    """Why the kernels cannot run here, or None."""
    from ruvllm_kernels_cpu.library import missing

    return missing()


@hookimpl
def kernels() -> list[Offer]:
    about = "a whole step in C++ on the CPU, over packed quantized weights"
    # Before PyTorch, which has 0: on a machine with a GPU, `auto` looks for kernels that run there.
    return [Offer("cpu", "ruvllm_kernels_cpu.provider:CpuKernels", about, probe, priority=10, devices=("cpu",))]
