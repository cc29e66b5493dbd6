"""What every kernel over packed weights needs: scales, whole tiles of weights, and the end of a product.

The layout is that of `packing.py`. A tile costs about eight instructions a weight, which the rows of activations that
share it pay together; single rows have their own way in `gemv.py`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ruvllm_kernels_cuda import packing
from ruvllm_kernels_cuda.gated import opened

CODES = tl.constexpr(packing.CODES)
HALF = tl.constexpr(packing.HALF)
PAIR = tl.constexpr(packing.PAIR)
BYTE = tl.constexpr(packing.BYTE)

#: The bits of 1.0, which kernels get as an argument; see `mantissa`.
ONE = 0x3F800000


@triton.jit
def half_at(word, shift):
    """The f16 in 16 bits of an int32 from bit `shift` on, as float32."""
    return ((word >> shift) & 0xFFFF).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def byte_at(word, index):
    """Byte `index` of an int32, with its sign, as float32."""
    return ((word << (24 - 8 * index)) >> 24).to(tl.float32)


@triton.jit
def code_at(first, second, third, index):
    """6-bit code `index` of sixteen: five a word, and of the last one two bits a word."""
    word = tl.where(index < 5, first, tl.where(index < 10, second, third))
    last = ((first >> 30) & 3) | (((second >> 30) & 3) << 2) | (((third >> 30) & 3) << 4)
    return tl.where(index == 15, last, (word >> (6 * (index % 5))) & 63).to(tl.float32)


@triton.jit
def group_scales(record, factors, g, part, keep, SCALES: tl.constexpr, BITS: tl.constexpr, CHUNK_WORDS):
    """Scale and minimum of groups `g` of 32 columns, or of half `part` of them.

    Args:
        record: pointers to the first word of a record ``[n, 1]``.
        factors: pointers to the f16 factors ``[n, 1]``, of `BYTE` scales.
        g: ``[1, G]``.
        keep: which rows there are ``[n, 1]``.
        CHUNK_WORDS: words from a chunk of a row to its next chunk.
    """
    if SCALES == CODES:
        both = tl.load(record, mask=keep, other=0)
        first = tl.load(record + 1, mask=keep, other=0)
        second = tl.load(record + 2, mask=keep, other=0)
        third = tl.load(record + 3, mask=keep, other=0)
        scale = half_at(both, 0) * code_at(first, second, third, g)
        minimum = half_at(both, 16) * code_at(first, second, third, g + 8)
    elif SCALES == BYTE:
        word = tl.load(record + g // 2, mask=keep, other=0)
        factor = tl.load(factors, mask=keep, other=0.0).to(tl.float32)
        scale = factor * byte_at(word, 2 * (g % 2) + part)
        minimum = scale * (1 << (BITS - 1))
    else:
        scale = half_at(tl.load(record + g // 2, mask=keep, other=0), 16 * (g % 2))
        if SCALES == PAIR:
            minimum = -half_at(tl.load(record + CHUNK_WORDS + g // 2, mask=keep, other=0), 16 * (g % 2))
        else:
            minimum = scale * (1 << (BITS - 1))
    return scale, minimum


@triton.jit
def shifted(word, left: tl.constexpr):
    """Bits moved up by `left`, or down where that is negative."""
    if left >= 0:
        return word << left
    return word >> -left


@triton.jit
def mantissa(low, high, one, b: tl.constexpr, BITS: tl.constexpr):
    """Codes of columns 4b + j as numbers in [1, 2): 1 + q / `mantissa_unit`.

    Bits that are put into the mantissa of a float need no conversion from integers, of which a multiprocessor does half
    as many as additions. Two neighbouring codes share one shift.

    Args:
        high: words with the high bits of b = 0 in bit 0, of b = 1 in bit 4; read where BITS is 5 or 6.
        one: the bits of 1.0 in a variable: a logical operation takes one constant, and that is the mask. Not knowing
            it, the compiler cannot reorder the operations into more of them either.
    """
    if BITS == 8:
        bits = (shifted(low, 15 - 8 * b) & (255 << 15)) | one
    else:
        BASE: tl.constexpr = 19 - BITS  # where the lower of two codes starts
        bits = (shifted(low, BASE - 8 * (b // 2)) & (15 << (BASE + 4 * (b % 2)))) | one
        if BITS > 4:
            TOP: tl.constexpr = ((1 << (BITS - 4)) - 1) << (BASE + 4)
            bits = (shifted(high, BASE + 4 - 8 * (b // 2)) & (TOP << (4 * (b % 2)))) ^ bits  # where bits are zero
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def tile_part(low, high, one, scale, minimum, b: tl.constexpr, BITS: tl.constexpr, TYPE: tl.constexpr):
    """Columns 4b + j of each chunk ``[n, chunks, 4]``."""
    if BITS == 8:
        unit = scale * 256.0
    elif b % 2 == 0:
        unit = scale * (1 << (BITS + 4))
    else:
        unit = scale * (1 << BITS)
    return (mantissa(low, high, one, b, BITS) * unit - (unit + minimum)).to(TYPE)


@triton.jit
def quads(first, second, third, fourth):
    """Four tiles ``[n, G, 4]`` as ``[n, G, 4, 2, 2]``, the last two axes counting them."""
    return tl.join(tl.join(first, third), tl.join(second, fourth))


@triton.jit
def weights_tile(
    data,
    factors,
    record,
    g0,
    n,
    keep,
    rows,
    one,
    SCALES: tl.constexpr,
    BITS: tl.constexpr,
    CHUNKS: tl.constexpr,
    GROUPS: tl.constexpr,
    TYPE: tl.constexpr,
):
    """Weights of rows `n` in columns ``256 record + 32 g0`` and the ``32 GROUPS`` from there, ``[n, 32 GROUPS]``.

    Args:
        n: int32 ``[n]``, any rows in any order; where `keep` is false zeros are returned.
        rows: of the packed part.
        one: see `mantissa`.
    """
    chunk_words = rows * 4
    BLOCK: tl.constexpr = n.shape[0]
    start = record * (CHUNKS * rows * 4)
    row = data + start + n * 4
    g = (g0 + tl.arange(0, GROUPS))[None, :]
    f = factors + (record // 4 * rows + n) * 4 + record % 4
    j = tl.arange(0, 4)[None, None, :]
    keep3 = keep[:, None, None]
    scale, minimum = group_scales(row[:, None], f[:, None], g, 0, keep[:, None], SCALES, BITS, chunk_words)
    scale, minimum = scale[:, :, None], minimum[:, :, None]
    SCALE_CHUNKS: tl.constexpr = 2 if SCALES == PAIR else 1
    if BITS == 8:
        chunk = 2 * g0 + tl.arange(0, 2 * GROUPS)[None, :]
        at = row[:, None, None] + (SCALE_CHUNKS + chunk)[:, :, None] * chunk_words + j
        words = tl.load(at, mask=keep3, other=0)
        # Two chunks of 16 columns share a scale.
        scale = tl.broadcast_to(scale, (BLOCK, GROUPS, 2)).reshape(BLOCK, 2 * GROUPS, 1)
        minimum = tl.broadcast_to(minimum, (BLOCK, GROUPS, 2)).reshape(BLOCK, 2 * GROUPS, 1)
        v0 = tile_part(words, words, one, scale, minimum, 0, BITS, TYPE)
        v1 = tile_part(words, words, one, scale, minimum, 1, BITS, TYPE)
        v2 = tile_part(words, words, one, scale, minimum, 2, BITS, TYPE)
        v3 = tile_part(words, words, one, scale, minimum, 3, BITS, TYPE)
        values = quads(v0, v1, v2, v3).permute(0, 1, 3, 4, 2)
    else:
        HIGH: tl.constexpr = BITS - 4
        at = row[:, None, None] + (SCALE_CHUNKS + 2 * HIGH + g)[:, :, None] * chunk_words + j
        low = tl.load(at, mask=keep3, other=0)
        if BITS > 4:
            at = row[:, None, None] + (SCALE_CHUNKS + g // (4 // HIGH))[:, :, None] * chunk_words + j
            high = tl.load(at, mask=keep3, other=0) >> (HIGH * (g % (4 // HIGH)))[:, :, None]
        else:
            high = low
        v0 = tile_part(low, high, one, scale, minimum, 0, BITS, TYPE)
        v1 = tile_part(low, high, one, scale, minimum, 1, BITS, TYPE)
        v2 = tile_part(low, high, one, scale, minimum, 2, BITS, TYPE)
        v3 = tile_part(low, high, one, scale, minimum, 3, BITS, TYPE)
        if SCALES == BYTE:  # the second 16 columns have a scale of their own
            scale, minimum = group_scales(row[:, None], f[:, None], g, 1, keep[:, None], SCALES, BITS, chunk_words)
            scale, minimum = scale[:, :, None], minimum[:, :, None]
        v4 = tile_part(low, high, one, scale, minimum, 4, BITS, TYPE)
        v5 = tile_part(low, high, one, scale, minimum, 5, BITS, TYPE)
        v6 = tile_part(low, high, one, scale, minimum, 6, BITS, TYPE)
        v7 = tile_part(low, high, one, scale, minimum, 7, BITS, TYPE)
        both = tl.join(quads(v0, v1, v2, v3), quads(v4, v5, v6, v7))
        values = both.permute(0, 1, 5, 3, 4, 2)
    return values.reshape(BLOCK, 32 * GROUPS)


@triton.jit
def _gated_rows(total, n, KIND: tl.constexpr):
    """Of rows ``[L, R, M]`` that are gates and their values in turns ``[L, R/2, M]``, and the gates' indices."""
    LANES: tl.constexpr = total.shape[0]
    PAIRS: tl.constexpr = total.shape[1] // 2
    pairs = total.reshape(LANES, PAIRS, 2, total.shape[2])
    which = tl.arange(0, 2)[None, None, :, None]
    gate = tl.sum(tl.where(which == 0, pairs, 0.0), axis=2)
    value = tl.sum(tl.where(which == 1, pairs, 0.0), axis=2)
    return opened(gate, value, KIND), tl.min(n.reshape(LANES, PAIRS, 2, 1), axis=2)


