"""The Mistral family through the suite of core."""

from __future__ import annotations

from ruvllm_core.testing import ArchitectureSuite
from ruvllm_mistral.mistral import MISTRAL

CONFIG = {
    "architectures": ["MistralForCausalLM"],
    "vocab_size": 96,
    "hidden_size": 48,
    "intermediate_size": 72,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
}


class TestMistral(ArchitectureSuite):
    architecture = MISTRAL
    hf_configs = ({**CONFIG, "sliding_window": None, "head_dim": 24}, {**CONFIG, "sliding_window": 4})
    gguf_metadata = (
        {
            "general.architecture": "mistral3",
            "mistral3.block_count": 2,
            "mistral3.context_length": 64,
            "mistral3.embedding_length": 48,
            "mistral3.feed_forward_length": 72,
            "mistral3.attention.head_count": 6,
            "mistral3.attention.head_count_kv": 2,
            "mistral3.attention.key_length": 24,
            "mistral3.attention.value_length": 24,
            "mistral3.attention.layer_norm_rms_epsilon": 1e-5,
        },
    )
