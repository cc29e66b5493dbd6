"""Turn encoded blocks back into float32, for every scheme of `ruvllm_core.model.quant.SCHEMES`.

Each scheme has one small function that takes ``n`` blocks apart; the driver feeds it chunks that fit a core's cache,
computes the values, and spreads the chunks over threads (numpy releases the GIL).
The order of float operations is part of the format: results equal the reference decoder bit for bit.
Source: the block layouts of the GGML library (``block_q4_0`` … ``block_q6_K``).
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import numpy.typing as npt

from ruvllm_core.errors import QuantizationError
from ruvllm_core.machine import usable_cpus
from ruvllm_core.model.quant import SCHEMES, QuantTensor

Blocks = npt.NDArray[np.uint8]  # [n, block_bytes]
Floats = npt.NDArray[np.float32]
# Numbers [n, block_size], and the scale and minimum of each of their groups [n, groups], where there are any.
Decoded = tuple[npt.NDArray[Any], Floats | None, Floats | None]

_CHUNK_VALUES = 1 << 16  # 256 KiB of results: stays in L2 while several passes run over it
_THREAD_VALUES = 1 << 20  # below this a thread costs more than it saves


def dequantize(
    tensor: QuantTensor, out: npt.NDArray[np.float32] | None = None, *, threads: int | None = None
) -> Floats:
    """All values of `tensor` as float32 of shape ``tensor.shape``.

    Args:
        out: C-contiguous float32 array of that shape to fill instead of a new one; it is returned.
        threads: upper bound on worker threads; by default one per usable core, and none for small tensors.

    Raises:
        QuantizationError: `out` has another shape, type or layout.
    """
    if out is None:
        out = np.empty(tensor.shape, dtype=np.float32)
    elif out.shape != tensor.shape or out.dtype != np.float32 or not out.flags.c_contiguous:
        raise QuantizationError(f"out must be C-contiguous float32 {tensor.shape}, got {out.dtype} {out.shape}")
    scheme = SCHEMES[tensor.scheme]
    decode = _DECODERS[tensor.scheme]
    # Small blocks add their minimum, which is below zero; super-blocks subtract theirs. A NaN shows the difference.
    combine = np.add if scheme.block_size == 32 else np.subtract
    blocks = np.ascontiguousarray(tensor.data).reshape(-1, scheme.block_bytes)
    values = out.reshape(-1, scheme.block_size)
    step = _CHUNK_VALUES // scheme.block_size

    def run(starts: range) -> None:
        # Damaged scales may overflow or be NaN; the format defines the result, so no warnings.
        with np.errstate(all="ignore"):
            for start in starts:
                numbers, scales, minima = decode(blocks[start : start + step])
                part = values[start : start + step]
                if scales is None:
                    part.reshape(-1)[:] = numbers.reshape(-1)  # numpy is slow on rows of one value
                    continue
                part[...] = numbers
                groups = part.reshape(len(part), scales.shape[1], -1)
                np.multiply(groups, scales[:, :, None], out=groups)
                if minima is not None:
                    combine(groups, minima[:, :, None], out=groups)

    starts = range(0, len(blocks), step)
    workers = min(threads or usable_cpus(), len(starts)) if out.size >= _THREAD_VALUES else 1
    if workers == 1:
        run(starts)
    else:
        with ThreadPoolExecutor(workers) as pool:
            list(pool.map(lambda worker: run(starts[worker::workers]), range(workers)))
    return out


def count_non_finite(tensor: QuantTensor) -> int:
    """How many block scales of `tensor` are NaN or infinite; for float schemes, how many values are.

    Reads only the scales, so it costs a fraction of dequantizing.
    """
    exponent = {"f32": 0x7F800000, "bf16": 0x7F80}.get(tensor.scheme, 0x7C00)
    words = np.ascontiguousarray(tensor.data).view(np.uint32 if tensor.scheme == "f32" else np.uint16)
    blocks = words.reshape(-1, SCHEMES[tensor.scheme].block_bytes // words.itemsize)
    scales = blocks.T[_SCALE_HALVES.get(tensor.scheme, slice(1))]
    # Column by column, of which numpy makes long loops, and in pieces that stay in the cache.
    parts = (column[at : at + _CHUNK_VALUES] for column in scales for at in range(0, len(blocks), _CHUNK_VALUES))
    return sum(int(np.count_nonzero((part & exponent) == exponent)) for part in parts)


# --- helpers -----------------------------------------------------------------------------------------------------


def _half(blocks: Blocks, start: int, count: int = 1) -> Floats:
    """`count` little-endian f16 numbers at byte `start` of each block, as float32 ``[n, count]``."""
    halves: npt.NDArray[np.float16] = np.ascontiguousarray(blocks[:, start : start + 2 * count]).view("<f2")
    return halves.astype(np.float32)


def _nibbles(packed: Blocks, run: int) -> npt.NDArray[np.uint8]:
    """``[n, k]`` bytes → ``[n, 2k]``: of each `run` bytes first the low halves, then the high halves."""
    n, k = packed.shape
    quants = np.empty((n, k // run, 2, run), dtype=np.uint8)
    groups = packed.reshape(n, k // run, run)
    np.bitwise_and(groups, 0x0F, out=quants[:, :, 0])
    np.right_shift(groups, 4, out=quants[:, :, 1])
    return quants.reshape(n, 2 * k)


def _bit_planes(packed: Blocks, shifts: npt.NDArray[np.uint8], mask: int) -> npt.NDArray[np.uint8]:
    """``[n, k]`` bytes → ``[n, len(shifts), k]``: one plane of masked bits per shift."""
    planes: npt.NDArray[np.uint8] = (packed[:, None, :] >> shifts[None, :, None]) & np.uint8(mask)
    return planes


def _packed_scales(blocks: Blocks) -> tuple[Floats, Floats]:
    """Of q4_k and q5_k, which pack eight 6-bit scales and eight 6-bit minima into twelve bytes."""
    first, second, third = blocks[:, 4:8], blocks[:, 8:12], blocks[:, 12:16]
    scales = np.concatenate([first & 0x3F, (third & 0x0F) | ((first >> 2) & 0x30)], axis=1)
    minima = np.concatenate([second & 0x3F, (third >> 4) | ((second >> 2) & 0x30)], axis=1)
    return _half(blocks, 0) * scales.astype(np.float32), _half(blocks, 2) * minima.astype(np.float32)


def _two_bits(packed: Blocks) -> npt.NDArray[np.uint8]:
    """The low or high bits of q2_k, q3_k and q6_k: ``[n, 64]`` bytes → ``[n, 256]``, in two halves of 128 values."""
    return _bit_planes(packed.reshape(-1, 32), _SHIFTS_2, 3).reshape(-1, 256)


_SHIFTS_2 = np.array([0, 2, 4, 6], dtype=np.uint8)
_SHIFTS_1 = np.arange(8, dtype=np.uint8)


# --- one decoder per scheme --------------------------------------------------------------------------------------


def _f32(blocks: Blocks) -> Decoded:
    return blocks.view("<f4"), None, None


def _f16(blocks: Blocks) -> Decoded:
    return blocks.view("<f2"), None, None


def _bf16(blocks: Blocks) -> Decoded:
    return np.left_shift(blocks.view("<u2"), 16, dtype=np.uint32).view(np.float32), None, None


def _q4_0(blocks: Blocks) -> Decoded:
    return _nibbles(blocks[:, 2:], 16).view(np.int8) - np.int8(8), _half(blocks, 0), None


def _q4_1(blocks: Blocks) -> Decoded:
    return _nibbles(blocks[:, 4:], 16), _half(blocks, 0), _half(blocks, 2)


def _five_bits(blocks: Blocks, start: int) -> npt.NDArray[np.uint8]:
    high = np.unpackbits(blocks[:, start : start + 4], axis=1, bitorder="little")
    quants: npt.NDArray[np.uint8] = _nibbles(blocks[:, start + 4 :], 16) | (high << np.uint8(4))
    return quants


def _q5_0(blocks: Blocks) -> Decoded:
    return _five_bits(blocks, 2).view(np.int8) - np.int8(16), _half(blocks, 0), None


def _q5_1(blocks: Blocks) -> Decoded:
    return _five_bits(blocks, 4), _half(blocks, 0), _half(blocks, 2)


def _q8_0(blocks: Blocks) -> Decoded:
    return blocks[:, 2:].view(np.int8), _half(blocks, 0), None


def _q2_k(blocks: Blocks) -> Decoded:
    quants, nibbles = _two_bits(blocks[:, 16:80]), blocks[:, :16]
    scales, minima = (nibbles & 0x0F).astype(np.float32), (nibbles >> 4).astype(np.float32)
    return quants, _half(blocks, 80) * scales, _half(blocks, 82) * minima


def _q3_k(blocks: Blocks) -> Decoded:
    high = _bit_planes(blocks[:, :32], _SHIFTS_1, 1).reshape(-1, 256)
    quants = (_two_bits(blocks[:, 32:96]) | (high << np.uint8(2))).view(np.int8) - np.int8(4)
    packed = blocks[:, 96:108]
    scales = _nibbles(packed[:, :8], 8) | (_bit_planes(packed[:, 8:], _SHIFTS_2, 3).reshape(-1, 16) << np.uint8(4))
    return quants, _half(blocks, 108) * (scales.view(np.int8) - np.int8(32)).astype(np.float32), None


def _q4_k(blocks: Blocks) -> Decoded:
    return _nibbles(blocks[:, 16:], 32), *_packed_scales(blocks)


def _q5_k(blocks: Blocks) -> Decoded:
    high = _bit_planes(blocks[:, 16:48], _SHIFTS_1, 1).reshape(-1, 256)
    return _nibbles(blocks[:, 48:], 32) | (high << np.uint8(4)), *_packed_scales(blocks)


def _q6_k(blocks: Blocks) -> Decoded:
    quants = _nibbles(blocks[:, :128], 64) | (_two_bits(blocks[:, 128:192]) << np.uint8(4))
    scales = _half(blocks, 208) * blocks[:, 192:208].view(np.int8).astype(np.float32)
    return quants.view(np.int8) - np.int8(32), scales, None


_ALL = (_f32, _f16, _bf16, _q4_0, _q4_1, _q5_0, _q5_1, _q8_0, _q2_k, _q3_k, _q4_k, _q5_k, _q6_k)
_DECODERS: dict[str, Callable[[Blocks], Decoded]] = {decoder.__name__[1:]: decoder for decoder in _ALL}
# The 16-bit words of a block that are f16 scales; where absent, the first.
_SCALE_HALVES = {
    **dict.fromkeys(("q4_1", "q5_1", "q4_k", "q5_k"), slice(2)),
    "q2_k": slice(40, 42),
    "q3_k": slice(54, 55),
    "q6_k": slice(104, 105),
}
