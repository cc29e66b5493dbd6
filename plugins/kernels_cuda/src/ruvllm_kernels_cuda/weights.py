"""A model's weights on the device, packed layer by layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ruvllm_core.errors import ModelError, OutOfMemoryError
from ruvllm_core.model.quant import QuantTensor
from ruvllm_core.model.spec import ModelSpec, llama_tensor_names
from ruvllm_core.protocols import Weights
from ruvllm_kernels_cuda.packing import PackedMatrix, pack
from ruvllm_kernels_cuda.shard import Shard, ShardedWeights

#: The four products of a layer, and the canonical weights that are stacked for each.
PRODUCTS = {
    "qkv": ("attn.q", "attn.k", "attn.v"),
    "o": ("attn.o",),
    "gate_up": ("mlp.gate", "mlp.up"),
    "down": ("mlp.down",),
}


@dataclass(frozen=True, eq=False)
class Product:
    """A packed matrix and its bias, float32 ``[rows]``, or None; inputs get `padding` columns before and after them."""

    matrix: PackedMatrix
    bias: Tensor | None
    padding: tuple[int, int] = (0, 0)


@dataclass(frozen=True, eq=False)
class LayerWeights:
    """Norms are float32 ``[C]``. Queries, keys and values are stacked in `qkv`, gates and their values in `gate_up`."""

    attn_norm: Tensor
    mlp_norm: Tensor
    qkv: Product
    o: Product
    gate_up: Product
    down: Product


@dataclass(frozen=True, eq=False)
class ModelWeights:
    """Everything a decoder multiplies with; `head` is `embed` itself where embeddings are tied and on one GPU."""

    embed: PackedMatrix
    head: PackedMatrix
    final_norm: Tensor
    layers: tuple[LayerWeights, ...]

    @property
    def nbytes(self) -> int:
        """Of all matrices."""
        matrices = [self.embed] if self.head is self.embed else [self.embed, self.head]
        for layer in self.layers:
            matrices += [layer.qkv.matrix, layer.o.matrix, layer.gate_up.matrix, layer.down.matrix]
        return sum(matrix.nbytes for matrix in matrices)


def load_weights(spec: ModelSpec, weights: Weights, device: torch.device) -> ModelWeights:
    """Pack all weights on `device`; of a mapped file, a few rows at a time are in the host's memory.

    `spec` is that of the part if they are `ShardedWeights`.

    Raises `ModelError` for a weight that is missing, has another shape, or that the spec does not know of, and
    `OutOfMemoryError` if the device is too small.
    """
    shapes = {name: source.shape for name, source in llama_tensor_names(spec).items()}
    for name in weights:  # it would be left out
        if name.endswith(".bias") and name not in shapes:
            raise ModelError(f"weight {name} is there, but the model's description has no such bias")

    def tensor(name: str) -> QuantTensor:
        if name not in weights:
            raise ModelError(f"weight {name} is missing")
        found = weights[name]
        if found.shape != shapes[name] and not isinstance(weights, ShardedWeights):  # which have looked already
            raise ModelError(f"weight {name} has shape {found.shape}, the model needs {shapes[name]}")
        return found

    def vector(names: Sequence[str]) -> Tensor:
        values = np.concatenate([tensor(name).dequantize() for name in names]).astype(np.float32)
        return torch.from_numpy(values).to(device)

    def product(prefix: str, parts: Sequence[str]) -> Product:
        names = [prefix + part for part in parts]
        biases = [f"{name}.bias" for name in names]
        bias = vector(biases) if biases[0] in shapes else None  # the spec has them for all parts or for none
        found = [tensor(name) for name in names]
        padding = (found[0].before, found[0].after) if isinstance(found[0], Shard) else (0, 0)
        return Product(pack(found, device), bias, padding)

    def layer(prefix: str) -> LayerWeights:
        norms = vector([f"{prefix}attn_norm"]), vector([f"{prefix}mlp_norm"])
        return LayerWeights(*norms, *(product(prefix, parts) for parts in PRODUCTS.values()))

    try:
        embed = pack([tensor("embed")], device)
        layers = tuple(layer(f"layers.{n}.") for n in range(spec.num_layers))
        output = tensor("embed" if spec.tied_embeddings else "lm_head")
        own = output.vocabulary if isinstance(output, Shard) else None
        tied = spec.tied_embeddings and own in (None, (0, spec.vocab_size))
        head = embed if tied else pack([output if own is None else output.rows(*own)], device)
        return ModelWeights(embed, head, vector(["final_norm"]), layers)
    except torch.OutOfMemoryError as error:
        needed = sum(one.data.nbytes for one in weights.values()) / 2**30
        raise OutOfMemoryError(
            f"weights of {needed:.2f} GiB do not fit on {device}: {error}",
            hint="use a smaller model or fewer bits a weight, or close other programs that use the GPU",
        ) from None
