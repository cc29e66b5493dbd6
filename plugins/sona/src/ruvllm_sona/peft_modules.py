"""`Module`: what PEFT calls a module, and which sites of ours it is made of.

Two things differ. Some checkpoints keep several of our matrices in one (Phi-3's query, key and value), and models that
come from GGUF files have the rows of query and key in another order (see `ModelSpec.rope_interleaved`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ruvllm_core.errors import LearningError
from ruvllm_core.model.quant import QuantTensor
from ruvllm_core.model.spec import ModelSpec, TensorSource
from ruvllm_core.protocols import FloatArray, Weights

#: The output projection, which every family of transformers calls so, also where it is the embedding's matrix.
HEAD = "lm_head"
#: Key of the safetensors metadata that has the `Fingerprint` of the model.
FINGERPRINT_KEY = "ruvllm.model"
CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
PREFIX = "base_model.model."

_PIECE_VALUES = 1 << 22  # 16 MiB of float32


@dataclass(frozen=True)
class Module:
    """A linear module of the Hugging Face model.

    Attributes:
        shape: ``(out, in)``.
        parts: our sites, each with the rows ``[start, stop)`` of the module that it is.
    """

    shape: tuple[int, int]
    parts: Mapping[str, tuple[int, int]]


def modules(names: Mapping[str, TensorSource]) -> dict[str, Module]:
    """The linear modules inside the layers, by their name in the Hugging Face model, in the order of `names`."""
    parts: dict[str, dict[str, tuple[int, int]]] = {}
    for site, source in names.items():
        if site.startswith("layers.") and len(source.shape) == 2:
            module = source.hf.removesuffix(".weight")
            parts.setdefault(module, {})[site] = source.hf_rows or (0, source.shape[0])
    return {
        module: Module((max(stop for _, stop in found.values()), names[next(iter(found))].shape[1]), found)
        for module, found in parts.items()
    }


def hf_order(spec: ModelSpec, site: str) -> npt.NDArray[np.int64] | None:
    """Which of our rows each row of the Hugging Face matrix is, or None where the orders agree."""
    heads = {"attn.q": spec.num_heads, "attn.k": spec.num_kv_heads}.get(site.partition(".")[2].partition(".")[2])
    if heads is None or not spec.rope_interleaved:
        return None
    within = np.arange(spec.head_dim)
    within[: spec.rope_dim] = within[: spec.rope_dim].reshape(-1, 2).T.ravel()
    order: npt.NDArray[np.int64] = (np.arange(heads)[:, None] * spec.head_dim + within).ravel()
    return order


def output_projection(spec: ModelSpec, weights: Weights) -> QuantTensor:
    """The matrix ``[V, C]`` that makes logits. Raises `LearningError` if `weights` lack it."""
    name = "embed" if spec.tied_embeddings else "lm_head"
    if name not in weights:
        what = f"the model's '{name}' is needed to translate between the final site and {HEAD}"
        raise LearningError(what, hint="pass the weights of the open model")
    return weights[name]


def pieces(tensor: QuantTensor) -> list[tuple[int, int]]:
    """Rows ``[start, stop)`` of pieces that together are the tensor, none of them large."""
    step = max(_PIECE_VALUES // tensor.columns, 1)
    return [(start, min(start + step, tensor.num_rows)) for start in range(0, tensor.num_rows, step)]


def through_head(head: QuantTensor, factor: FloatArray) -> npt.NDArray[np.float64]:
    """``W · factor``, in float64: ``[V, C] · [C, r]``."""
    wide = factor.astype(np.float64)
    return np.concatenate([head.rows(*rows).dequantize().astype(np.float64) @ wide for rows in pieces(head)])
