"""What this plugin registers: the kernels named ``cpu``."""

from __future__ import annotations

from ruvllm_core.hookspecs import Offer, hookimpl

RUVLLM_API_VERSION = 1


def probe() -> str | None:
    """Why the kernels cannot run here, or None."""
    from ruvllm_kernels_cpu.library import missing

    return missing()


@hookimpl
def kernels() -> list[Offer]:
    about = "a whole step in C++ on the CPU, straight from quantized weights"
    # Below PyTorch: chosen by name, until it has met the speed of its peers.
    return [Offer("cpu", "ruvllm_kernels_cpu.provider:CpuKernels", about, probe, priority=-10)]
