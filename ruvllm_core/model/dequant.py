"""Turn encoded blocks back into float32, for every scheme of `ruvllm_core.model.quant.SCHEMES`.

Each scheme has one small function that decodes ``n`` blocks into an ``[n, block_size]`` slice of the result; the
driver feeds it chunks that fit a core's cache and spreads the chunks over threads (numpy releases the GIL).
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
Floats = npt.NDArray[np.float32]  # [n, block_size], or a whole tensor

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
    blocks = np.ascontiguousarray(tensor.data).reshape(-1, scheme.block_bytes)
    values = out.reshape(-1, scheme.block_size)
    step = _CHUNK_VALUES // scheme.block_size

    def run(starts: range) -> None:
        # Damaged scales may overflow or be NaN; the format defines the result, so no warnings.
        with np.errstate(all="ignore"):
            for start in starts:
                decode(blocks[start : start + step], values[start : start + step])

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
    data = np.ascontiguousarray(tensor.data)
    if tensor.scheme == "f32":
        return int(np.count_nonzero(~np.isfinite(data.reshape(-1).view(np.float32))))
    exponent = 0x7F80 if tensor.scheme == "bf16" else 0x7C00
    halves = data.view(np.uint16).reshape(-1, SCHEMES[tensor.scheme].block_bytes // 2)
    scales = halves[:, _SCALE_HALVES.get(tensor.scheme, slice(1))]
    return int(np.count_nonzero((scales & exponent) == exponent))


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


def _scale(out: Floats, scales: Floats) -> npt.NDArray[Any]:
    """Multiply ``out[n, s * size]`` in place by ``scales[n, s]``; returns the ``[n, s, size]`` view."""
    groups = out.reshape(len(out), scales.shape[1], -1)
    np.multiply(groups, scales[:, :, None], out=groups)
    return groups


def _shift(out: Floats, blocks: Blocks) -> None:
    """Multiply 32-value blocks in place by their first f16 number, then add their second."""
    scale_min = _half(blocks, 0, 2)
    np.multiply(out, scale_min[:, :1], out=out)
    np.add(out, scale_min[:, 1:], out=out)


def _scale_less_min(out: Floats, super_scales: Floats, scales: npt.NDArray[Any], minima: npt.NDArray[Any]) -> None:
    """Multiply the groups of 256-value blocks in place by their `scales`, then subtract their `minima`.

    Both are integers ``[n, groups]`` in units of the two `super_scales`, ``[n, 2]``.
    """
    groups = _scale(out, super_scales[:, :1] * scales.astype(np.float32))
    np.subtract(groups, (super_scales[:, 1:] * minima.astype(np.float32))[:, :, None], out=groups)


def _scale_less_packed_min(out: Floats, blocks: Blocks) -> None:
    """The same for q4_k and q5_k, which pack eight 6-bit scales and eight 6-bit minima into twelve bytes."""
    first, second, third = blocks[:, 4:8], blocks[:, 8:12], blocks[:, 12:16]
    scales = np.concatenate([first & 0x3F, (third & 0x0F) | ((first >> 2) & 0x30)], axis=1)
    minima = np.concatenate([second & 0x3F, (third >> 4) | ((second >> 2) & 0x30)], axis=1)
    _scale_less_min(out, _half(blocks, 0, 2), scales, minima)


_SHIFTS_2 = np.array([0, 2, 4, 6], dtype=np.uint8)
_SHIFTS_1 = np.arange(8, dtype=np.uint8)


# --- one decoder per scheme --------------------------------------------------------------------------------------


def _f32(blocks: Blocks, out: Floats) -> None:
    out.reshape(-1)[:] = blocks.reshape(-1).view("<f4")  # numpy is slow on rows of one value


def _f16(blocks: Blocks, out: Floats) -> None:
    out.reshape(-1)[:] = blocks.reshape(-1).view("<f2")


def _bf16(blocks: Blocks, out: Floats) -> None:
    np.left_shift(blocks.reshape(-1).view("<u2"), 16, out=out.reshape(-1).view(np.uint32), dtype=np.uint32)


def _q4_0(blocks: Blocks, out: Floats) -> None:
    np.subtract(_nibbles(blocks[:, 2:], 16).view(np.int8), 8, out=out)
    _scale(out, _half(blocks, 0))


def _q4_1(blocks: Blocks, out: Floats) -> None:
    out[...] = _nibbles(blocks[:, 4:], 16)
    _shift(out, blocks)


def _five_bits(blocks: Blocks, start: int) -> npt.NDArray[np.uint8]:
    high = np.unpackbits(blocks[:, start : start + 4], axis=1, bitorder="little")
    quants: npt.NDArray[np.uint8] = _nibbles(blocks[:, start + 4 :], 16) | (high << np.uint8(4))
    return quants


def _q5_0(blocks: Blocks, out: Floats) -> None:
    np.subtract(_five_bits(blocks, 2).view(np.int8), 16, out=out)
    _scale(out, _half(blocks, 0))


def _q5_1(blocks: Blocks, out: Floats) -> None:
    out[...] = _five_bits(blocks, 4)
    _shift(out, blocks)


def _q8_0(blocks: Blocks, out: Floats) -> None:
    out[...] = blocks[:, 2:].view(np.int8)
    _scale(out, _half(blocks, 0))


def _q2_k(blocks: Blocks, out: Floats) -> None:
    n = len(blocks)
    packed = blocks[:, 16:80].reshape(2 * n, 32)  # two halves of 128 values
    out[...] = _bit_planes(packed, _SHIFTS_2, 3).reshape(n, 256)
    nibbles = blocks[:, :16]
    _scale_less_min(out, _half(blocks, 80, 2), nibbles & 0x0F, nibbles >> 4)


def _q3_k(blocks: Blocks, out: Floats) -> None:
    n = len(blocks)
    low = _bit_planes(blocks[:, 32:96].reshape(2 * n, 32), _SHIFTS_2, 3).reshape(n, 256)
    high = _bit_planes(blocks[:, :32], _SHIFTS_1, 1).reshape(n, 256)
    np.subtract((low | (high << np.uint8(2))).view(np.int8), 4, out=out)
    packed = blocks[:, 96:108]
    scales = _nibbles(packed[:, :8], 8) | (_bit_planes(packed[:, 8:], _SHIFTS_2, 3).reshape(n, 16) << np.uint8(4))
    _scale(out, _half(blocks, 108) * (scales.view(np.int8) - np.int8(32)).astype(np.float32))


def _q4_k(blocks: Blocks, out: Floats) -> None:
    out[...] = _nibbles(blocks[:, 16:], 32)
    _scale_less_packed_min(out, blocks)


def _q5_k(blocks: Blocks, out: Floats) -> None:
    high = _bit_planes(blocks[:, 16:48], _SHIFTS_1, 1).reshape(len(blocks), 256)
    out[...] = _nibbles(blocks[:, 48:], 32) | (high << np.uint8(4))
    _scale_less_packed_min(out, blocks)


def _q6_k(blocks: Blocks, out: Floats) -> None:
    n = len(blocks)
    low = _nibbles(blocks[:, :128], 64)
    high = _bit_planes(blocks[:, 128:192].reshape(2 * n, 32), _SHIFTS_2, 3).reshape(n, 256)
    np.subtract((low | (high << np.uint8(4))).view(np.int8), 32, out=out)
    _scale(out, _half(blocks, 208) * blocks[:, 192:208].view(np.int8).astype(np.float32))


_DECODERS: dict[str, Callable[[Blocks, Floats], None]] = {
    "f32": _f32,
    "f16": _f16,
    "bf16": _bf16,
    "q4_0": _q4_0,
    "q4_1": _q4_1,
    "q5_0": _q5_0,
    "q5_1": _q5_1,
    "q8_0": _q8_0,
    "q2_k": _q2_k,
    "q3_k": _q3_k,
    "q4_k": _q4_k,
    "q5_k": _q5_k,
    "q6_k": _q6_k,
}
# The 16-bit words of a block that are f16 scales; where absent, the first.
_SCALE_HALVES = {
    **dict.fromkeys(("q4_1", "q5_1", "q4_k", "q5_k"), slice(2)),
    "q2_k": slice(40, 42),
    "q3_k": slice(54, 55),
    "q6_k": slice(104, 105),
}
