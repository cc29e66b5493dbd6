"""`merge_gguf`: a GGUF file with an adapter added to its weights, for engines that know no adapters.

Only touched tensors are encoded anew, and rounding them eats part of the change: learned deltas are small, and a value
on the grid of a 4-bit scheme moves only if its change exceeds half a step. Next to nothing may be left, which
`MergeReport` tells and the log warns of. q8_0 or f16 keep the change, in a larger file. Another scheme of few bits is
no help: its grid is another one, so all values of the tensor are rounded a second time, and not evenly.
All metadata and all other tensors stay as they are.
Source of the format: the GGUF specification (docs/gguf.md of the GGML project).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ruvllm_core.decode.lora import FINAL_SITE
from ruvllm_core.errors import LearningError, QuantizationError
from ruvllm_core.log import get_logger
from ruvllm_core.model.loader import open_gguf, open_model
from ruvllm_core.model.quant import SCHEMES, QuantTensor
from ruvllm_core.protocols import FloatArray, LowRank, Quantizer
from ruvllm_core.registry import Registry

from .gguf_copy import NewTensor, write_copy
from .peft_export import check_deltas
from .peft_modules import pieces
from .sites import Deltas

_log = get_logger("sona.merge")
_OUTPUT = "output.weight"
# Shares of the change and of the weights; beyond these, a merged model no longer says what its adapter said.
_LOST = 0.1
_ERROR = 0.01


_Encode = Callable[[FloatArray, str], QuantTensor]


@dataclass
class Change:
    """What rounding left of a change of weights: ΔW as asked for, ΔW′ as the file has it.

    Attributes:
        asked, kept, off, weights: sums over all weights of ΔW², ΔW·ΔW′, (ΔW′ − ΔW)² and W².
    """

    asked: float = 0.0
    kept: float = 0.0
    off: float = 0.0
    weights: float = 0.0

    @property
    def size(self) -> float:
        """‖ΔW‖ (Frobenius)."""
        return math.sqrt(self.asked)

    @property
    def lost(self) -> float:
        """The share of ΔW that rounding ate, ``1 − ⟨ΔW′, ΔW⟩ / ‖ΔW‖²``: 1 is all of it, below 0 too much is left."""
        return 1.0 - self.kept / self.asked if self.asked else 0.0

    @property
    def noise(self) -> float:
        """Rounding error as a multiple of the change, ``‖ΔW′ − ΔW‖ / ‖ΔW‖``."""
        return math.sqrt(self.off / self.asked) if self.asked else 0.0

    @property
    def error(self) -> float:
        """Rounding error as a share of the weights, ``‖ΔW′ − ΔW‖ / ‖W‖``."""
        return math.sqrt(self.off / self.weights) if self.weights else 0.0

    def add(self, old: FloatArray, asked: FloatArray, got: FloatArray) -> None:
        """Count some rows of W, ΔW and ΔW′."""
        self.weights += float(np.square(old, dtype=np.float64).sum())
        self.asked += float(np.square(asked, dtype=np.float64).sum())
        self.kept += float(np.multiply(asked, got, dtype=np.float64).sum())
        self.off += float(np.square(got - asked, dtype=np.float64).sum())


@dataclass(frozen=True)
class MergedTensor:
    """One tensor that was changed.

    Attributes:
        name: in the file.
        before, after: schemes; `before` is empty for an output matrix that was the embedding's until now.
    """

    name: str
    before: str
    after: str
    change: Change


@dataclass(frozen=True)
class MergeReport:
    """What `merge_gguf` did.

    Attributes:
        touched: the tensors that were changed.
        file_bytes: size of the new file.
    """

    touched: tuple[MergedTensor, ...]
    file_bytes: int

    @property
    def change(self) -> Change:
        """All changes together."""
        changes = [tensor.change for tensor in self.touched]
        sums = (sum(getattr(change, name) for change in changes) for name in ("asked", "kept", "off", "weights"))
        return Change(*sums)

    @property
    def lost(self) -> float:
        """The share of all changes that rounding ate, see `Change.lost`."""
        return self.change.lost

    def __str__(self) -> str:
        schemes = ", ".join(sorted({tensor.after for tensor in self.touched}))
        return (
            f"{len(self.touched)} tensors changed, stored as {schemes}: rounding ate {self.lost:.1%} of the change and "
            f"added an error of {self.change.noise:.2f} times its size, {self.change.error:.2%} of the weights"
        )


@dataclass(frozen=True)
class _Part:
    """A delta of the rows ``[start, stop)`` of a tensor."""

    start: int
    stop: int
    delta: LowRank


def merge_gguf(
    source: Path,
    deltas: Deltas,
    destination: Path,
    *,
    registry: Registry,
    scheme: str | None = None,
    progress: Callable[[int], None] | None = None,
) -> MergeReport:
    """Write `source` with ``W + s·B·A`` in place of every W that has a delta, each product added up in float64.

    The ``final`` site becomes part of the output matrix: W + s·(W·B)·A. Where that is the embedding, a matrix of its
    own is added to the file, since a change of the embedding would also change what goes in.

    Args:
        deltas: by site, in the row order of the model as opened from `source`.
        destination: appears complete or not at all; replaced if it exists.
        registry: its ``quantizers`` encode touched tensors, its ``architectures`` say what the tensors are.
        scheme: of touched tensors; None keeps each tensor's own.
        progress: called with the number of bytes after each piece of a tensor.

    Raises:
        LearningError: deltas that do not fit the model, or `destination` is `source`.
        QuantizationError: no installed plugin writes a scheme, or it cannot hold the values.
        ModelError: `source` cannot be read or `destination` not be written.
    """
    if scheme is not None and scheme not in SCHEMES:
        raise QuantizationError(f"there is no scheme '{scheme}'", hint=f"known are {', '.join(SCHEMES)}")
    file, model = open_gguf(source), open_model(source, registry)
    if destination.exists() and destination.samefile(source):
        raise LearningError(f"{source} would replace itself", hint="give the merged model another name")
    check_deltas(deltas, model.spec, model.sources)
    parts: dict[str, list[_Part]] = {}
    for site, delta in deltas.items():
        if site != FINAL_SITE:
            where = model.sources[site]
            parts.setdefault(where.gguf, []).append(_Part(*(where.gguf_rows or (0, where.shape[0])), delta))
    if FINAL_SITE in deltas:
        parts[_OUTPUT] = [_Part(0, model.spec.vocab_size, deltas[FINAL_SITE])]
    encoders: dict[str, _Encode] = {}
    touched: list[MergedTensor] = []
    changed: dict[str, NewTensor] = {}
    for name, changes in parts.items():
        before = file.tensors[name] if name in file.tensors else model.weights["embed"]
        after = scheme or before.scheme
        SCHEMES[after].row_bytes(before.columns)
        if after not in encoders:
            encoders[after] = _encoder(registry, after, before)
        merged = MergedTensor(name, before.scheme if name in file.tensors else "", after, Change())
        touched.append(merged)
        changed[name] = NewTensor(
            before.shape,
            after,
            lambda merged=merged, before=before, changes=changes: _merge(merged, before, changes, encoders),  # type: ignore[misc]
        )
    size = write_copy(file, destination, changed, progress)
    report = MergeReport(tuple(touched), size)
    if abs(report.lost) > _LOST or report.change.error > _ERROR:
        hint = "choose a finer scheme for the changed tensors, such as q8_0 or f16"
        _log.warning("the merged model may not say what its adapter says", report=str(report), hint=hint)
    return report


def _merge(
    merged: MergedTensor, before: QuantTensor, changes: list[_Part], encoders: Mapping[str, _Encode]
) -> Iterator[QuantTensor]:
    for start, stop in pieces(before):
        old = before.rows(start, stop).dequantize()
        exact = old.astype(np.float64)
        for part in changes:
            first, last = max(start, part.start), min(stop, part.stop)
            if first < last:
                b = part.delta.b[first - part.start : last - part.start].astype(np.float64)
                if merged.name == _OUTPUT:
                    b = old.astype(np.float64) @ part.delta.b.astype(np.float64)
                exact[first - start : last - start] += part.delta.scale * (b @ part.delta.a.astype(np.float64))
        new = encoders[merged.after](exact.astype(np.float32), merged.name)
        merged.change.add(old, (exact - old).astype(np.float32), new.dequantize() - old)
        yield new


def _encoder(registry: Registry, scheme: str, tensor: QuantTensor) -> _Encode:
    """What writes `scheme`: core itself, or the first quantizer that says it does."""
    if scheme == "f32":
        return lambda values, name: QuantTensor.from_float(values)
    quantizers: dict[str, Quantizer] = registry.load_all("quantizers")
    for quantizer in sorted(quantizers.values(), key=lambda quantizer: quantizer.name != scheme):
        if quantizer.scheme_for("blk.0.ffn_up.weight", tensor.shape, 1) == scheme:
            return lambda values, name, encode=quantizer.quantize: encode(values, scheme, name=name)  # type: ignore[misc]
    raise QuantizationError(
        f"no installed plugin writes {scheme}{registry.not_in_use}",
        hint="install ruvllm-quantizers, or choose another scheme for the changed tensors, such as f32",
    )
