"""What attention sees of a key/value cache: segments of paged storage, oldest first."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ruvllm_core.model.quant import SCHEMES
from ruvllm_core.model.spec import ModelSpec


@dataclass(eq=False)
class KVStorage:
    """Blocks of keys and values in one scheme, for every layer.

    Attributes:
        scheme: how values are stored (``f32``, ``f16``, ``bf16``, or a quantized scheme).
        num_blocks, block_size: N blocks of S tokens.
        keys, values: one array a layer, ``[N, K, S, D]``, in whatever array type the decoder that made it uses.
        nbytes: bytes allocated, all layers, keys and values.
    """

    scheme: str
    num_blocks: int
    block_size: int
    keys: Sequence[Any]
    values: Sequence[Any]
    nbytes: int


@dataclass(eq=False)
class Segment:
    """A run of cached tokens in one storage, for each sequence of a batch.

    Attributes:
        storage: where the tokens are.
        block_table: int32 ``[B, M]``, the blocks of each sequence in order; entries past its length are unused.
        lengths: int32 ``[B]``, tokens of each sequence in this segment, those about to be written included.
        starts: int32 ``[B]``, position of each sequence's first token in this segment.
    """

    storage: KVStorage
    block_table: npt.NDArray[np.int32]
    lengths: npt.NDArray[np.int32]
    starts: npt.NDArray[np.int32]


@dataclass(eq=False)
class KVView:
    """All segments of a batch, oldest first.

    Attributes:
        segments: at least one; new keys and values are written to the last one.
        slots: int64 ``[T]``, where each new token goes in the last segment's storage: ``block * block_size + offset``.
    """

    segments: list[Segment]
    slots: npt.NDArray[np.int64]


def bytes_per_token(spec: ModelSpec, scheme: str) -> int:
    """Bytes that keys and values of one token take in all layers, in a float scheme."""
    return 2 * spec.num_layers * spec.num_kv_heads * SCHEMES[scheme].row_bytes(spec.head_dim)
