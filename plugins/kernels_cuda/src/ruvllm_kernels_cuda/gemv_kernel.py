"""Products of a few activation rows with a packed matrix on the ordinary cores: up to `MOST_ROWS` rows.

A lane owns REPEAT rows of the matrix and a warp one record of each of them at a time, so that all lanes need the same
activations. Nothing converts an integer to a float: bits are put into the mantissa of a number in [1, 2), t = 1 + q/16
for instance, the products with t are summed, and the sum of the activations is taken off once for 32 columns (for 16
where scales are for 16). The lower of two neighbouring codes stands four bits lower, so its activation is multiplied by
16. That makes half a shift, one three-input logical operation (two with high bits) and one multiply-add a weight.

At 3 TB/s an H100 has 5.5 issue slots for each 4.5-bit weight it reads and 8 for a 6.5625-bit one. What is compiled for
it has 4.3 instructions a 4-bit weight with REPEAT 4, nearly one of them for activations, and 7.3 a 6-bit weight with
REPEAT 2, which is what registers allow. A lane has REPEAT 16-byte loads in flight for each chunk, of several chunks at
a time. Two rows of activations cost nearly twice as much; from there on tensor cores (`gemm.py`) should win.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ruvllm_kernels_cuda.blocks import BYTE, CODES, PAIR, byte_at, finish, half_at, mantissa


@triton.jit
def _word(words, j, index: tl.constexpr):
    """Word `index` of the last axis. j is known when compiling, so nothing is left of the sum."""
    return tl.sum(tl.where(j == index, words, 0), axis=4)


@triton.jit
def _code(first, second, third, index: tl.constexpr):
    if index == 15:
        code = ((first >> 30) & 3) | (((second >> 30) & 3) << 2) | (((third >> 30) & 3) << 4)
    elif index < 5:
        code = (first >> (6 * index)) & 63
    elif index < 10:
        code = (second >> (6 * (index - 5))) & 63
    else:
        code = (third >> (6 * (index - 10))) & 63
    return code.to(tl.float32)


@triton.jit
def _pick(first, second, third, fourth, index: tl.constexpr):
    if index == 0:
        return first
    if index == 1:
        return second
    if index == 2:
        return third
    return fourth


@triton.jit
def _scales(
    first,
    second,
    third,
    fourth,
    min0,
    min1,
    min2,
    min3,
    factor,
    factor_min,
    g: tl.constexpr,
    part: tl.constexpr,
    SCALES: tl.constexpr,
    BITS: tl.constexpr,
    UNIT: tl.constexpr,
):
    """Scale times UNIT and minimum of half `part` of the 32 columns of group `g`, from the words of a scale chunk."""
    if SCALES == CODES:
        scale = factor * _code(second, third, fourth, g)
        minimum = factor_min * _code(second, third, fourth, 8 + g)
    elif SCALES == BYTE:
        scale = factor * byte_at(_pick(first, second, third, fourth, g // 2), 2 * (g % 2) + part)
        minimum = scale * ((1 << (BITS - 1)) / UNIT)
    else:
        scale = half_at(_pick(first, second, third, fourth, g // 2), 16 * (g % 2))
        if SCALES == PAIR:
            minimum = -half_at(_pick(min0, min1, min2, min3, g // 2), 16 * (g % 2))
        else:
            minimum = scale * (1 << (BITS - 1))
        scale *= UNIT
    return scale, minimum


@triton.jit
def _inverse_rms(x, x_stride, m, count, columns, eps, M: tl.constexpr, WIDTH: tl.constexpr):
    """1 / sqrt(mean of squares + eps) of each activation row, ``[M]``."""
    total = tl.zeros((M, WIDTH), tl.float32)
    for start in range(0, columns, WIDTH):
        k = start + tl.arange(0, WIDTH)
        keep = (m < count)[:, None] & (k < columns)[None, :]
        value = tl.load(x + m[:, None] * x_stride + k[None, :], mask=keep, other=0.0).to(tl.float32)
        total += value * value
    return tl.rsqrt(tl.sum(total, axis=1) / columns + eps)


@triton.jit
def _activations(x, norm, k, keep, NORM: tl.constexpr):
    value = tl.load(x + k, mask=keep, other=0.0).to(tl.float32)
    if NORM:
        value *= tl.load(norm + k, mask=keep, other=0.0).to(tl.float32)
    return value


@triton.jit
def _row(first, r, lane, rows, REPEAT: tl.constexpr, LANES: tl.constexpr, GATE: tl.constexpr):
    """Row `r` of REPEAT of a lane; of a gated product gates and their values take turns. Beyond the last: `rows`."""
    if GATE < 0:
        row = (first * REPEAT + r) * LANES + lane
    else:
        gate = (first * (REPEAT // 2) + r // 2) * LANES + lane
        row = tl.where(gate < rows // 2, gate + r % 2 * (rows // 2), rows)
    return row


@triton.jit
def blocks_kernel(
    x,
    norm,
    data,
    factors,
    bias,
    residual,
    out,
    partial,
    arrived,
    count,
    rows,
    columns,
    records,
    x_stride,
    residual_stride,
    out_stride,
    eps,
    one,
    SCALES: tl.constexpr,
    BITS: tl.constexpr,
    CHUNKS: tl.constexpr,
    M: tl.constexpr,
    REPEAT: tl.constexpr,
    WARPS: tl.constexpr,
    SPLIT: tl.constexpr,
    NORM: tl.constexpr,
    BIAS: tl.constexpr,
    RESIDUAL: tl.constexpr,
    EVEN: tl.constexpr,
    GATE: tl.constexpr,
):
    HIGH: tl.constexpr = BITS - 4 if BITS < 8 else 0
    SCALE_CHUNKS: tl.constexpr = 2 if SCALES == PAIR else 1
    LOW: tl.constexpr = SCALE_CHUNKS + 2 * HIGH
    WIDTH: tl.constexpr = 16 if BITS == 8 else 32  # columns of a chunk
    PARTS: tl.constexpr = 2 if SCALES == BYTE else 1  # scales of a chunk
    UNIT: tl.constexpr = 256.0 if BITS == 8 else (1 << BITS) * 1.0  # of `mantissa`, of the upper of two codes
    PER: tl.constexpr = 4 // HIGH if HIGH > 0 else 1  # chunks that a chunk of high bits serves

    tile, piece = tl.program_id(0), tl.program_id(1)
    pieces = tl.num_programs(1)
    per = tl.cdiv(records, pieces)
    stop = min(records, (piece + 1) * per)
    m = tl.arange(0, M)
    # Tiles are [32 lanes, WARPS, REPEAT, M, 4 words]. In this order the compiler gives lanes and warps the first two
    # axes and a thread the rest; all tiles have all axes from the start, so that none has to change its layout.
    row = _row(tile, tl.arange(0, REPEAT)[None, :], tl.arange(0, 32)[:, None], rows, REPEAT, 32, GATE)
    n = row[:, None, :, None, None]
    j = tl.arange(0, 4)[None, None, None, None, :]
    m5 = m[None, None, None, :, None]
    chunk_words = rows * 4
    record_words = CHUNKS * rows * 4
    acc = tl.zeros((32, WARPS, REPEAT, M), tl.float32)
    for start in range(piece * per, stop, WARPS):
        record = (start + tl.arange(0, WARPS))[None, :, None, None, None]
        there = (n < rows) & (record < stop)
        words = data + record * record_words + n * 4 + j
        k = record * 256 + j
        xm = x + m5 * x_stride
        xkeep = (m5 < count) & (record < stop)
        scales = tl.load(words, mask=there, other=0)
        first = _word(scales, j, 0)
        second = _word(scales, j, 1)
        third = _word(scales, j, 2)
        fourth = _word(scales, j, 3)
        if SCALES == PAIR:
            minima = tl.load(words + chunk_words, mask=there, other=0)
            min0 = _word(minima, j, 0)
            min1 = _word(minima, j, 1)
            min2 = _word(minima, j, 2)
            min3 = _word(minima, j, 3)
        else:
            min0, min1, min2, min3 = first, first, first, first
        if SCALES == BYTE:
            # Of four records, so that these tiles have the shape and the layout of all others.
            four = tl.load(factors + (record // 4 * rows + n) * 4 + j, mask=there, other=0.0).to(tl.float32)
            factor = tl.sum(tl.where(j == record % 4, four, 0.0), axis=4) * UNIT
            factor_min = factor
        elif SCALES == CODES:
            factor = half_at(first, 0) * UNIT
            factor_min = half_at(first, 16)
        else:
            factor = acc
            factor_min = acc
        for c in tl.static_range(256 // WIDTH):
            w = tl.load(words + (LOW + c) * chunk_words, mask=there, other=0)
            if HIGH > 0:
                if c % PER == 0:
                    h = tl.load(words + (SCALE_CHUNKS + c // PER) * chunk_words, mask=there, other=0)
                high = h >> (HIGH * (c % PER))
            else:
                high = w
            for part in tl.static_range(PARTS):
                p = tl.zeros((32, WARPS, REPEAT, M, 4), tl.float32)
                even = tl.zeros((32, WARPS, 1, M, 4), tl.float32)
                odd = tl.zeros((32, WARPS, 1, M, 4), tl.float32)
                for b in tl.static_range(part * (WIDTH // 4 // PARTS), (part + 1) * (WIDTH // 4 // PARTS)):
                    kb = k + (WIDTH * c + 4 * b)
                    value = _activations(xm, norm, kb, xkeep if EVEN else xkeep & (kb < columns), NORM)
                    if BITS < 8 and b % 2 == 0:  # the lower of two codes: its unit is a sixteenth
                        even += value
                        p += mantissa(w, high, one, b, BITS) * (value * 16)
                    else:
                        odd += value
                        p += mantissa(w, high, one, b, BITS) * value
                minus = even * 16 + odd
                sums = even + odd
                minus = tl.sum(minus, axis=4)
                sums = tl.sum(sums, axis=4)
                scale, minimum = _scales(
                    first, second, third, fourth, min0, min1, min2, min3, factor, factor_min,
                    c * WIDTH // 32, part, SCALES, BITS, UNIT,
                )  # fmt: skip
                acc += scale * (tl.sum(p, axis=4) - minus) - minimum * sums
    total = tl.sum(acc, axis=1)  # [32, REPEAT, M]
    if NORM:
        # Few turns, since each waits for the one before.
        total *= _inverse_rms(x, x_stride, m, count, columns, eps, M, 2048 // M)[None, None, :]
    finish(
        total,
        m[None, None, :],
        row[:, :, None],
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
        SPLIT,
        BIAS,
        RESIDUAL,
        GATE,
    )


@triton.jit
def float_kernel(
    x,
    norm,
    data,
    bias,
    residual,
    out,
    count,
    rows,
    columns,
    x_stride,
    residual_stride,
    out_stride,
    eps,
    M: tl.constexpr,
    REPEAT: tl.constexpr,
    WIDTH: tl.constexpr,
    NORM: tl.constexpr,
    BIAS: tl.constexpr,
    RESIDUAL: tl.constexpr,
    WARPS: tl.constexpr,
    GATE: tl.constexpr,
):
    m = tl.arange(0, M)
    n = _row(tl.program_id(0), tl.arange(0, REPEAT), 0, rows, REPEAT, 1, GATE)
    # Tiles are [REPEAT, M, WIDTH] from the start, as above.
    n3, m3 = n[:, None, None], m[None, :, None]
    row = data + n3.to(tl.int64) * columns
    acc = tl.zeros((REPEAT, M, WIDTH), tl.float32)
    for start in range(0, columns, WIDTH):
        k = start + tl.arange(0, WIDTH)[None, None, :]
        w = tl.load(row + k, mask=(k < columns) & (n3 < rows), other=0.0).to(tl.float32)
        acc += w * _activations(x + m3 * x_stride, norm, k, (k < columns) & (m3 < count), NORM)
    total = tl.sum(acc, axis=2)
    if NORM:
        total *= _inverse_rms(x, x_stride, m, count, columns, eps, M, WIDTH)[None, :]
    finish(
        total[None, :, :],
        m[None, None, :],
        n[None, :, None],
        0,
        0,
        1,
        rows,
        count,
        bias,
        residual,
        out,
        out,
        out,
        residual_stride,
        out_stride,
        False,
        BIAS,
        RESIDUAL,
        GATE,
    )
