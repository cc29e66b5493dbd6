"""Which steps are alike, so that one graph serves them."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from ruvllm_core.decode.batch import Batch
from ruvllm_core.decode.lora import FINAL_SITE
from ruvllm_kernels_cuda.draws import Drawing
from ruvllm_kernels_cuda.graphs import bucket_of
from ruvllm_kernels_cuda.inputs import StepShape, codes_alone
from ruvllm_kernels_cuda.storage import DeviceStorage

_LEAST_BLOCKS = 16  # columns of a graph's block table, unless one is enough; then powers of two


@dataclass(frozen=True)
class StepKind:
    """What a step does beside its layers; a part of what tells graphs apart.

    Attributes:
        layered, final: whether adapters have sites in layers, and at the final site.
        drawing: how tokens are drawn; None if only hidden states are wanted.
        steps: how many steps follow each other on the device; 0 is one that ends on the host.
        generation: of the adapters' pools.
    """

    layered: bool = False
    final: bool = False
    drawing: Drawing | None = None
    steps: int = 0
    generation: int = 0


def rounded_shape(shape: StepShape) -> StepShape | None:
    """The shape of the graph for a step of one token a sequence, or None if that cannot be one."""
    bucket = bucket_of(shape.tokens)
    if bucket is None or not codes_alone(shape):
        return None
    moves: list[tuple[DeviceStorage, DeviceStorage, int]] = []
    for source, target, count in shape.moves:
        if count > bucket * target.block_size:
            return None
        moves.append((source, target, bucket * target.block_size))
    widths = tuple(width if width == 1 else _power_of_two(max(width, _LEAST_BLOCKS)) for width in shape.widths)
    return replace(shape, tokens=bucket, sequences=bucket, rows=bucket, widths=widths, moves=tuple(moves))


def _power_of_two(count: int) -> int:
    return 1 << (count - 1).bit_length()


def is_decode(batch: Batch) -> bool:
    """Whether every sequence has one token, and all are wanted in order."""
    count = batch.num_sequences
    return len(batch.tokens) == count == len(batch.rows) and bool((batch.rows == np.arange(count)).all())


def has_final(batch: Batch) -> bool:
    return any(adapter is not None and FINAL_SITE in adapter.sites for adapter in batch.adapters)


def owners(batch: Batch) -> npt.NDArray[np.int64]:
    """The sequence of each wanted row."""
    return np.searchsorted(batch.cu_q[1:], batch.rows, side="right")