@triton.jit
def store_rows(
    total,
    m,
    n,
    rows,
    count,
    bias,
    residual,
    out,
    residual_stride,
    out_stride,
    BIAS: tl.constexpr,
    RESIDUAL: tl.constexpr,
    GATE: tl.constexpr,
):
    """Write ``total + bias[n] + residual[m, n]`` to ``out[m, n]``; m and n are indices that broadcast to `total`."""
    keep = (m < count) & (n < rows)
    if BIAS:
        total += tl.load(bias + n, mask=keep, other=0.0).to(tl.float32)
    if GATE >= 0:
        total, n = _gated_rows(total, n, GATE)
        keep = (m < count) & (n < rows // 2)
    if RESIDUAL:
        total += tl.load(residual + m * residual_stride + n, mask=keep, other=0.0).to(tl.float32)
    tl.store(out + m * out_stride + n, total.to(out.dtype.element_ty), mask=keep)


@triton.jit
def finish(
    total,
    m,
    n,
    tile,
    piece,
    pieces,
    rows,
    count,
    bias,
    residual,
    out,
    partial,
    arrived,
    residual_stride,
    out_stride,
    SPLIT: tl.constexpr,
    BIAS: tl.constexpr,
    RESIDUAL: tl.constexpr,
    GATE: tl.constexpr,
):
    """End of a product whose columns were cut into `pieces`.

    The last program to arrive at a tile adds up the pieces, always from the first to the last, so the result does not
    depend on who that is; it also leaves the tile's counter at zero for the next launch.

    Args:
        m, n: indices of activations and of rows of the matrix.
        tile, piece: which counter, which piece.
        SPLIT: whether there are several.
        rows, count: how many rows and activations there are.
        GATE: which activation the first half of the rows gates the second with, see `_gated_rows`; -1 is none.
    """
    keep = (m < count) & (n < rows)
    if not SPLIT:
        store_rows(total, m, n, rows, count, bias, residual, out, residual_stride, out_stride, BIAS, RESIDUAL, GATE)
    else:
        at = partial + m * rows + n
        tl.store(at + piece * (count * rows), total, mask=keep)
        tl.debug_barrier()  # all of this program's sums are written before it says so
        before = tl.atomic_add(arrived + tile, 1, sem="acq_rel", scope="gpu")
        if before == pieces - 1:
            summed = tl.zeros_like(total)
            for i in range(pieces):
                # Past the first-level cache, which does not know what other programs wrote.
                summed += tl.load(at + i * (count * rows), mask=keep, other=0.0, cache_modifier=".cg")
            store_rows(
                summed, m, n, rows, count, bias, residual, out, residual_stride, out_stride, BIAS, RESIDUAL, GATE
            )
            tl.store(arrived + tile, 0)
