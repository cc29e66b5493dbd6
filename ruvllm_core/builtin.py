"""What core itself registers, through the same hooks as everybody else."""

from __future__ import annotations

from ruvllm_core.hookspecs import API_VERSION, Offer, hookimpl

RUVLLM_API_VERSION = API_VERSION


@hookimpl
def kernels() -> list[Offer]:
    return [Offer("torch", "ruvllm_core.decode.reference:TorchKernels", "PyTorch operations: CPU, CUDA or Metal")]


@hookimpl
def cache_policies() -> list[Offer]:
    return [Offer("contiguous", "ruvllm_core.decode.contiguous:ContiguousCache", "one block a sequence")]
