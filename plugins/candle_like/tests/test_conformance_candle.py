"""The plugin's backend and families through the suites of core."""

from __future__ import annotations

from dataclasses import replace

from ruvllm_candle_like.backend import CandleBackend
from ruvllm_candle_like.llama import LLAMA
from ruvllm_candle_like.phi3 import PHI3
from ruvllm_candle_like.qwen2 import QWEN2
from ruvllm_candle_like.settings import CandleSettings
from ruvllm_core.protocols import Backend, BackendContext
from ruvllm_core.testing import ArchitectureSuite, BackendSuite

HF = {
    "vocab_size": 96,
    "hidden_size": 48,
    "intermediate_size": 72,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
}
LLAMA_CONFIG = {"architectures": ["LlamaForCausalLM"], **HF}
QWEN2_CONFIG = {"architectures": ["Qwen2ForCausalLM"], **HF}
PHI3_CONFIG = {"architectures": ["Phi3ForCausalLM"], **HF, "num_key_value_heads": 6}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
FACTORS = {"short_factor": [1.0, 1.1, 1.2, 1.3], "long_factor": [1.5, 2.5, 3.5, 4.5]}


def gguf(family: str) -> dict[str, object]:
    """What converters write for `HF`."""
    values = {
        "block_count": 2,
        "context_length": 64,
        "embedding_length": 48,
        "feed_forward_length": 72,
        "attention.head_count": 6,
        "attention.head_count_kv": 2,
        "attention.layer_norm_rms_epsilon": 1e-5,
    }
    return {"general.architecture": family, **{f"{family}.{name}": value for name, value in values.items()}}


class TestCandleBackend(BackendSuite):
    def make_backend(self, context: BackendContext) -> Backend:
        return CandleBackend(context)


class TestCandleBackendWithManySequences(BackendSuite):
    def make_backend(self, context: BackendContext) -> Backend:
        return CandleBackend(replace(context, options=CandleSettings(max_sequences=3)))


class TestLlama(ArchitectureSuite):
    architecture = LLAMA
    hf_configs = (
        LLAMA_CONFIG,
        {**LLAMA_CONFIG, "attention_bias": True, "mlp_bias": True, "head_dim": 10},
        {**LLAMA_CONFIG, "tie_word_embeddings": True, "rope_scaling": LLAMA3},
    )
    gguf_metadata = (
        gguf("llama"),
        {**gguf("llama"), "llama.attention.key_length": 10, "llama.attention.value_length": 10},
    )


class TestQwen2(ArchitectureSuite):
    architecture = QWEN2
    hf_configs = (
        {**QWEN2_CONFIG, "tie_word_embeddings": True},
        {**QWEN2_CONFIG, "use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1},
    )
    gguf_metadata = (gguf("qwen2"),)


class TestPhi3(ArchitectureSuite):
    architecture = PHI3
    hf_configs = (
        {**PHI3_CONFIG, "sliding_window": 5},
        {**PHI3_CONFIG, "rope_scaling": {"type": "longrope", **FACTORS}, "original_max_position_embeddings": 5},
    )
    gguf_metadata = ({**gguf("phi3"), "phi3.attention.head_count_kv": 6, "phi3.attention.sliding_window": 5},)
