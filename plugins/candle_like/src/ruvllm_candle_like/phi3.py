"""Phi-3, Phi-3.5-mini, Phi-4 and Phi-4-mini (arXiv 2404.14219, 2412.08905, 2503.01743).

Llama with query, key and value in one matrix, gate and up in another, and longrope. GGUF converters leave the order of
rows as it is. The window that GGUF files name is obeyed, as the models were trained; llama.cpp passes over it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from ruvllm_core.errors import ModelError
from ruvllm_core.model.config_fields import Fields, gguf_common, hf_common
from ruvllm_core.model.spec import ModelSpec, TensorSource, llama_tensor_names
from ruvllm_core.protocols import TensorLookup


class Phi3:
    name = "phi3"
    hf_names = ("Phi3ForCausalLM",)
    gguf_names = ("phi3",)

    def spec_from_hf(self, config: Mapping[str, Any]) -> ModelSpec:
        common = hf_common(config)
        if (kind := common["rope_scaling"].kind) not in ("none", "longrope"):
            raise ModelError(f"rope scaling {kind!r} is none that Phi-3 models have", hint="they have longrope or none")
        window = Fields(config).integer("sliding_window", 0)
        return ModelSpec(architecture=self.name, **common, sliding_window=window or None)

    def spec_from_gguf(self, metadata: Mapping[str, Any], tensor: TensorLookup) -> ModelSpec:
        return ModelSpec(architecture=self.name, **gguf_common(metadata, tensor))

    def tensor_names(self, spec: ModelSpec) -> Mapping[str, TensorSource]:
        names = llama_tensor_names(spec)
        q, kv, inner = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim, spec.intermediate_size
        fused = {
            "attn.q": ("self_attn.qkv_proj", "attn_qkv", (0, q)),
            "attn.k": ("self_attn.qkv_proj", "attn_qkv", (q, q + kv)),
            "attn.v": ("self_attn.qkv_proj", "attn_qkv", (q + kv, q + 2 * kv)),
            "mlp.gate": ("mlp.gate_up_proj", "ffn_up", (0, inner)),
            "mlp.up": ("mlp.gate_up_proj", "ffn_up", (inner, 2 * inner)),
        }
        for n in range(spec.num_layers):
            for site, (hf, gguf, rows) in fused.items():
                name = f"layers.{n}.{site}"
                names[name] = replace(
                    names[name],
                    hf=f"model.layers.{n}.{hf}.weight",
                    gguf=f"blk.{n}.{gguf}.weight",
                    hf_rows=rows,
                    gguf_rows=rows,
                )
        return names


PHI3 = Phi3()
