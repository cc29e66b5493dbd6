"""Opens a model: finds its family, reads its spec, and maps its tensors to canonical names without copying them."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from ruvllm_core.errors import FormatError, ModelError, QuantizationError, near
from ruvllm_core.log import get_logger
from ruvllm_core.machine import usable_cpus
from ruvllm_core.model.config_fields import Fields
from ruvllm_core.model.dequant import count_non_finite
from ruvllm_core.model.gguf import GGUFFile
from ruvllm_core.model.mapping import DAMAGED
from ruvllm_core.model.quant import FLOAT_SCHEMES, QuantTensor
from ruvllm_core.model.safetensors import open_folder, read_json
from ruvllm_core.model.spec import ModelSpec, TensorSource

if TYPE_CHECKING:
    from ruvllm_core.model.tokenizer import Tokenizer
    from ruvllm_core.protocols import Architecture, Quantizer
    from ruvllm_core.registry import Registry

_log = get_logger("loader")

# Tables that follow from the spec. Any other surplus tensor of a layer means a model that we would compute wrongly.
_DERIVED = re.compile(r"rotary_emb\.inv_freq$|attn_rot_embd\.weight$|^rope_(freqs|factors_short|factors_long)\.weight$")
_QUANTIZED_AT_ONCE = 1 << 25  # values; 128 MiB of float32
_VARIANT = "the model is of a variant that its family does not have here"
_MATTERS = re.compile(r"(^|\.)(layers|blk)\.\d+\.|\.bias$")


@dataclass
class ModelFile:
    """An open model. Weights are views of memory-mapped files, unless `quantize_weights` has replaced them.

    Attributes:
        path: the ``.gguf`` file or the folder.
        spec: what a decoder needs to know.
        weights: tensors by canonical name (see `ruvllm_core.model.spec.llama_tensor_names`).
        sources: where each of them is found.
        file_bytes: size of all weight files.
        metadata: of a GGUF file, until the first tokenizer has been made of it.
    """

    path: Path
    spec: ModelSpec
    weights: dict[str, QuantTensor]
    sources: Mapping[str, TensorSource]
    file_bytes: int
    metadata: Mapping[str, Any] | None = None

    @property
    def scheme(self) -> str:
        """The scheme that most weight bytes are in."""
        nbytes: Counter[str] = Counter()
        for tensor in self.weights.values():
            nbytes[tensor.scheme] += tensor.nbytes
        return nbytes.most_common(1)[0][0] if nbytes else "none"

    def tokenizer(self) -> Tokenizer:
        """The tokenizer that comes with the model. Raises `TokenizerError` if it is missing or does not fit."""
        from ruvllm_core.model.tokenizer import Tokenizer

        metadata, self.metadata = self.metadata, None
        tokenizer = Tokenizer.from_gguf(metadata, str(self.path)) if metadata else Tokenizer.load(self.path)
        tokenizer.check_vocab(self.spec.vocab_size)
        return tokenizer

    def check_finite(self) -> None:
        """Raise `FormatError` if a scale, or a value of a float tensor, is NaN or infinite. Reads all weights once."""
        with ThreadPoolExecutor(usable_cpus()) as pool:
            counts = list(pool.map(count_non_finite, self.weights.values()))
        for (name, tensor), bad in zip(self.weights.items(), counts, strict=True):
            if bad:
                what = f"tensor '{name}' ({tensor.scheme}) has {bad} values or scales NaN or infinite"
                raise FormatError(f"{self.path}: {what}", hint=DAMAGED)

    def close(self) -> None:
        """Let go of the weights; the last view to die unmaps the files."""
        self.weights = {}


def open_model(path: Path, registry: Registry) -> ModelFile:
    """Open a ``.gguf`` file, or a Hugging Face folder with ``config.json`` and safetensors.

    Raises:
        ModelNotFound: there is no model at `path`.
        FormatError: a file breaks its format, or a tensor is missing or of another shape than the spec needs.
        ModelError: the family is unknown, or its configuration wrong or not supported; names file and field.
    """
    return _open_folder(path, registry) if path.is_dir() else _open_gguf(path, registry)


def quantize_weights(model: ModelFile, quantizer: Quantizer) -> None:
    """Replace the float matrices of `model` by blocks, so that it needs no more memory than a quantized file.

    Vectors stay as they are. Raises `QuantizationError` if a matrix is quantized already to another scheme than
    `quantizer` has for it, or if its values cannot be encoded.
    """
    matrices = {name: tensor for name, tensor in model.weights.items() if len(tensor.shape) == 2}
    wanted: dict[str, str] = {}
    for name, tensor in matrices.items():
        # A tied embedding doubles as output matrix, which recipes give more bits.
        called = "output.weight" if name == "embed" and model.spec.tied_embeddings else model.sources[name].gguf
        wanted[name] = quantizer.scheme_for(called, tensor.shape, model.spec.num_layers)
        if tensor.scheme not in (wanted[name], *FLOAT_SCHEMES):
            raise QuantizationError(
                f"{model.path} cannot be quantized to {quantizer.name} while loading: it is quantized already "
                f"({model.scheme}; {model.sources[name].gguf} is {tensor.scheme}, not {wanted[name]})",
                hint="leave quantization unset to use the file as it is, or start from an unquantized model",
            )
    for name, tensor in matrices.items():
        if tensor.scheme == wanted[name]:
            continue
        step = max(_QUANTIZED_AT_ONCE // tensor.columns, 1)
        pieces = []
        for start in range(0, tensor.num_rows, step):
            piece = tensor.rows(start, min(start + step, tensor.num_rows))
            pieces.append(quantizer.quantize(piece.dequantize(), wanted[name], name=name).data)
        data = pieces[0] if len(pieces) == 1 else np.concatenate(pieces)
        model.weights[name] = QuantTensor(wanted[name], tensor.shape, data)


def open_gguf(path: Path) -> GGUFFile:
    """A GGUF file that holds a whole model. Raises what `GGUFFile.open` raises, or `ModelError` for a part of one."""
    file = GGUFFile.open(path)
    with _naming(path):
        parts = Fields(file.metadata).integer("split.count", 1)
    if parts > 1:
        what = f"{path} is one of {parts} parts of a split model, which cannot be read"
        raise ModelError(what, hint="join them with llama.cpp's `llama-gguf-split --merge`, or take an unsplit file")
    return file


def _open_gguf(path: Path, registry: Registry) -> ModelFile:
    file = open_gguf(path)
    with _naming(path):
        family = _family(registry, Fields(file.metadata).text("general.architecture"), "gguf")
        spec = family.spec_from_gguf(file.metadata, file.tensors.get)
    sources = family.tensor_names(spec)
    weights = _map(path, sources, "gguf", file.tensors)
    return ModelFile(path, spec, weights, sources, path.stat().st_size, file.metadata)


def _open_folder(path: Path, registry: Registry) -> ModelFile:
    config = read_json(path / "config.json")
    with _naming(path / "config.json"):
        names = config.get("architectures")
        if not isinstance(names, list) or not names or not isinstance(names[0], str):
            raise ModelError(f"'architectures' should name the model's class, found {names!r}")
        if isinstance(quantization := config.get("quantization_config"), dict):
            method = quantization.get("quant_method", "an unnamed method")
            hint = "take the unquantized model, or a GGUF file of it"
            raise ModelError(f"weights quantized with {method} cannot be read", hint=hint)
        family = _family(registry, names[0], "hf")
        spec = family.spec_from_hf(config)
    sources = family.tensor_names(spec)
    tensors = open_folder(path)
    weights = _map(path, sources, "hf", tensors)
    return ModelFile(path, spec, weights, sources, tensors.nbytes)


def _family(registry: Registry, name: str, kind: Literal["hf", "gguf"]) -> Architecture:
    families: Collection[Architecture] = registry.load_all("architectures").values()
    known = {alias: family for family in families for alias in getattr(family, f"{kind}_names")}
    if name not in known:
        what = f"no installed plugin knows the model family {name!r}{registry.not_in_use}"
        raise ModelError(what, hint=near(name, known))
    return known[name]


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Put `path` before the message of an error in what the file says of the model."""
    try:
        yield
    except ModelError as error:
        raise type(error)(f"{path}: {error.message}", hint=error.hint) from None


