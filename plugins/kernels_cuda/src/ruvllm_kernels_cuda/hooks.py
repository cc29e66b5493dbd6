"""What this plugin registers: the kernels named ``cuda``."""

from __future__ import annotations

from ruvllm_core.hookspecs import Offer, hookimpl
from ruvllm_kernels_cuda.settings import CudaSettings

RUVLLM_API_VERSION = 1
Settings = CudaSettings


def probe() -> str | None:
    """Why the kernels cannot run here, or None."""
    from ruvllm_kernels_cuda.probe import missing

    return missing()


@hookimpl
def kernels() -> list[Offer]:
    about = "whole steps over packed quantized weights on NVIDIA GPUs, in Triton"
    # After PyTorch, which has 0, until it has been tuned on a GPU: whoever wants it names it.
    return [Offer("cuda", "ruvllm_kernels_cuda.provider:CudaKernels", about, probe, priority=-10, devices=("cuda",))]
