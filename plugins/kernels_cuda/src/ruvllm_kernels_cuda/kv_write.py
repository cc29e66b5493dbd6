"""Queries and keys rotated, keys and values put in their places, out of one product ``[T, (H + 2K) D]``.

One kernel instead of five (bias, two rotations, two copies): each value is read once and written once, where
attention will read it. A program takes several heads of a token, each value in one pair.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ruvllm_kernels_cuda.rotary import RotaryTables, pair_indices, rotated
from ruvllm_kernels_cuda.segments import FloatKV

#: Heads of a program and its warps that a benchmark tries; the first is used.
TUNINGS = ((4, 2), (2, 1), (8, 4), (16, 4))


@triton.jit
def _cast(x, like):
    """`x` in the type that `like` points to; in e4m3, what it cannot hold becomes the nearest it can."""
    if like.dtype.element_ty == tl.float8e4nv:
        x = tl.minimum(tl.maximum(x, -448.0), 448.0)
    return x.to(like.dtype.element_ty)


@triton.jit
def _rotate_and_write(
    qkv, bias, query, keys, values, slots, positions, variants, cos, sin, table_positions, qkv_stride,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, D: tl.constexpr, HP: tl.constexpr, ROPE_HALF: tl.constexpr,
    S: tl.constexpr, BLOCK: tl.constexpr, BIASED: tl.constexpr, VARIANTS: tl.constexpr, INTERLEAVED: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(1)
    head = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    h = tl.arange(0, HP)
    first, second = pair_indices(h, ROPE_HALF, D, INTERLEAVED)
    real = (head < HEADS + 2 * KV_HEADS)[:, None] & (h < D // 2)[None, :]
    line = head[:, None] * D
    row = qkv + token.to(tl.int64) * qkv_stride
    one = tl.load(row + line + first[None, :], mask=real, other=0.0).to(tl.float32)
    two = tl.load(row + line + second[None, :], mask=real, other=0.0).to(tl.float32)
    if BIASED:
        one += tl.load(bias + line + first[None, :], mask=real, other=0.0).to(tl.float32)
        two += tl.load(bias + line + second[None, :], mask=real, other=0.0).to(tl.float32)
    at = tl.load(positions + token).to(tl.int64)
    if VARIANTS:
        at += tl.load(variants + token).to(tl.int64) * table_positions
    c = tl.load(cos + at * ROPE_HALF + h, mask=h < ROPE_HALF, other=1.0)[None, :]
    s = tl.load(sin + at * ROPE_HALF + h, mask=h < ROPE_HALF, other=0.0)[None, :]
    turned = (head < HEADS + KV_HEADS)[:, None]
    one, two = rotated(one, two, tl.where(turned, c, 1.0), tl.where(turned, s, 0.0))

    place = query + token.to(tl.int64) * (HEADS * D) + line
    wanted = real & (head < HEADS)[:, None]
    tl.store(place + first[None, :], _cast(one, query), mask=wanted)
    tl.store(place + second[None, :], _cast(two, query), mask=wanted)

    slot = tl.load(slots + token).to(tl.int64)
    there = (slot + 0 * head >= 0)[:, None]  # a tile: the interpreter makes no mask of a tile and a scalar
    kv_head = (head - HEADS) % KV_HEADS
    place = ((slot // S * KV_HEADS + kv_head) * S + slot % S)[:, None] * D
    wanted = real & (head >= HEADS)[:, None] & (head < HEADS + KV_HEADS)[:, None] & there
    tl.store(keys + place + first[None, :], _cast(one, keys), mask=wanted)
    tl.store(keys + place + second[None, :], _cast(two, keys), mask=wanted)
    wanted = real & (head >= HEADS + KV_HEADS)[:, None] & there
    tl.store(values + place + first[None, :], _cast(one, values), mask=wanted)
    tl.store(values + place + second[None, :], _cast(two, values), mask=wanted)


def rotate_and_write(
    qkv: Tensor,
    bias: Tensor | None,
    kv: FloatKV,
    slots: Tensor,
    positions: Tensor,
    tables: RotaryTables,
    variants: Tensor | None = None,
    out: Tensor | None = None,
    tuning: tuple[int, int] = TUNINGS[0],
) -> Tensor:
    """Rotated queries ``[T, H, D]`` of `qkv` ``[T, (H + 2K) D]``; keys and values go to `kv`.

    Args:
        bias: ``[(H + 2K) D]``, added first; or None.
        slots: int64 ``[T]``, ``block * S + offset`` in `kv`; of a negative one nothing is written.
        positions: int32 or int64 ``[T]``.
        variants: uint8 or int32 ``[T]``, each token's rotary table; None is the first one.
        out: of the type wanted for queries; None is that of the keys, float16 for e4m3.
    """
    tokens, (_, kv_heads, size, dim) = qkv.shape[0], kv.keys.shape
    heads = qkv.shape[1] // dim - 2 * kv_heads
    if out is None:
        dtype = torch.float16 if kv.keys.dtype == torch.float8_e4m3fn else kv.keys.dtype
        out = torch.empty(tokens, heads, dim, dtype=dtype, device=qkv.device)
    block, warps = tuning
    _rotate_and_write[(triton.cdiv(heads + 2 * kv_heads, block), tokens)](
        qkv, qkv if bias is None else bias, out, kv.keys, kv.values, slots, positions,
        positions if variants is None else variants, tables.cos, tables.sin, tables.cos.shape[1], qkv.stride(0),
        HEADS=heads, KV_HEADS=kv_heads, D=dim, HP=triton.next_power_of_2(dim // 2), ROPE_HALF=tables.cos.shape[2],
        S=size, BLOCK=block, BIASED=bias is not None, VARIANTS=variants is not None, INTERLEAVED=tables.interleaved,
        num_warps=warps,
    )  # fmt: skip
    return out
