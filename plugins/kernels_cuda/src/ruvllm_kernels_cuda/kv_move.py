"""Tokens that go from one storage to another in a step (`ruvllm_core.decode.kv.Move`).

Coding whole blocks is a kernel: it replaces some thirty passes over the block by two reads and one write, and it can
stand in a CUDA graph, as a block without a place is passed over. Plain copies, and the way back to floats that only
follows taking back many tokens, are rare and a few indexed copies each: PyTorch does them.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ruvllm_core.decode.coded import rotation
from ruvllm_core.decode.kv import store_group
from ruvllm_core.errors import ConfigError
from ruvllm_kernels_cuda.attention_tiles import dot, hadamard
from ruvllm_kernels_cuda.segments import CodedKV, FloatKV, KeyBias, pair_members

TILE = 32  # tokens of a block that are floats at a time


@triton.jit
def _nearest(x):
    """`x` as the nearest whole number, halves to even: beyond 1.5 · 2^23 float32 holds no others."""
    return (x + 12582912.0) - 12582912.0


@triton.jit
def _scale(top, SHARE: tl.constexpr):
    """The scale that float16 holds of a share of the largest value; never 0, by which codes are divided."""
    return tl.minimum(tl.maximum((top * SHARE).to(tl.float16).to(tl.float32), 5.960464477539063e-08), 65504.0)


@triton.jit
def _codes(x, scale, MIDDLE: tl.constexpr):
    return tl.minimum(tl.maximum(_nearest(tl.div_rn(x, scale) + MIDDLE), 0.0), 2.0 * MIDDLE)


@triton.jit
def _error(x, scale, within, MIDDLE: tl.constexpr):
    """Squared error of each row coded with its scale."""
    off = (_codes(x, scale[:, None] + 0.0 * x, MIDDLE) - MIDDLE) * scale[:, None] - x
    return tl.sum(tl.where(within, off * off, 0.0), 1)


@triton.jit
def _better(
    low, high, within, low_top, high_top, low_best, low_error, high_best, high_error,
    SHARE: tl.constexpr, GROUPS: tl.constexpr, MIDDLE: tl.constexpr,
):  # fmt: skip
    """The scales so far, or those of a share of the largest value where their error is less."""
    low_scale = _scale(low_top, SHARE / MIDDLE)
    high_scale = _scale(high_top, SHARE / MIDDLE)
    low_off = _error(low, low_scale, within, MIDDLE)
    high_off = _error(high, high_scale, within, MIDDLE)
    if GROUPS == 1:
        low_off += high_off
        high_off = low_off
    low_best = tl.where(low_off < low_error, low_scale, low_best)
    high_best = tl.where(high_off < high_error, high_scale, high_best)
    return low_best, tl.minimum(low_error, low_off), high_best, tl.minimum(high_error, high_off)


@triton.jit
def _turned(x, signs, into):
    """``x @ signs``, to float32's last bit or two: `x` in three parts of bfloat16, which the matrix units take."""
    large = x.to(tl.bfloat16)
    rest = x - large.to(tl.float32)
    middle = rest.to(tl.bfloat16)
    small = (rest - middle.to(tl.float32)).to(tl.bfloat16)
    exact = signs.to(tl.bfloat16)
    return dot(large, exact, dot(middle, exact, dot(small, exact, into)))


@triton.jit
def _best_scales(low, high, within, GROUPS: tl.constexpr, BITS: tl.constexpr):
    """Scales of least squared error of rows in two halves: one each, or one for both."""
    MIDDLE: tl.constexpr = 2.0 ** (BITS - 1) - 0.5
    low_top = tl.max(tl.where(within, tl.abs(low), 0.0), 1)
    high_top = tl.max(tl.where(within, tl.abs(high), 0.0), 1)
    if GROUPS == 1:
        low_top = tl.maximum(low_top, high_top)
        high_top = low_top
    low_best = _scale(low_top, 1.0 / MIDDLE)
    high_best = _scale(high_top, 1.0 / MIDDLE)
    if BITS == 4:
        low_error = _error(low, low_best, within, MIDDLE)
        high_error = _error(high, high_best, within, MIDDLE)
        if GROUPS == 1:
            low_error += high_error
            high_error = low_error
        low_best, low_error, high_best, high_error = _better(
            low, high, within, low_top, high_top, low_best, low_error, high_best, high_error, 0.93, GROUPS, MIDDLE
        )
        low_best, low_error, high_best, high_error = _better(
            low, high, within, low_top, high_top, low_best, low_error, high_best, high_error, 0.86, GROUPS, MIDDLE
        )
        low_best, low_error, high_best, high_error = _better(
            low, high, within, low_top, high_top, low_best, low_error, high_best, high_error, 0.8, GROUPS, MIDDLE
        )
    return low_best, high_best


