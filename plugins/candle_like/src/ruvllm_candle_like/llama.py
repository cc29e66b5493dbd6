"""Llama 2 and 3 (arXiv 2302.13971, 2307.09288, 2407.21783), and what has the same shape.

GGUF converters call Mistral models ``llama`` as well, and reorder the rows of query and key so that the pairs to be
rotated lie side by side.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ruvllm_core.model.config_fields import Fields, gguf_common, hf_common
from ruvllm_core.model.spec import ModelSpec, TensorSource, llama_tensor_names
from ruvllm_core.protocols import TensorLookup


class Llama:
    name = "llama"
    hf_names = ("LlamaForCausalLM", "LLaMAForCausalLM")
    gguf_names = ("llama",)

    def spec_from_hf(self, config: Mapping[str, Any]) -> ModelSpec:
        attention_bias = Fields(config).flag("attention_bias", False)
        return ModelSpec(
            architecture=self.name,
            **hf_common(config),
            qkv_bias=attention_bias,
            attention_out_bias=attention_bias,
            mlp_bias=Fields(config).flag("mlp_bias", False),
        )

    def spec_from_gguf(self, metadata: Mapping[str, Any], tensor: TensorLookup) -> ModelSpec:
        return ModelSpec(
            architecture=self.name,
            **gguf_common(metadata, tensor),
            rope_interleaved=True,
            qkv_bias=tensor("blk.0.attn_q.bias") is not None,
            attention_out_bias=tensor("blk.0.attn_output.bias") is not None,
            mlp_bias=tensor("blk.0.ffn_gate.bias") is not None,
        )

    def tensor_names(self, spec: ModelSpec) -> Mapping[str, TensorSource]:
        return llama_tensor_names(spec)


LLAMA = Llama()
