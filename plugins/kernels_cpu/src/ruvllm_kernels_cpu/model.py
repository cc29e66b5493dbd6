"""A model's spec and weights as the C structure."""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np

from ruvllm_core.errors import ModelError
from ruvllm_core.model.quant import SCHEMES, QuantTensor
from ruvllm_core.model.spec import ModelSpec, llama_tensor_names
from ruvllm_core.protocols import Weights
from ruvllm_kernels_cpu import abi
from ruvllm_kernels_cpu.mapping import mapping_under


def describe(spec: ModelSpec, weights: Weights, activation_bits: int) -> tuple[abi.Model, list[Any]]:
    """The structure, and the objects whose memory it points to.

    Raises `ModelError` for a weight that is missing, has another shape, or that the spec does not know of.
    """
    owners: list[Any] = []
    shapes = {name: source.shape for name, source in llama_tensor_names(spec).items()}

    for name in weights:  # it would be left out
        if name.endswith(".bias") and name not in shapes:
            raise ModelError(f"weight {name} is there, but the model's description has no such bias")

    def tensor(name: str) -> QuantTensor:
        if name not in weights:
            raise ModelError(f"weight {name} is missing")
        if weights[name].shape != shapes[name]:
            raise ModelError(f"weight {name} has shape {weights[name].shape}, the model needs {shapes[name]}")
        return weights[name]

    def vector(name: str) -> int:
        values = np.ascontiguousarray(tensor(name).dequantize(), dtype=np.float32)
        owners.append(values)
        return int(values.ctypes.data)

    def matrix(name: str) -> abi.Matrix:
        found, bias = tensor(name), f"{name}.bias"
        data = np.ascontiguousarray(found.data)
        owners.append(data)
        return abi.Matrix(
            data=data.ctypes.data,
            bias=vector(bias) if bias in shapes else None,
            rows=found.num_rows,
            cols=found.columns,
            row_bytes=data.shape[1],
            scheme=SCHEMES[found.scheme].ggml_type,
            mapped=mapping_under(data) is not None,
        )

    layers = (abi.Layer * spec.num_layers)()
    for n, layer in enumerate(layers):
        prefix = f"layers.{n}."
        layer.attn_norm, layer.mlp_norm = vector(f"{prefix}attn_norm"), vector(f"{prefix}mlp_norm")
        layer.window = spec.window_of(n) or 0
        for index, site in enumerate(abi.SITES):
            layer.sites[index] = matrix(prefix + site)
    embed = matrix("embed")
    owners.append(layers)
    model = abi.Model(
        vocab=spec.vocab_size,
        hidden=spec.hidden_size,
        inner=spec.intermediate_size,
        layers=spec.num_layers,
        heads=spec.num_heads,
        kv_heads=spec.num_kv_heads,
        head_dim=spec.head_dim,
        rope_dim=spec.rope_dim,
        rope_interleaved=spec.rope_interleaved,
        activation=abi.ACTIVATIONS.index(spec.activation),
        eps=spec.norm_eps,
        scale=spec.scale,
        attention_softcap=spec.attention_softcap or 0.0,
        logit_softcap=spec.logit_softcap or 0.0,
        activation_bits=activation_bits,
        # Which of two tables turned a key is not known where it is stored; no model with both has a key bias.
        center_keys=spec.qkv_bias and spec.rope_scaling.kind != "longrope",
        embed=embed,
        head=embed if spec.tied_embeddings else matrix("lm_head"),
        final_norm=vector("final_norm"),
        layer=ctypes.cast(layers, ctypes.POINTER(abi.Layer)),
    )
    return model, owners