@triton.jit
def _store_rows(
    low, high, codes, scales, row, inside, within,
    HALF: tl.constexpr, HP: tl.constexpr, GROUPS: tl.constexpr, BITS: tl.constexpr,
):  # fmt: skip
    """Code rows of turned values in two halves and store them at rows `row`."""
    MIDDLE: tl.constexpr = 2.0 ** (BITS - 1) - 0.5
    h = tl.arange(0, HP)
    low_scale, high_scale = _best_scales(low, high, within, GROUPS, BITS)
    low = _codes(low, low_scale[:, None] + 0.0 * low, MIDDLE).to(tl.int32)
    high = _codes(high, high_scale[:, None] + 0.0 * high, MIDDLE).to(tl.int32)
    wanted = inside[:, None] & within
    if BITS == 4:
        tl.store(codes + row[:, None] * HALF + h[None, :], (low | (high << 4)).to(tl.uint8), mask=wanted)
    else:
        places = row[:, None] * (2 * HALF) + h[None, :]
        tl.store(codes + places, low.to(tl.uint8), mask=wanted)
        tl.store(codes + places + HALF, high.to(tl.uint8), mask=wanted)
    tl.store(scales + row * GROUPS, low_scale.to(tl.float16), mask=inside)
    if GROUPS == 2:
        tl.store(scales + row * 2 + 1, high_scale.to(tl.float16), mask=inside)


