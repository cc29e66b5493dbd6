"""What this plugin registers: the Mistral family, and the backend ``mistral``."""

from __future__ import annotations

from ruvllm_core.hookspecs import Offer, hookimpl
from ruvllm_mistral.settings import MistralSettings

RUVLLM_API_VERSION = 1
Settings = MistralSettings


@hookimpl
def architectures() -> list[Offer]:
    return [Offer("mistral", "ruvllm_mistral.mistral:MISTRAL", "Mistral 7B, Nemo and Small")]


@hookimpl
def backends() -> list[Offer]:
    return [Offer("mistral", "ruvllm_mistral.backend:MistralBackend", "many streams, batched at every step")]
