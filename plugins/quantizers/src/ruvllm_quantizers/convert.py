"""`convert`: a `Source` and a quantizer become a GGUF file."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from ruvllm_core.errors import QuantizationError
from ruvllm_core.model.gguf_parser import ValueType
from ruvllm_core.model.quant import FLOAT_SCHEMES, QuantTensor
from ruvllm_core.protocols import Quantizer
from ruvllm_quantizers.gguf_writer import PendingTensor, write_gguf

from .source import Source, SourceTensor

_PIECE_VALUES = 1 << 22  # 16 MiB of float32 in flight
_QUANTIZATION_VERSION = 2  # of the block layouts, see the GGUF specification


@dataclass(frozen=True)
class Report:
    """What `convert` did. Sizes are bytes of tensor data; `schemes` counts tensors."""

    source_bytes: int
    file_bytes: int
    bits_per_weight: float
    schemes: dict[str, int]


def plan(source: Source, quantizer: Quantizer, *, requantize: bool = False) -> dict[str, str]:
    """The scheme that every tensor of `source` will have.

    Raises:
        QuantizationError: a tensor is quantized already, would have to be encoded anew, and `requantize` is not set.
    """
    tied = all(tensor.name != "output.weight" for tensor in source.tensors)
    schemes: dict[str, str] = {}
    for tensor in source.tensors:
        role = "output.weight" if tied and tensor.name == "token_embd.weight" else tensor.name
        scheme = quantizer.scheme_for(role, tensor.shape, source.num_layers)
        if tensor.scheme not in FLOAT_SCHEMES and tensor.scheme != scheme and not requantize:
            raise QuantizationError(
                f"{source.path}: tensor '{tensor.name}' is quantized already ({tensor.scheme}); encoding it again as "
                f"{scheme} adds to the loss",
                hint="start from an f16, bf16 or f32 model, or accept the loss with --allow-requantize",
            )
        schemes[tensor.name] = scheme
    return schemes


def convert(
    source: Source,
    destination: Path,
    quantizer: Quantizer,
    *,
    requantize: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Report:
    """Write `source` as a GGUF file; `destination` appears complete or not at all.

    Args:
        requantize: encode anew what is quantized already.
        progress: called with tensor bytes written so far and in all.

    Raises:
        QuantizationError: see `plan`, or values that cannot be encoded.
        ModelError: the file cannot be written.
    """
    schemes = plan(source, quantizer, requantize=requantize)
    metadata = dict(source.metadata)
    metadata["general.file_type"] = quantizer.file_type
    metadata["general.quantization_version"] = _QUANTIZATION_VERSION
    types = {**source.types, **dict.fromkeys(("general.file_type", "general.quantization_version"), (ValueType.U32,))}
    pending = [
        PendingTensor(t.name, t.shape, schemes[t.name], lambda t=t: _pieces(t, schemes[t.name], quantizer))  # type: ignore[misc]
        for t in source.tensors
    ]
    total = sum(tensor.nbytes for tensor in pending)
    written = 0

    def advance(count: int) -> None:
        nonlocal written
        written += count
        if progress:
            progress(written, total)

    size = write_gguf(destination, metadata, pending, types=types, progress=advance)
    weights = sum(_size(tensor.shape) for tensor in source.tensors)
    source_bytes = sum(PendingTensor(t.name, t.shape, t.scheme, tuple).nbytes for t in source.tensors)
    return Report(source_bytes, size, 8 * total / weights, dict(Counter(schemes.values())))


def _pieces(tensor: SourceTensor, scheme: str, quantizer: Quantizer) -> Iterator[QuantTensor]:
    whole = tensor.load()
    if whole.scheme == scheme:
        yield whole
        return
    step = max(_PIECE_VALUES // whole.columns, 1)
    for start in range(0, whole.num_rows, step):
        data = whole.data[start : start + step]
        rows = QuantTensor(whole.scheme, (len(data), whole.columns), data)
        yield quantizer.quantize(rows.dequantize(), scheme, name=tensor.name)


def _size(shape: tuple[int, ...]) -> int:
    size = 1
    for axis in shape:
        size *= axis
    return size
