"""The inner loops of attention: online softmax (arXiv 2205.14135) over tiles of keys and values in one segment.

A program holds some query rows of one key/value head: row r of a sequence is query head ``r % GROUP`` of its token
``r // GROUP``, so all query heads of a key/value head read each tile once, as rows of one matrix product. Scores are
in base 2 (the scale has log2 e in it), since ``exp2`` is one instruction.
"""

from __future__ import annotations

import os

import triton
import triton.language as tl

#: Triton's interpreter multiplies bfloat16 as if it were integers; in float32 the products are the same.
INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET", "0") == "1")
LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def dot(a, b, into):
    """``into + a @ b``, accumulated in float32."""
    if INTERPRETED:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), into, input_precision="ieee")
    return tl.dot(a, b, into, input_precision="ieee")


@triton.jit
def _scaled(scores, scale, SOFTCAP: tl.constexpr):
    """Scores times `scale` and through the cap, in base 2."""
    scores = scores * scale
    if SOFTCAP > 0.0:
        # tanh(x) = 2 sigmoid(2x) - 1
        scores = SOFTCAP * (2.0 * tl.sigmoid(scores * (2.0 / SOFTCAP)) - 1.0)
    return scores * LOG2E


@triton.jit
def _visible(at, inside, positions, bounds, WINDOW: tl.constexpr, BOUNDED: tl.constexpr, NEWEST: tl.constexpr):
    """Which key at position `at` ``[BN]`` each row may see, ``[R, BN]``."""
    distance = positions[:, None] - at[None, :]
    seen = (distance >= 0) & inside[None, :]
    if WINDOW > 0:
        seen = seen & (distance < WINDOW)
    if BOUNDED:
        older = at[None, :] < bounds[:, None]
        seen = seen & ((older == 0) if NEWEST else older)
    return seen


@triton.jit
def _softmax_step(scores, best, total):
    """New running maximum and sum, the tile's weights, and the factor on what was accumulated."""
    top = tl.maximum(best, tl.max(scores, 1))
    finite = tl.where(top == float("-inf"), 0.0, top)
    weights = tl.exp2(scores - finite[:, None])
    fade = tl.exp2(best - finite)
    return top, total * fade + tl.sum(weights, 1), weights, fade


