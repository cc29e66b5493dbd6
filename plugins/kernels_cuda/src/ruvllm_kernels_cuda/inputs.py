"""A batch as the kernels read it: which tensors there are, and their numbers for one step."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ruvllm_core.decode.batch import Batch
from ruvllm_core.decode.kv import KVStorage
from ruvllm_core.errors import GenerationError
from ruvllm_kernels_cuda.packet import Array, Packet
from ruvllm_kernels_cuda.segments import CodedKV
from ruvllm_kernels_cuda.storage import DeviceStorage

#: Where a token goes that is only there to fill a batch up: nowhere.
NOWHERE = -1


@dataclass(frozen=True)
class StepShape:
    """Sizes of everything in a step; what differs in none of them can use the same buffers and graph.

    Attributes:
        tokens, sequences, rows: T, B and R.
        most: tokens of the sequence that has most.
        storages, widths: of each segment, and the columns of its block table.
        moves: source, target and number of tokens of each.
        bounded: whether there is a boundary.
        variants: whether tokens may have different rotary tables.
    """

    tokens: int
    sequences: int
    rows: int
    most: int
    storages: tuple[DeviceStorage, ...]
    widths: tuple[int, ...]
    moves: tuple[tuple[DeviceStorage, DeviceStorage, int], ...]
    bounded: bool
    variants: bool

    @property
    def context(self) -> int:
        """Tokens for which the block tables have room."""
        return sum(one.block_size * width for one, width in zip(self.storages, self.widths, strict=True))


@dataclass(frozen=True, eq=False)
class DeviceRun:
    """A `Segment` of every layer: tables int32 ``[B, M]`` and ``[B]``."""

    storage: DeviceStorage
    block_table: Tensor
    lengths: Tensor
    starts: Tensor


@dataclass(frozen=True, eq=False)
class DeviceMove:
    """A `Move` of every layer: int64 ``[M]`` each."""

    source: DeviceStorage
    target: DeviceStorage
    from_slots: Tensor
    to_slots: Tensor
    positions: Tensor


@dataclass(frozen=True, eq=False)
class StepInputs:
    """One step on the device.

    Attributes:
        tokens, positions: int32 ``[T]``.
        cu_q: int32 ``[B+1]``.
        slots: int64 ``[T]``; negative ones are not written.
        rows: int64 ``[R]``, or None if the state of every token is wanted.
        variants, boundary: int32 ``[T]``, or None.
    """

    shape: StepShape
    tokens: Tensor
    positions: Tensor
    cu_q: Tensor
    slots: Tensor
    rows: Tensor | None
    variants: Tensor | None
    boundary: Tensor | None
    runs: tuple[DeviceRun, ...]
    moves: tuple[DeviceMove, ...]


def shape_of(batch: Batch, variants: bool) -> StepShape:
    """The exact shape of a batch. Raises `GenerationError` for storage of another decoder."""
    view = batch.kv
    return StepShape(
        tokens=len(batch.tokens),
        sequences=batch.num_sequences,
        rows=len(batch.rows),
        most=int(np.diff(batch.cu_q).max(initial=0)),
        storages=tuple(_ours(segment.storage) for segment in view.segments),
        widths=tuple(segment.block_table.shape[1] for segment in view.segments),
        moves=tuple((_ours(one.source), _ours(one.target), len(one.to_slots)) for one in view.moves),
        bounded=view.boundary is not None,
        variants=variants,
    )


def codes_alone(shape: StepShape) -> bool:
    """Whether all moves code floats: of those, places can be left out."""
    return all(
        isinstance(target.layers[0], CodedKV) and not isinstance(source.layers[0], CodedKV)
        for source, target, _ in shape.moves
    )


def _ours(storage: KVStorage) -> DeviceStorage:
    if not isinstance(storage, DeviceStorage):
        raise GenerationError("kernels cuda: these keys and values were allocated by another decoder")
    return storage


class StepBuffers:
    """Memory for steps of one shape, and of batches that are smaller in sequences of one token each.

    Attributes:
        inputs: the tensors; their addresses stay.
        packet: all of them, and whatever `extra` fields were asked for.
        log: where the tokens of steps that follow each other on the device are kept, if there are such.
    """

    log: Tensor | None = None

    def __init__(
        self, shape: StepShape, device: torch.device, extra: Mapping[str, tuple[str, tuple[int, ...]]] | None = None
    ) -> None:
        fields: dict[str, tuple[str, tuple[int, ...]]] = {
            "tokens": ("int32", (shape.tokens,)),
            "positions": ("int32", (shape.tokens,)),
            "cu_q": ("int32", (shape.sequences + 1,)),
            "slots": ("int64", (shape.tokens,)),
        }
        if shape.rows < shape.tokens:
            fields["rows"] = "int64", (shape.rows,)
        for name, wanted in (("variants", shape.variants), ("boundary", shape.bounded)):
            if wanted:
                fields[name] = "int32", (shape.tokens,)
        for n, width in enumerate(shape.widths):
            fields[f"table{n}"] = "int32", (shape.sequences, width)
            fields[f"lengths{n}"] = fields[f"starts{n}"] = "int32", (shape.sequences,)
        for n, (_, _, count) in enumerate(shape.moves):
            fields |= {f"{name}{n}": ("int64", (count,)) for name in ("from", "to", "at")}
        self.shape = shape
        self.packet = Packet({**fields, **(extra or {})}, device)
        there = self.packet.device
        self.inputs = StepInputs(
            shape=shape,
            tokens=there["tokens"],
            positions=there["positions"],
            cu_q=there["cu_q"],
            slots=there["slots"],
            rows=there.get("rows"),
            variants=there.get("variants"),
            boundary=there.get("boundary"),
            runs=tuple(
                DeviceRun(storage, there[f"table{n}"], there[f"lengths{n}"], there[f"starts{n}"])
                for n, storage in enumerate(shape.storages)
            ),
            moves=tuple(
                DeviceMove(source, target, there[f"from{n}"], there[f"to{n}"], there[f"at{n}"])
                for n, (source, target, _) in enumerate(shape.moves)
            ),
        )

    def write(self, batch: Batch) -> None:
        """Put a batch into the host's arrays; what it does not fill are tokens that see and write nothing."""
        self.packet.ready()
        host, tokens, sequences = self.packet.host, len(batch.tokens), batch.num_sequences
        _put(host["tokens"], batch.tokens, 0)
        _put(host["positions"], batch.positions, 0)
        _put(host["slots"], batch.kv.slots, NOWHERE)
        host["cu_q"][: sequences + 1] = batch.cu_q
        host["cu_q"][sequences + 1 :] = tokens + 1 + np.arange(self.shape.sequences - sequences)
        if "rows" in host:
            host["rows"][:] = batch.rows
        if self.shape.variants:
            _put(host["variants"], np.repeat(batch.rope_variants, np.diff(batch.cu_q)), 0)
        if batch.kv.boundary is not None:
            _put(host["boundary"], batch.kv.boundary, 0)
        for n, segment in enumerate(batch.kv.segments):
            host[f"table{n}"][:sequences, : segment.block_table.shape[1]] = segment.block_table
            _put(host[f"lengths{n}"], segment.lengths, 0)
            _put(host[f"starts{n}"], segment.starts, 0)
        for n in range(len(self.shape.moves)):
            places = [host[f"{name}{n}"] for name in ("from", "to", "at")]
            one = batch.kv.moves[n]
            for into, values, filler in zip(
                places, (one.from_slots, one.to_slots, one.positions), (0, NOWHERE, 0), strict=True
            ):
                _put(into, values, filler)


def _put(into: Array, values: Array, filler: int) -> None:
    into[: len(values)] = values
    into[len(values) :] = filler
