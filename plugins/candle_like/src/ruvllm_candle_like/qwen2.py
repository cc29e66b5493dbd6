"""Qwen 2 and 2.5 (arXiv 2407.10671, 2412.15115): Llama with biases on query, key and value."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from ruvllm_core.errors import ModelError
from ruvllm_core.model.config_fields import Fields, gguf_common, hf_common
from ruvllm_core.model.spec import ModelSpec, TensorSource, llama_tensor_names
from ruvllm_core.protocols import TensorLookup


class Qwen2:
    name = "qwen2"
    hf_names = ("Qwen2ForCausalLM",)
    gguf_names = ("qwen2",)

    def spec_from_hf(self, config: Mapping[str, Any]) -> ModelSpec:
        spec = ModelSpec(architecture=self.name, **hf_common(config), qkv_bias=True)
        layers = _sliding_layers(config, spec.num_layers)
        if not any(layers):
            return spec
        return replace(spec, sliding_window=Fields(config).integer("sliding_window", 4096), sliding_layers=layers)

    def spec_from_gguf(self, metadata: Mapping[str, Any], tensor: TensorLookup) -> ModelSpec:
        return ModelSpec(architecture=self.name, **gguf_common(metadata, tensor), qkv_bias=True)

    def tensor_names(self, spec: ModelSpec) -> Mapping[str, TensorSource]:
        return llama_tensor_names(spec)


def _sliding_layers(config: Mapping[str, Any], num_layers: int) -> tuple[bool, ...]:
    """Which layers have a window: as ``layer_types`` says, or all from ``max_window_layers`` on."""
    fields = Fields(config)
    if not fields.flag("use_sliding_window", False):
        return ()
    types = fields.raw("layer_types")
    if types is None:
        first = fields.integer("max_window_layers", 28)
        return tuple(layer >= first for layer in range(num_layers))
    known = {"sliding_attention": True, "full_attention": False}
    if not isinstance(types, list) or any(kind not in tuple(known) for kind in types):
        raise ModelError(f"layer_types should list {' or '.join(known)} for each layer, found {types!r}")
    return tuple(known[kind] for kind in types)


QWEN2 = Qwen2()