@triton.jit
def float_tiles(
    query, positions, bounds, best, total, mixed,  # [R, DP], [R], [R], [R], [R], [R, DP]
    keys, values, table, length, start, first, stop, head, kv_heads, scale,
    S: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, BN: tl.constexpr, WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr, BOUNDED: tl.constexpr, NEWEST: tl.constexpr, MASKED: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Tiles [first, stop) of a segment of floats; `length` tokens from position `start` on."""
    n = tl.arange(0, BN)
    d = tl.arange(0, DP)
    for tile in tl.range(first, stop, num_stages=STAGES):
        index = tile * BN + n
        inside = index < length
        if S % BN == 0:  # one block holds the tile
            block = tl.load(table + tile * BN // S).to(tl.int64)
        elif MASKED:
            block = tl.load(table + index // S, mask=inside, other=0).to(tl.int64)
        else:
            block = tl.load(table + index // S).to(tl.int64)
        places = ((block * kv_heads + head) * S + index % S)[:, None] * D + d[None, :]
        if MASKED:
            wanted = inside[:, None] & (d < D)[None, :]
            key = tl.load(keys + places, mask=wanted, other=0.0)
        elif DP != D:
            key = tl.load(keys + places, mask=(d < D)[None, :], other=0.0)
        else:
            key = tl.load(keys + places)
        scores = dot(query, tl.trans(key.to(query.dtype)), tl.zeros((query.shape[0], BN), tl.float32))
        scores = _scaled(scores, scale, SOFTCAP)
        if MASKED:
            seen = _visible(start + index, inside, positions, bounds, WINDOW, BOUNDED, NEWEST)
            scores = tl.where(seen, scores, float("-inf"))
        best, total, weights, fade = _softmax_step(scores, best, total)
        if MASKED:
            value = tl.load(values + places, mask=wanted, other=0.0)
        elif DP != D:
            value = tl.load(values + places, mask=(d < D)[None, :], other=0.0)
        else:
            value = tl.load(values + places)
        mixed = dot(weights.to(query.dtype), value.to(query.dtype), mixed * fade[:, None])
    return best, total, mixed


@triton.jit
def hadamard(rows, columns, D: tl.constexpr):
    """Signs of the matrix that turns keys and values (`ruvllm_core.decode.coded.rotation`), 0 outside its blocks.

    They are made of the indices: entry (i, j) of a Hadamard block is negative if i & j has an odd number of bits.
    """
    block: tl.constexpr = D & -D
    both = (rows % block)[:, None] & (columns % block)[None, :]
    both = both ^ (both >> 4)
    both = both ^ (both >> 2)
    odd = (both ^ (both >> 1)) & 1
    same = (rows // block)[:, None] == (columns // block)[None, :]
    sign = tl.where(same, 1.0 - 2.0 * odd.to(tl.float32), 0.0)
    return tl.where((rows < D)[:, None] & (columns < D)[None, :], sign, 0.0)


@triton.jit
def _halves(codes, row, inside, BITS: tl.constexpr, HALF: tl.constexpr, HP: tl.constexpr):
    """Both halves of coded vectors at rows `row`, less the middle of the codes: float16, exactly."""
    h = tl.arange(0, HP)
    wanted = inside[:, None] & (h < HALF)[None, :]
    if BITS == 4:
        packed = tl.load(codes + row[:, None] * HALF + h[None, :], mask=wanted, other=0)
        low, high = packed & 15, packed >> 4
    else:
        places = row[:, None] * (2 * HALF) + h[None, :]
        low = tl.load(codes + places, mask=wanted, other=0)
        high = tl.load(codes + places + HALF, mask=wanted, other=0)
    middle: tl.constexpr = 2.0 ** (BITS - 1) - 0.5
    return (low.to(tl.float32) - middle).to(tl.float16), (high.to(tl.float32) - middle).to(tl.float16)


@triton.jit
def coded_tiles(
    query, first_of_pair, second_of_pair, positions, bounds, best, total,  # [R, DP], [R, HP], [R, HP], [R] …
    keys, values, key_scales, value_scales, means, mean_scales, bias, cos, sin,
    table, length, start, first, stop, head, kv_heads, scale,
    S: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, HP: tl.constexpr, BN: tl.constexpr, BITS: tl.constexpr,
    GROUPS: tl.constexpr, CENTERED: tl.constexpr, ROPE_HALF: tl.constexpr, BIAS_ROWS: tl.constexpr,
    WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, BOUNDED: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Tiles [first, stop) of a coded segment (`coded_kv`); no tile reaches from one block into the next.

    Queries are turned instead of keys, and of the values the sum is turned back: codes go into the products as they
    are, scales onto scores and weights. A key bias at the tile's first position is a rotation of the query; from there
    on it is the same table for every tile.
    """
    HALF: tl.constexpr = D // 2
    TILES: tl.constexpr = (S + BN - 1) // BN
    R: tl.constexpr = query.shape[0]
    n = tl.arange(0, BN)
    h = tl.arange(0, HP)
    within = h < HALF
    d = tl.arange(0, DP)
    norm: tl.constexpr = (D & -D) ** -0.5
    nothing = tl.zeros((R, HP), tl.float32)
    zeros = tl.zeros((R, BN), tl.float32)
    plain = query.to(tl.float16)
    columns_high = tl.where(within, h + HALF, DP)  # beyond D there is nothing to turn
    columns_low = tl.where(within, h, DP)
    low_query = (dot(plain, hadamard(d, columns_low, D).to(tl.float16), nothing) * norm).to(tl.float16)
    high_query = (dot(plain, hadamard(d, columns_high, D).to(tl.float16), nothing) * norm).to(tl.float16)
    low_mixed = nothing
    high_mixed = nothing
    if CENTERED:
        places = head * (2 * BIAS_ROWS * HALF) + n[:, None] * HALF + h[None, :]
        first_bias = tl.load(bias + places, mask=within[None, :], other=0.0)
        second_bias = tl.load(bias + places + BIAS_ROWS * HALF, mask=within[None, :], other=0.0)
    for tile in tl.range(first, stop, num_stages=STAGES):
        number = tile // TILES
        offset = (tile % TILES) * BN + n
        inside = (offset < S) & (number * S + offset < length)
        owner = tl.load(table + number).to(tl.int64) * kv_heads + head
        row = owner * S + offset
        low_key, high_key = _halves(keys, row, inside, BITS, HALF, HP)
        scores = dot(low_query, tl.trans(low_key), zeros)
        low_scale = tl.load(key_scales + row * GROUPS, mask=inside, other=0.0).to(tl.float32)
        if GROUPS == 2:
            high_scale = tl.load(key_scales + row * 2 + 1, mask=inside, other=0.0).to(tl.float32)
            scores = scores * low_scale[None, :] + dot(high_query, tl.trans(high_key), zeros) * high_scale[None, :]
        else:
            scores = dot(high_query, tl.trans(high_key), scores) * low_scale[None, :]
        low_mean = tl.load(means + owner * D + h, mask=within, other=0).to(tl.float32) - 127.5
        high_mean = tl.load(means + owner * D + HALF + h, mask=within, other=0).to(tl.float32) - 127.5
        shared = tl.sum(
            low_query.to(tl.float32) * low_mean[None, :] + high_query.to(tl.float32) * high_mean[None, :], 1
        )
        scores += (shared * tl.load(mean_scales + owner).to(tl.float32))[:, None]
        if CENTERED:
            at = start + number * S + (tile % TILES) * BN
            turned = h < ROPE_HALF
            c = tl.load(cos + at * ROPE_HALF + h, mask=turned, other=1.0)[None, :]
            s = tl.load(sin + at * ROPE_HALF + h, mask=turned, other=0.0)[None, :]
            along = (first_of_pair * c + second_of_pair * s).to(tl.float16)
            across = (second_of_pair * c - first_of_pair * s).to(tl.float16)
            scores = dot(across, tl.trans(second_bias), dot(along, tl.trans(first_bias), scores))
        scores = _scaled(scores, scale, SOFTCAP)
        seen = _visible(start + number * S + offset, inside, positions, bounds, WINDOW, BOUNDED, False)
        scores = tl.where(seen, scores, float("-inf"))
        best, total, weights, fade = _softmax_step(scores, best, total)
        low_value, high_value = _halves(values, row, inside, BITS, HALF, HP)
        low_scale = tl.load(value_scales + row * GROUPS, mask=inside, other=0.0).to(tl.float32)
        low_weights = (weights * low_scale[None, :]).to(tl.float16)
        low_mixed = dot(low_weights, low_value, low_mixed * fade[:, None])
        if GROUPS == 2:
            high_scale = tl.load(value_scales + row * 2 + 1, mask=inside, other=0.0).to(tl.float32)
            high_weights = (weights * high_scale[None, :]).to(tl.float16)
        else:
            high_weights = low_weights
        high_mixed = dot(high_weights, high_value, high_mixed * fade[:, None])
    mixed = _turn_back(low_mixed, hadamard(columns_low, d, D), tl.zeros((R, DP), tl.float32))
    return best, total, _turn_back(high_mixed, hadamard(columns_high, d, D), mixed) * norm


@triton.jit
def _turn_back(x, signs, into):
    """``into + x @ signs`` with `x` in two parts of bfloat16, whose sum has 16 of its bits and all its range."""
    large = x.to(tl.bfloat16)
    small = (x - large.to(tl.float32)).to(tl.bfloat16)
    exact = signs.to(tl.bfloat16)
    return dot(small, exact, dot(large, exact, into))
