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


_COMMANDS = {
    "run": "answer a prompt, or a file of prompts",
    "chat": "talk with a model",
    "pull": "download a model",
    "list": "models that are here",
    "rm": "delete a downloaded model",
    "plugins": "what is installed, and whether it works",
    "doctor": "this machine, and what would be selected on it",
    "bench": "measure speed and memory",
    "perplexity": "how well a model predicts a text",
    "tokenize": "a text as token ids",
    "completion": "a shell's completion script",
}


@hookimpl
def commands() -> list[Offer]:
    return [Offer(name, f"ruvllm_core.cli.{name}_command:command", summary) for name, summary in _COMMANDS.items()]
