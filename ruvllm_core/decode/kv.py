"""What attention sees of a key/value cache: segments of paged storage, oldest first."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ruvllm_core.errors import ConfigError
from ruvllm_core.model.quant import SCHEMES
from ruvllm_core.model.spec import ModelSpec

#: Bits of a value in each quantized scheme of keys and values, see `ruvllm_core.decode.coded`.
STORE_BITS = {"q8": 8, "q4": 4}


@dataclass(eq=False)
class KVStorage:
    """Blocks of keys and values in one scheme, for every layer.

    Attributes:
        scheme: how values are stored (``f32``, ``f16``, ``bf16``, or ``q8`` or ``q4``).
        num_blocks, block_size: N blocks of S tokens.
        keys, values: one array a layer, ``[N, K, S, D]``, in whatever array type the decoder that made it uses; of
            quantized schemes only that decoder knows the shape.
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
class Move:
    """Tokens that a step copies in every layer, once its new ones are written and before attention reads any.

    Attributes:
        source, target: storages; keys and values are turned into the target's scheme. May be the same one.
        from_slots, to_slots: int64 ``[M]``, as in `KVView.slots`; none of `to_slots` is among `from_slots`. Of a
            quantized target they are whole blocks in order.
        positions: int64 ``[M]``, of each token in its sequence.
    """

    source: KVStorage
    target: KVStorage
    from_slots: npt.NDArray[np.int64]
    to_slots: npt.NDArray[np.int64]
    positions: npt.NDArray[np.int64]


@dataclass(eq=False)
class KVView:
    """All segments of a batch, oldest first.

    Attributes:
        segments: at least one; new keys and values are written to the last one.
        slots: int64 ``[T]``, where each new token goes in the last segment's storage: ``block * block_size + offset``.
        moves: to be carried out in this step.
        boundary: int32 ``[T]``, or None. Where given, segments may overlap: a token reads the last segment from this
            position on, and all others before it. What a token sees then does not depend on what it is batched with.
    """

    segments: list[Segment]
    slots: npt.NDArray[np.int64]
    moves: Sequence[Move] = ()
    boundary: npt.NDArray[np.int32] | None = None


def bytes_per_token(spec: ModelSpec, scheme: str) -> int:
    """Bytes that keys and values of one token take in all layers."""
    dim = spec.head_dim
    row = store_row_bytes(dim, scheme) if scheme in STORE_BITS else SCHEMES[scheme].row_bytes(dim)
    return 2 * spec.num_layers * spec.num_kv_heads * row


def store_row_bytes(head_dim: int, scheme: str) -> int:
    """Bytes of one head's key or value in a quantized scheme, without the mean that a block of keys has beside it."""
    return head_dim * STORE_BITS[scheme] // 8 + 2 * (head_dim // store_group(head_dim))


def store_group(head_dim: int) -> int:
    """Values of a head that share a scale in a quantized scheme. Raises `ConfigError` if it cannot be divided."""
    if head_dim % 64 == 0:
        return 64
    if head_dim % 8 or head_dim > 128:
        what = f"head_dim {head_dim} is not divisible by the group of 64 values that share a scale"
        raise ConfigError(f"quantized keys and values: {what}", hint="use a cache policy that keeps floats")
    return head_dim
