"""Mistral (arXiv 2310.06825): Llama with a sliding window.

GGUF converters call most Mistral models ``llama``; ``mistral3`` is the text part of Mistral Small 3.1 and later. Rows
of query and key are reordered in both, so that the pairs to be rotated lie side by side.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ruvllm_core.errors import ModelError
from ruvllm_core.model.config_fields import Fields, gguf_common, hf_common
from ruvllm_core.model.spec import ModelSpec, TensorSource, llama_tensor_names
from ruvllm_core.protocols import TensorLookup


class Mistral:
    name = "mistral"
    hf_names = ("MistralForCausalLM",)
    gguf_names = ("mistral3",)

    def spec_from_hf(self, config: Mapping[str, Any]) -> ModelSpec:
        window = Fields(config).integer("sliding_window", 0)
        return ModelSpec(architecture=self.name, **hf_common(config), sliding_window=window or None)

    def spec_from_gguf(self, metadata: Mapping[str, Any], tensor: TensorLookup) -> ModelSpec:
        common = gguf_common(metadata, tensor)
        if common["rope_scaling"].kind != "none":
            raise ModelError("mistral3 with rope scaling (the Ministral 3 models) is not supported")
        return ModelSpec(architecture=self.name, **common, rope_interleaved=True)

    def tensor_names(self, spec: ModelSpec) -> Mapping[str, TensorSource]:
        return llama_tensor_names(spec)


MISTRAL = Mistral()
