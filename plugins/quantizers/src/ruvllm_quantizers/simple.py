"""Encoders of the float schemes and of the 32-value blocks q4_0 … q8_0.

These have no search: scale and minimum follow from the extremes of a block, so the bytes are defined by the format and
equal those of other tools. Every function takes float32 ``[n, block_size]`` and returns uint8 ``[n, block_bytes]``.
Source: the reference encoders of the GGML library, as described by the GGUF specification's type table.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from .packing import Bytes, pack_nibbles

Floats = npt.NDArray[np.float32]


def encode_f32(blocks: Floats) -> Bytes:
    return np.ascontiguousarray(blocks, dtype="<f4").view(np.uint8)


def encode_f16(blocks: Floats) -> Bytes:
    return blocks.astype("<f2").view(np.uint8)


def encode_bf16(blocks: Floats) -> Bytes:
    """Round to nearest, ties to even. Inputs are finite, so the carry cannot run into a NaN."""
    bits = np.ascontiguousarray(blocks).view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    encoded: Bytes = rounded.astype("<u2").view(np.uint8)
    return encoded


def encode_q4_0(blocks: Floats) -> Bytes:
    scale, quants = _signed(blocks, 8)
    return np.concatenate([scale, pack_nibbles(quants, 16)], axis=1)


def encode_q4_1(blocks: Floats) -> Bytes:
    scale, minimum, quants = _affine(blocks, 15)
    return np.concatenate([scale, minimum, pack_nibbles(quants, 16)], axis=1)


def encode_q5_0(blocks: Floats) -> Bytes:
    scale, quants = _signed(blocks, 16)
    return np.concatenate([scale, _fifth_bits(quants), pack_nibbles(quants & np.uint8(15), 16)], axis=1)


def encode_q5_1(blocks: Floats) -> Bytes:
    scale, minimum, quants = _affine(blocks, 31)
    return np.concatenate([scale, minimum, _fifth_bits(quants), pack_nibbles(quants & np.uint8(15), 16)], axis=1)


def encode_q8_0(blocks: Floats) -> Bytes:
    scale = np.abs(blocks).max(axis=1, keepdims=True) / np.float32(127)
    scaled = blocks * inverse(scale)
    size = np.abs(scaled)
    whole = np.floor(size)
    rounded = whole + (size - whole >= 0.5)  # halves go away from zero
    quants = np.copysign(rounded, scaled).astype(np.int8).view(np.uint8)
    return np.concatenate([half_bytes(scale), quants], axis=1)


def inverse(scale: Floats) -> Floats:
    """``1 / scale``, and 0 where that is not a finite number: such a scale is 0 in half precision anyway."""
    with np.errstate(divide="ignore", over="ignore"):
        result: Floats = np.float32(1) / scale
    result[~np.isfinite(result)] = 0
    return result


def half_bytes(values: Floats) -> Bytes:
    """``[n, k]`` numbers as f16, ``[n, 2k]`` bytes."""
    return values.astype("<f2").view(np.uint8)


def _signed(blocks: Floats, half: int) -> tuple[Bytes, Bytes]:
    """The value farthest from zero becomes ``-half``; quants are stored with `half` added."""
    index = np.abs(blocks).argmax(axis=1)[:, None]
    scale = np.take_along_axis(blocks, index, axis=1) / np.float32(-half)
    quants = (blocks * inverse(scale) + np.float32(half + 0.5)).astype(np.uint8)
    return half_bytes(scale), np.minimum(quants, np.uint8(2 * half - 1))


def _affine(blocks: Floats, levels: int) -> tuple[Bytes, Bytes, Bytes]:
    """The least value becomes 0, the greatest `levels`."""
    minimum = blocks.min(axis=1, keepdims=True)
    scale = (blocks.max(axis=1, keepdims=True) - minimum) / np.float32(levels)
    quants = ((blocks - minimum) * inverse(scale) + np.float32(0.5)).astype(np.uint8)
    return half_bytes(scale), half_bytes(minimum), np.minimum(quants, np.uint8(levels))


def _fifth_bits(quants: Bytes) -> Bytes:
    return np.packbits(quants >> np.uint8(4), axis=1, bitorder="little")