def _map(
    path: Path, sources: Mapping[str, TensorSource], kind: Literal["hf", "gguf"], tensors: Mapping[str, QuantTensor]
) -> dict[str, QuantTensor]:
    """Canonical tensors out of those of a file: whole ones, or the rows that `sources` say.

    Raises `FormatError` for one that is missing, of another shape, or left over though it matters.
    """
    placed = {c: (getattr(source, kind), getattr(source, f"{kind}_rows")) for c, source in sources.items()}
    expected: dict[str, tuple[int, ...]] = {}
    for canonical, (name, rows) in placed.items():
        shape = sources[canonical].shape
        if rows is not None:
            shape = (max(rows[1], expected[name][0] if name in expected else 0), *shape[1:])
        expected[name] = shape
    found: dict[str, QuantTensor] = {}
    for name, shape in expected.items():
        if name not in tensors:
            hint = "the download is incomplete, or the configuration is of another model"
            raise FormatError(f"{path}: the tensor '{name}' is missing", hint=hint)
        found[name] = tensors[name]
        if found[name].shape != shape:
            what = f"{path}: the tensor '{name}' should have the shape {shape}, found {found[name].shape}"
            raise FormatError(what, hint=f"the configuration is of another model, or {_VARIANT}")
    for name in tensors:
        if name in expected or _DERIVED.search(name):
            continue
        if _MATTERS.search(name):
            what = "has no place in this model family, and leaving it out would change what the model says"
            raise FormatError(f"{path}: the tensor '{name}' {what}", hint=_VARIANT)
        _log.debug("tensor not used", path=str(path), tensor=name)
    return {c: found[name] if rows is None else found[name].rows(*rows) for c, (name, rows) in placed.items()}