@triton.jit
def _read_rows(
    source, slot, inside, head, kv_heads, bias, cos, sin, positions,
    D: tl.constexpr, DP: tl.constexpr, FROM_S: tl.constexpr, CENTERED: tl.constexpr, ROPE_HALF: tl.constexpr,
    INTERLEAVED: tl.constexpr,
):  # fmt: skip
    """Vectors ``[TILE, DP]`` at slots, less the bias as it stands at their positions."""
    d = tl.arange(0, DP)
    wanted = inside[:, None] & (d < D)[None, :]
    places = ((slot // FROM_S * kv_heads + head) * FROM_S + slot % FROM_S)[:, None] * D + d[None, :]
    x = tl.load(source + places, mask=wanted, other=0.0).to(tl.float32)
    if CENTERED:
        if INTERLEAVED:
            pair = d // 2
            other = d ^ 1
            sign = tl.where(d % 2 == 0, -1.0, 1.0)
        else:
            pair = d % ROPE_HALF
            other = tl.where(d < ROPE_HALF, d + ROPE_HALF, d - ROPE_HALF)
            sign = tl.where(d < ROPE_HALF, -1.0, 1.0)
        turned = d < 2 * ROPE_HALF
        own = tl.load(bias + head * D + d, mask=d < D, other=0.0)
        partner = tl.load(bias + head * D + other, mask=turned, other=0.0) * sign
        angles = positions[:, None] * ROPE_HALF + pair[None, :]
        c = tl.load(cos + angles, mask=inside[:, None] & turned[None, :], other=1.0)
        s = tl.load(sin + angles, mask=inside[:, None] & turned[None, :], other=0.0)
        x = tl.where(wanted, x - (own[None, :] * c + partner[None, :] * s), 0.0)
    return x


@triton.jit
def _code_blocks(
    keys, values, to_keys, to_values, key_scales, value_scales, means, mean_scales,
    from_slots, to_slots, positions, bias, cos, sin, kv_heads,
    D: tl.constexpr, DP: tl.constexpr, HP: tl.constexpr, FROM_S: tl.constexpr, S: tl.constexpr, GROUPS: tl.constexpr,
    BITS: tl.constexpr, CENTERED: tl.constexpr, ROPE_HALF: tl.constexpr, INTERLEAVED: tl.constexpr,
    TILE: tl.constexpr,
):  # fmt: skip
    HALF: tl.constexpr = D // 2
    norm: tl.constexpr = (D & -D) ** -0.5
    first = tl.program_id(0) * S
    head = tl.program_id(1)
    place = tl.load(to_slots + first)
    if place < 0:
        return
    owner = place // S * kv_heads + head
    n = tl.arange(0, TILE)
    d = tl.arange(0, DP)
    h = tl.arange(0, HP)
    within = h < HALF
    low_signs = hadamard(d, tl.where(within, h, DP), D)
    high_signs = hadamard(d, tl.where(within, h + HALF, DP), D)
    sums = tl.zeros((TILE, DP), tl.float32)
    for at in range(0, S, TILE):
        inside = at + n < S
        slot = tl.load(from_slots + first + at + n, mask=inside, other=0)
        position = tl.load(positions + first + at + n, mask=inside, other=0)
        sums += _read_rows(
            keys, slot, inside, head, kv_heads, bias, cos, sin, position,
            D, DP, FROM_S, CENTERED, ROPE_HALF, INTERLEAVED,
        )  # fmt: skip
    mean = tl.sum(sums, 0) / S
    low_mean = tl.sum(mean[:, None] * low_signs, 0) * norm
    high_mean = tl.sum(mean[:, None] * high_signs, 0) * norm
    top = tl.maximum(tl.max(tl.abs(low_mean), 0), tl.max(tl.abs(high_mean), 0))
    scale = _scale(top, 1.0 / 127.5)
    low_codes = _codes(low_mean, scale + 0.0 * low_mean, 127.5)
    high_codes = _codes(high_mean, scale + 0.0 * high_mean, 127.5)
    tl.store(means + owner * D + h, low_codes.to(tl.int32).to(tl.uint8), mask=within)
    tl.store(means + owner * D + HALF + h, high_codes.to(tl.int32).to(tl.uint8), mask=within)
    tl.store(mean_scales + owner, scale.to(tl.float16))
    low_mean = (low_codes - 127.5) * scale
    high_mean = (high_codes - 127.5) * scale

    zeros = tl.zeros((TILE, HP), tl.float32)
    for at in range(0, S, TILE):
        inside = at + n < S
        slot = tl.load(from_slots + first + at + n, mask=inside, other=0)
        position = tl.load(positions + first + at + n, mask=inside, other=0)
        row = owner * S + at + n
        x = _read_rows(
            keys, slot, inside, head, kv_heads, bias, cos, sin, position,
            D, DP, FROM_S, CENTERED, ROPE_HALF, INTERLEAVED,
        )  # fmt: skip
        low = _turned(x, low_signs, zeros) * norm - low_mean[None, :]
        high = _turned(x, high_signs, zeros) * norm - high_mean[None, :]
        _store_rows(low, high, to_keys, key_scales, row, inside, within[None, :], HALF, HP, GROUPS, BITS)
        x = _read_rows(
            values, slot, inside, head, kv_heads, bias, cos, sin, position,
            D, DP, FROM_S, False, ROPE_HALF, INTERLEAVED,
        )  # fmt: skip
        low = _turned(x, low_signs, zeros) * norm
        high = _turned(x, high_signs, zeros) * norm
        _store_rows(low, high, to_values, value_scales, row, inside, within[None, :], HALF, HP, GROUPS, BITS)


def code_blocks(
    source: FloatKV, target: CodedKV, from_slots: Tensor, to_slots: Tensor, positions: Tensor, key_bias: KeyBias | None
) -> None:
    """Code whole blocks of tokens: a `Move` from floats to ``q8`` or ``q4``.

    Args:
        from_slots, to_slots: int64 ``[M]``, tokens of whole blocks of `target` in order; a block whose first one is
            negative in `to_slots` is passed over.
        positions: int64 or int32 ``[M]``; used with a `key_bias` alone.
    """
    _, kv_heads, size = target.key_scales.shape[:3]
    dim = target.head_dim
    nothing = target.mean_scales
    bias, cos, sin = (nothing,) * 3 if key_bias is None else (key_bias.bias, key_bias.cos, key_bias.sin)
    _code_blocks[(from_slots.shape[0] // size, kv_heads)](
        source.keys, source.values, target.keys, target.values, target.key_scales, target.value_scales,
        target.means, target.mean_scales, from_slots, to_slots, positions, bias, cos, sin, kv_heads,
        D=dim, DP=triton.next_power_of_2(dim), HP=max(triton.next_power_of_2(dim // 2), 16),
        FROM_S=source.keys.shape[2], S=size, GROUPS=target.key_scales.shape[-1], BITS=target.bits,
        CENTERED=key_bias is not None, ROPE_HALF=1 if key_bias is None else cos.shape[1],
        INTERLEAVED=key_bias is not None and key_bias.interleaved, TILE=TILE, num_warps=4,
    )  # fmt: skip


def move(
    source: FloatKV | CodedKV,
    target: FloatKV | CodedKV,
    from_slots: Tensor,
    to_slots: Tensor,
    positions: Tensor,
    key_bias: KeyBias | None = None,
) -> None:
    """Carry out one `Move` in one layer, all tensors on the device. Raises `ConfigError` from one coded to another."""
    if isinstance(target, CodedKV):
        if isinstance(source, CodedKV):
            raise ConfigError("keys and values cannot be moved from one quantized storage to another")
        return code_blocks(source, target, from_slots, to_slots, positions, key_bias)
    size = target.keys.shape[2]
    block, offset = to_slots // size, to_slots % size
    found = read_floats(source, from_slots, positions, key_bias)
    for stored, new in zip((target.keys, target.values), found, strict=True):
        # PyTorch does not index e4m3, but its bytes.
        bytewise = new.to(stored.dtype).view(torch.uint8) if stored.itemsize == 1 else new.to(stored.dtype)
        (stored.view(torch.uint8) if stored.itemsize == 1 else stored)[block, :, offset] = bytewise
    return None


def read_floats(
    source: FloatKV | CodedKV, slots: Tensor, positions: Tensor, key_bias: KeyBias | None
) -> tuple[Tensor, Tensor]:
    """Keys and values ``[M, K, D]`` at slots; of coded ones float32, and keys with the bias at `positions` added."""
    size = source.keys.shape[2]
    block, offset = slots // size, slots % size
    if isinstance(source, FloatKV):
        stored = (source.keys, source.values)
        found = [one.view(torch.uint8) if one.itemsize == 1 else one for one in stored]
        return found[0][block, :, offset].view(stored[0].dtype), found[1][block, :, offset].view(stored[1].dtype)
    dim, turn = source.head_dim, rotation(source.head_dim).to(slots.device)
    key = _decoded(source.keys[block, :, offset], source.key_scales[block, :, offset], source.bits)
    value = _decoded(source.values[block, :, offset], source.value_scales[block, :, offset], source.bits)
    key = (key + _decoded(source.means[block], source.mean_scales[block][..., None], 8)) @ turn
    if key_bias is not None:
        half = key_bias.cos.shape[1]
        first, second = pair_members(dim, half, key_bias.interleaved, slots.device)
        c, s = torch.ones(len(slots), 1, dim // 2, device=slots.device), torch.zeros(1, device=slots.device)
        s = s.expand_as(c).clone()
        c[..., :half], s[..., :half] = key_bias.cos[positions][:, None], key_bias.sin[positions][:, None]
        one, two = key_bias.bias[:, first], key_bias.bias[:, second]
        key[..., first] += one * c - two * s
        key[..., second] += two * c + one * s
    return key, value @ turn


def _decoded(codes: Tensor, scales: Tensor, bits: int) -> Tensor:
    """Codes and scales ``[..., groups]`` as float32 ``[..., D]``."""
    if bits == 4:
        codes = torch.cat((codes & 15, codes >> 4), -1)
    values: Tensor = (codes.float() - (2.0 ** (bits - 1) - 0.5)).unflatten(-1, (scales.shape[-1], -1))
    return (values * scales.float()[..., None]).flatten(-2)


def split_rows(rows: Tensor, bits: int, dim: int) -> tuple[Tensor, Tensor]:
    """Rows of bytes of `ruvllm_core.decode.coded` as codes and scales in the layout of `CodedKV`."""
    scales = rows[..., dim * bits // 8 :].contiguous().view(torch.float16)
    assert scales.shape[-1] == dim // store_group(dim)
    codes = rows[..., : dim * bits // 8]
    if bits == 4:
        values = torch.stack((codes & 15, codes >> 4), -1).flatten(-2)
        codes = values[..., : dim // 2] | values[..., dim // 2 :] << 4
    return codes.contiguous(), scales
