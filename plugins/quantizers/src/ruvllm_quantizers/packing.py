"""Pack small integers into the bit layouts of GGUF blocks: the inverse of what `ruvllm_core.model.dequant` unpacks.

Everywhere ``n`` is a number of blocks, and arrays are uint8.
Source: the block layouts of the GGML library.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Bytes = npt.NDArray[np.uint8]


def pack_nibbles(quants: Bytes, run: int) -> Bytes:
    """``[n, 2k]`` values below 16 → ``[n, k]``; of each ``2 * run`` values the second half becomes the high nibbles."""
    groups = quants.reshape(len(quants), -1, 2, run)
    packed: Bytes = groups[:, :, 0] | (groups[:, :, 1] << np.uint8(4))
    return packed.reshape(len(quants), groups.shape[1] * run)


def pack_planes(quants: Bytes, planes: int, bits: int) -> Bytes:
    """``[n, planes * k]`` values below ``2**bits`` → ``[n, k]``; plane ``p`` is shifted left by ``p * bits``."""
    parts = quants.reshape(len(quants), planes, -1)
    packed: Bytes = parts[:, 0].copy()
    for plane in range(1, planes):
        packed |= parts[:, plane] << np.uint8(plane * bits)
    return packed


def pack_scale_min(scales: Bytes, minima: Bytes) -> Bytes:
    """Eight 6-bit scales and eight 6-bit minima, each ``[n, 8]``, → ``[n, 12]``, as q4_k and q5_k store them."""
    first = scales[:, :4] | ((scales[:, 4:] >> np.uint8(4)) << np.uint8(6))
    second = minima[:, :4] | ((minima[:, 4:] >> np.uint8(4)) << np.uint8(6))
    third = (scales[:, 4:] & np.uint8(0x0F)) | ((minima[:, 4:] & np.uint8(0x0F)) << np.uint8(4))
    return np.concatenate([first, second, third], axis=1)


def pack_six_bit_scales(scales: Bytes) -> Bytes:
    """Sixteen 6-bit scales ``[n, 16]`` → ``[n, 12]``, as q3_k stores them."""
    low = pack_nibbles(scales & np.uint8(0x0F), 8)
    return np.concatenate([low, pack_planes(scales >> np.uint8(4), 4, 2)], axis=1)
