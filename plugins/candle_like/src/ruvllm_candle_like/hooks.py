"""What this plugin registers: three model families and the backend ``candle``."""

from __future__ import annotations

from ruvllm_candle_like.settings import CandleSettings
from ruvllm_core.hookspecs import Offer, hookimpl

RUVLLM_API_VERSION = 1
Settings = CandleSettings


@hookimpl
def architectures() -> list[Offer]:
    return [
        Offer("llama", "ruvllm_candle_like.llama:LLAMA", "Llama 2 and 3, SmolLM2; Mistral as GGUF"),
        Offer("qwen2", "ruvllm_candle_like.qwen2:QWEN2", "Qwen 2 and 2.5"),
        Offer("phi3", "ruvllm_candle_like.phi3:PHI3", "Phi-3, Phi-3.5-mini, Phi-4 and Phi-4-mini"),
    ]


@hookimpl
def backends() -> list[Offer]:
    return [Offer("candle", "ruvllm_candle_like.backend:CandleBackend", "one stream at a time, lowest latency")]
