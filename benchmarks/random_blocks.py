"""Random weights in any scheme, drawn as encoded blocks: no float is ever quantized, so gigabytes take seconds.

Numbers are uniform over what the block's integers can hold, and every block has a scale of its own, such that the
decoded values have mean zero and the standard deviation that is asked for. Source: the block layouts of the GGML
library.
"""

from __future__ import annotations

from collections.abc import Callable
from math import sqrt
from typing import Any

import numpy as np
import numpy.typing as npt

from ruvllm_core.model.quant import SCHEMES
from ruvllm_quantizers.packing import Bytes, pack_scale_min, pack_six_bit_scales

_Rng = np.random.Generator
_Floats = npt.NDArray[np.float32]
_SPREAD = 0.25  # block scales differ by up to this share


def random_blocks(scheme: str, count: int, std: float, rng: _Rng) -> Bytes:
    """`count` blocks, ``[count, block_bytes]``, whose values have mean 0 and standard deviation `std`."""
    if scheme in _FLOATS:
        return _FLOATS[scheme](rng.standard_normal(count, dtype=np.float32) * np.float32(std))
    blocks = np.frombuffer(bytearray(rng.bytes(count * SCHEMES[scheme].block_bytes)), dtype=np.uint8)
    blocks = blocks.reshape(count, -1)
    # The mean square of uniform numbers between 1 - s and 1 + s is 1 + s²/3.
    scales = rng.uniform(1 - _SPREAD, 1 + _SPREAD, count).astype(np.float32) * (std / sqrt(1 + _SPREAD**2 / 3))
    _QUANTIZED[scheme](blocks, scales, rng)
    return blocks


def _f32(values: _Floats) -> Bytes:
    return values.view(np.uint8).reshape(-1, 4)


def _f16(values: _Floats) -> Bytes:
    return values.astype(np.float16).view(np.uint8).reshape(-1, 2)


def _bf16(values: _Floats) -> Bytes:
    return (values.view(np.uint32) >> 16).astype(np.uint16).view(np.uint8).reshape(-1, 2)


def _symmetric(levels: int) -> Callable[[Bytes, _Floats, _Rng], None]:
    """One f16 scale in front, of either sign: the integers reach one further below zero than above."""

    def fill(blocks: Bytes, scales: _Floats, rng: _Rng) -> None:
        _put_half(blocks, 0, scales * _signs(rng, len(blocks)) / _rms(levels))

    return fill


def _q8_0(blocks: Bytes, scales: _Floats, rng: _Rng) -> None:
    _symmetric(255)(blocks, scales, rng)
    numbers = blocks[:, 2:].view(np.int8)
    np.maximum(numbers, -127, out=numbers)  # no encoder writes -128


def _with_minimum(levels: int) -> Callable[[Bytes, _Floats, _Rng], None]:
    """An f16 scale and the smallest value in front."""

    def fill(blocks: Bytes, scales: _Floats, rng: _Rng) -> None:
        steps = scales / _std(levels)
        _put_half(blocks, 0, steps)
        _put_half(blocks, 2, -steps * (levels - 1) / 2)

    return fill


def _packed_scale_min(levels: int) -> Callable[[Bytes, _Floats, _Rng], None]:
    """q4_k and q5_k: eight 6-bit scales and minima, equal, so that each group's values have mean 0."""

    def fill(blocks: Bytes, scales: _Floats, rng: _Rng) -> None:
        inner, size = _inner(rng, (len(blocks), 8), 63)
        steps = scales / (_std(levels) * size)
        _put_half(blocks, 0, steps)
        _put_half(blocks, 2, steps * (levels - 1) / 2)
        blocks[:, 4:16] = pack_scale_min(inner, inner)

    return fill


def _q2_k(blocks: Bytes, scales: _Floats, rng: _Rng) -> None:
    inner, size = _inner(rng, (len(blocks), 16), 15)
    blocks[:, :16] = inner | (inner << np.uint8(4))
    steps = scales / (_std(4) * size)
    _put_half(blocks, 80, steps)
    _put_half(blocks, 82, steps * 1.5)


def _q3_k(blocks: Bytes, scales: _Floats, rng: _Rng) -> None:
    inner, size = _inner(rng, (len(blocks), 16), 31)
    signed = inner.view(np.int8) * _signs(rng, inner.shape)
    blocks[:, 96:108] = pack_six_bit_scales((signed + np.int8(32)).view(np.uint8))
    _put_half(blocks, 108, scales / (_rms(8) * size))


def _q6_k(blocks: Bytes, scales: _Floats, rng: _Rng) -> None:
    inner, size = _inner(rng, (len(blocks), 16), 127)
    blocks[:, 192:208] = (inner.view(np.int8) * _signs(rng, inner.shape)).view(np.uint8)
    _put_half(blocks, 208, scales / (_rms(64) * size))


def _inner(rng: _Rng, shape: tuple[int, int], top: int) -> tuple[Bytes, float]:
    """The integer scales of a super-block's groups, from `top` / 4 on; and the root of their mean square."""
    choices = np.arange(top // 4, top + 1)
    inner: Bytes = rng.integers(choices[0], top, shape, dtype=np.uint8, endpoint=True)
    return inner, float(np.sqrt((choices**2).mean()))


def _std(levels: int) -> float:
    """Standard deviation of integers uniform over `levels` values."""
    return sqrt((levels**2 - 1) / 12)


def _rms(levels: int) -> float:
    """Root mean square of integers uniform over `levels` values, of which one more is below zero than above."""
    return sqrt((levels**2 - 1) / 12 + (0.25 if levels % 2 == 0 else 0.0))


def _signs(rng: _Rng, shape: int | tuple[int, ...]) -> npt.NDArray[np.int8]:
    return np.where(rng.integers(0, 2, shape, dtype=np.bool_), np.int8(1), np.int8(-1))


def _put_half(blocks: Bytes, offset: int, values: npt.NDArray[np.floating[Any]]) -> None:
    blocks[:, offset : offset + 2] = values.astype("<f2").view(np.uint8).reshape(-1, 2)


_FLOATS: dict[str, Callable[[_Floats], Bytes]] = {"f32": _f32, "f16": _f16, "bf16": _bf16}
_QUANTIZED: dict[str, Callable[[Bytes, _Floats, _Rng], None]] = {
    "q4_0": _symmetric(16),
    "q4_1": _with_minimum(16),
    "q5_0": _symmetric(32),
    "q5_1": _with_minimum(32),
    "q8_0": _q8_0,
    "q2_k": _q2_k,
    "q3_k": _q3_k,
    "q4_k": _packed_scale_min(16),
    "q5_k": _packed_scale_min(32),
    "q6_k": _q6_k,
}
