"""`Source`: a model to be quantized, as GGUF metadata and tensors under GGUF names."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ruvllm_core.model.gguf_parser import ValueType
from ruvllm_core.model.loader import open_gguf
from ruvllm_core.model.quant import QuantTensor
from ruvllm_core.registry import Registry


@dataclass(frozen=True)
class SourceTensor:
    """A tensor that is read when its turn comes.

    Attributes:
        name: GGUF name.
        shape: row-major.
        scheme: how the source stores it.
        load: returns it.
    """

    name: str
    shape: tuple[int, ...]
    scheme: str
    load: Callable[[], QuantTensor]


@dataclass(frozen=True)
class Source:
    """A model as GGUF sees it.

    Attributes:
        path: where it comes from.
        metadata: of the file to be written, but for what depends on the quantization.
        types: value types of `metadata` where they are to differ from what the writer infers.
        tensors: in the order in which they are to be written.
    """

    path: Path
    metadata: Mapping[str, Any]
    tensors: tuple[SourceTensor, ...]
    types: Mapping[str, tuple[ValueType, ...]] = field(default_factory=dict)

    @property
    def num_layers(self) -> int:
        return int(self.metadata.get(f"{self.metadata.get('general.architecture')}.block_count", 0))


def open_source(path: Path, registry: Registry) -> Source:
    """A GGUF file or a Hugging Face folder as a source. Raises `ModelError` or `TokenizerError` if it cannot be one."""
    if path.is_dir():
        from .hf_source import hf_source

        return hf_source(path, registry)
    return gguf_source(path)


def gguf_source(path: Path) -> Source:
    """A GGUF file as a source. Raises what `open_gguf` raises."""
    file = open_gguf(path)
    tensors = tuple(
        SourceTensor(name, tensor.shape, tensor.scheme, lambda tensor=tensor: tensor)  # type: ignore[misc]
        for name, tensor in file.tensors.items()
    )
    return Source(path, file.metadata, tensors, file.types)
