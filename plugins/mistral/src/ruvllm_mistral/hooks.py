"""What this plugin registers: the Mistral family."""

from __future__ import annotations

from ruvllm_core.hookspecs import Offer, hookimpl

RUVLLM_API_VERSION = 1


@hookimpl
def architectures() -> list[Offer]:
    return [Offer("mistral", "ruvllm_mistral.mistral:MISTRAL", "Mistral 7B, Nemo and Small")]
