"""A Hugging Face folder (config, tokenizer, safetensors) as a `Source` for a GGUF file.

The family's plugin reads the configuration and knows both names of every tensor; this module adds the metadata keys,
and puts query and key rows of Llama-like models into the order in which GGUF readers rotate them.
Source: the GGUF specification for the keys; llama.cpp for the meaning of row order and rope tensors.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ruvllm_core.decode.rope import inverse_frequencies
from ruvllm_core.errors import ModelError
from ruvllm_core.model.loader import open_model
from ruvllm_core.model.quant import QuantTensor
from ruvllm_core.model.safetensors import Safetensors, open_folder
from ruvllm_core.model.spec import ModelSpec, RopeScaling, TensorSource
from ruvllm_core.registry import Registry

from .source import Source, SourceTensor
from .vocabulary import tokenizer_metadata

# Our family → GGUF's ``general.architecture``; GGUF readers know Mistral as a Llama.
_ARCHITECTURES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "phi3": "phi3"}
_INTERLEAVED = {"llama"}  # whose readers rotate neighbouring rows, not halves


def hf_source(folder: Path, registry: Registry) -> Source:
    """A model folder as a source.

    Raises:
        ModelError: the folder cannot be opened, or its family has no place in GGUF; see also `open_model`.
        TokenizerError: see `tokenizer_metadata`.
    """
    model = open_model(folder, registry)
    spec = model.spec
    architecture = _ARCHITECTURES.get(spec.architecture)
    if architecture is None:
        raise ModelError(
            f"{folder}: models of the family {spec.architecture!r} cannot be written as GGUF yet",
            hint=f"known are {', '.join(_ARCHITECTURES)}",
        )
    stored = open_folder(folder)
    tensors: dict[str, SourceTensor] = {}
    for source in model.sources.values():
        if source.gguf not in tensors:
            tensors[source.gguf] = _tensor(source, stored, spec, architecture in _INTERLEAVED)
    for name, values in _rope_tensors(spec).items():
        tensor = QuantTensor.from_float(values)
        tensors[name] = SourceTensor(name, tensor.shape, "f32", lambda tensor=tensor: tensor)  # type: ignore[misc]
    metadata = {
        **_model_metadata(folder, spec, architecture),
        **tokenizer_metadata(folder, architecture, spec.vocab_size),
    }
    return Source(folder, metadata, tuple(tensors.values()))


def _tensor(source: TensorSource, stored: Safetensors, spec: ModelSpec, interleave: bool) -> SourceTensor:
    if source.hf_rows != source.gguf_rows:
        raise ModelError(f"the tensor '{source.hf}' is divided differently in GGUF, which cannot be converted yet")
    whole = stored[source.hf]
    part = source.gguf.split(".")[-2]
    heads = {"attn_q": spec.num_heads, "attn_k": spec.num_kv_heads}.get(part, 0) if interleave else 0

    def load() -> QuantTensor:
        return _interleave(whole, heads) if heads else whole

    return SourceTensor(source.gguf, whole.shape, whole.scheme, load)


def _interleave(tensor: QuantTensor, heads: int) -> QuantTensor:
    """Rows ``i`` and ``i + D/2`` of each head next to each other, as they are rotated together."""
    items = tensor.data.reshape(tensor.shape[0], -1)  # one item per row of the matrix, or per value of a bias
    halves = items.reshape(heads, 2, tensor.shape[0] // heads // 2, items.shape[1])
    return QuantTensor(tensor.scheme, tensor.shape, halves.swapaxes(1, 2).reshape(tensor.data.shape))


def _rope_tensors(spec: ModelSpec) -> dict[str, npt.NDArray[np.float32]]:
    scaling = spec.rope_scaling
    if scaling.kind == "llama3":
        plain, _ = inverse_frequencies(replace(spec, rope_scaling=RopeScaling()), 0)
        return {"rope_freqs.weight": plain / inverse_frequencies(spec, 0)[0]}
    if scaling.kind == "longrope":
        return {
            "rope_factors_long.weight": np.array(scaling.long_factors, dtype=np.float32),
            "rope_factors_short.weight": np.array(scaling.short_factors, dtype=np.float32),
        }
    return {}


def _model_metadata(folder: Path, spec: ModelSpec, architecture: str) -> dict[str, Any]:
    fields: dict[str, Any] = {
        "vocab_size": spec.vocab_size,
        "context_length": spec.max_context,
        "embedding_length": spec.hidden_size,
        "block_count": spec.num_layers,
        "feed_forward_length": spec.intermediate_size,
        "attention.head_count": spec.num_heads,
        "attention.head_count_kv": spec.num_kv_heads,
        "attention.layer_norm_rms_epsilon": spec.norm_eps,
        "attention.key_length": spec.head_dim,
        "attention.value_length": spec.head_dim,
        "rope.dimension_count": spec.rope_dim,
        "rope.freq_base": spec.rope_theta,
    }
    if spec.sliding_window is not None:
        fields["attention.sliding_window"] = spec.sliding_window
        if spec.sliding_layers:
            fields["attention.sliding_window_pattern"] = np.array(spec.sliding_layers)
    fields |= _rope_metadata(spec)
    return {
        "general.architecture": architecture,
        "general.type": "model",
        "general.name": folder.resolve().name,
        **{f"{architecture}.{name}": value for name, value in fields.items()},
    }


def _rope_metadata(spec: ModelSpec) -> dict[str, Any]:
    scaling = spec.rope_scaling
    if scaling.kind in ("none", "llama3"):  # the factors of llama3 are a tensor
        return {}
    fields: dict[str, Any] = {"type": scaling.kind}
    if scaling.kind != "longrope":  # whose factors say it all: readers would slow all frequencies by this one as well
        fields["factor"] = scaling.factor
    if scaling.kind != "linear":
        fields["original_context_length"] = scaling.original_context
    if scaling.kind == "yarn":
        fields |= {"yarn_beta_fast": scaling.beta_fast, "yarn_beta_slow": scaling.beta_slow}
        if scaling.attention_factor is not None:
            # GGUF's number multiplies that of yarn's own rule.
            fields["attn_factor"] = scaling.attention_factor / (0.1 * np.log(scaling.factor) + 1.0)
    if scaling.kind == "longrope":
        fields["attn_factor"] = inverse_frequencies(spec, 0)[1]
    return {f"rope.scaling.{name}": float(v) if isinstance(v, np.floating) else v for name, v in fields.items()}
