"""The kernel behind `prefill_attention` and `decode_attention`, and how it is launched.

A program has ROWS query rows of one key/value head of one sequence, and one of `splits` equal shares of the tiles
those rows can see in all segments. With one share it writes the answer; with more, a part of it and the logarithm of
its sum. What changes from step to step is read from tensors, so a launch can be part of a CUDA graph: programs of
which nothing is wanted end at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ruvllm_kernels_cuda.attention_tiles import coded_tiles, float_tiles
from ruvllm_kernels_cuda.rotary import pair_indices
from ruvllm_kernels_cuda.segments import CodedKV, DeviceSegment, FloatKV, KeyBias, sort_segments


@dataclass(frozen=True)
class Tuning:
    """How the kernel is compiled.

    Attributes:
        rows: query rows of a program, a power of two and at least 16.
        tile: keys of a tile, a power of two and at least 16.
        warps, stages: of Triton; stages are tiles on their way from memory at a time.
    """

    rows: int
    tile: int
    warps: int
    stages: int


@dataclass(frozen=True, eq=False)
class Attention:
    """What attention is to do, the same for every layer of a kind.

    Attributes:
        cu_q: int32 ``[B+1]``, sequence b owns tokens ``cu_q[b]:cu_q[b+1]``; it may own none.
        positions: int32 ``[T]``, of each token in its sequence, ascending.
        scale: multiplies ``q·k``.
        window: a query sees this many last positions; None is all.
        softcap: ``c * tanh(score / c)``; None is off.
        boundary: int32 ``[T]``, or None (`ruvllm_core.decode.kv.KVView`).
        key_bias: what a coded segment's keys are stored without, or None.
    """

    cu_q: Tensor
    positions: Tensor
    scale: float
    window: int | None = None
    softcap: float | None = None
    boundary: Tensor | None = None
    key_bias: KeyBias | None = None


@triton.jit
def _tiles_of(
    start, length, lowest, highest, low_bound, high_bound,
    BN: tl.constexpr, WINDOW: tl.constexpr, BOUNDED: tl.constexpr, NEWEST: tl.constexpr,
):  # fmt: skip
    """Which tokens [low, high) of a segment queries at positions [lowest, highest] can see."""
    low = start
    high = tl.minimum(start + length, highest + 1)
    if WINDOW > 0:
        low = tl.maximum(low, lowest - WINDOW + 1)
    if BOUNDED:
        if NEWEST:
            low = tl.maximum(low, low_bound)
        else:
            high = tl.minimum(high, high_bound)
    return low - start, tl.maximum(high, low) - start


# What differs from batch to batch must not compile the kernel again.
@triton.jit(do_not_specialize=["splits", "older_width", "store_width", "width"])
def _attend(
    query, out, sums, cu_q, positions, boundary, bias, cos, sin, scale, heads, kv_heads, splits,
    older_keys, older_values, older_table, older_lengths, older_starts, older_width,
    store_keys, store_values, key_scales, value_scales, means, mean_scales,
    store_table, store_lengths, store_starts, store_width,
    keys, values, table, lengths, starts, width,
    GROUP: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, HP: tl.constexpr, ROWS: tl.constexpr, BN: tl.constexpr,
    OLDER_S: tl.constexpr, STORE_S: tl.constexpr, S: tl.constexpr, BITS: tl.constexpr, GROUPS: tl.constexpr,
    CENTERED: tl.constexpr, ROPE_HALF: tl.constexpr, INTERLEAVED: tl.constexpr, BIAS_ROWS: tl.constexpr,
    WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, BOUNDED: tl.constexpr, PARTS: tl.constexpr,
    OLDER_KIND: tl.constexpr, KIND: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(1)
    sequence = tl.program_id(2)
    # The last rows see most: they are begun first.
    block = tl.num_programs(0) // splits - 1 - tl.program_id(0) // splits
    split = tl.program_id(0) % splits
    origin = tl.load(cu_q + sequence)
    count = tl.load(cu_q + sequence + 1) - origin
    if block * ROWS >= count * GROUP:
        return
    row = block * ROWS + tl.arange(0, ROWS)
    token = row // GROUP
    real = token < count
    line = (origin + token).to(tl.int64) * heads + head * GROUP + row % GROUP
    at = tl.load(positions + origin + token, mask=real, other=-1)
    lowest = tl.load(positions + origin + block * ROWS // GROUP)
    highest = tl.load(positions + origin + tl.minimum((block * ROWS + ROWS - 1) // GROUP, count - 1))
    bounds = at
    low_bound = lowest
    high_bound = lowest
    if BOUNDED:
        bounds = tl.load(boundary + origin + token, mask=real, other=0)
        low_bound = tl.min(tl.where(real, bounds, 2147483647), 0)
        high_bound = tl.max(bounds, 0)

    # All tiles in a row: the store's, those of older floats, the newest ones. This program's are [begin, end).
    newest_start = tl.load(starts + sequence)
    newest_length = tl.load(lengths + sequence)
    low, high = _tiles_of(
        newest_start, newest_length, lowest, highest, low_bound, high_bound, BN, WINDOW, BOUNDED, True
    )
    newest_first = low // BN
    tiles = tl.where(high > low, (high + BN - 1) // BN - newest_first, 0)
    newest_stop = newest_first + tiles
    if OLDER_S > 0:
        older_start = tl.load(older_starts + sequence)
        older_length = tl.load(older_lengths + sequence)
        low, high = _tiles_of(
            older_start, older_length, lowest, highest, low_bound, high_bound, BN, WINDOW, BOUNDED, False
        )
        older_first = low // BN
        older_tiles = tl.where(high > low, (high + BN - 1) // BN - older_first, 0)
        tiles += older_tiles
    if STORE_S > 0:
        per_block: tl.constexpr = (STORE_S + BN - 1) // BN
        store_start = tl.load(store_starts + sequence)
        store_length = tl.load(store_lengths + sequence)
        low, high = _tiles_of(
            store_start, store_length, lowest, highest, low_bound, high_bound, BN, WINDOW, BOUNDED, False
        )
        store_first = low // STORE_S * per_block + low % STORE_S // BN
        last = (high - 1) // STORE_S * per_block + (high - 1) % STORE_S // BN
        store_tiles = tl.where(high > low, last + 1 - store_first, 0)
        tiles += store_tiles
    share = (tiles + splits - 1) // splits
    begin = split * share
    end = tl.minimum(begin + share, tiles)

    d = tl.arange(0, DP)
    best = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    mixed = tl.zeros((ROWS, DP), tl.float32)
    if PARTS and begin >= end:
        tl.store(sums + line * splits + split, best, mask=real)
        return
    wanted = real[:, None] & (d < D)[None, :]
    if STORE_S > 0:
        if begin < store_tiles:
            asked = tl.load(query + line[:, None] * D + d[None, :], mask=wanted, other=0.0).to(tl.float32)
            first_of_pair = asked
            second_of_pair = asked
            if CENTERED:
                h = tl.arange(0, HP)
                one, two = pair_indices(h, ROPE_HALF, D, INTERLEAVED)
                paired = real[:, None] & (h < D // 2)[None, :]
                first_of_pair = tl.load(query + line[:, None] * D + one[None, :], mask=paired, other=0.0).to(tl.float32)
                second_of_pair = tl.load(query + line[:, None] * D + two[None, :], mask=paired, other=0.0).to(
                    tl.float32
                )
            best, total, mixed = coded_tiles(
                asked, first_of_pair, second_of_pair, at, bounds, best, total,
                store_keys, store_values, key_scales, value_scales, means, mean_scales, bias, cos, sin,
                store_table + sequence * store_width, store_length, store_start,
                store_first + begin, store_first + tl.minimum(end, store_tiles), head, kv_heads, scale,
                STORE_S, D, DP, HP, BN, BITS, GROUPS, CENTERED, ROPE_HALF, BIAS_ROWS,
                WINDOW, SOFTCAP, BOUNDED, STAGES,
            )  # fmt: skip
        begin = tl.maximum(begin - store_tiles, 0)
        end = tl.maximum(end - store_tiles, 0)
    # Read again, as it would take registers meanwhile.
    asked = tl.load(query + line[:, None] * D + d[None, :], mask=wanted, other=0.0).to(tl.float32)
    if OLDER_S > 0:
        best, total, mixed = float_tiles(
            asked.to(OLDER_KIND), at, bounds, best, total, mixed,
            older_keys, older_values, older_table + sequence * older_width, older_length, older_start,
            older_first + tl.minimum(begin, older_tiles), older_first + tl.minimum(end, older_tiles),
            head, kv_heads, scale, OLDER_S, D, DP, BN, WINDOW, SOFTCAP, BOUNDED, False, True, STAGES,
        )  # fmt: skip
        begin = tl.maximum(begin - older_tiles, 0)
        end = tl.maximum(end - older_tiles, 0)
    first = newest_first + begin
    stop = tl.minimum(newest_first + end, newest_stop)
    asked = asked.to(KIND)
    table += sequence * width
    if WINDOW == 0 and not BOUNDED and not PARTS:
        # Tiles that every row sees whole need no mask.
        whole = tl.minimum(newest_length, lowest + 1 - newest_start) // BN
        whole = tl.minimum(tl.maximum(whole, first), stop)
        best, total, mixed = float_tiles(
            asked, at, bounds, best, total, mixed, keys, values, table, newest_length, newest_start,
            first, whole, head, kv_heads, scale, S, D, DP, BN, WINDOW, SOFTCAP, BOUNDED, True, False, STAGES,
        )  # fmt: skip
        first = whole
    best, total, mixed = float_tiles(
        asked, at, bounds, best, total, mixed, keys, values, table, newest_length, newest_start,
        first, stop, head, kv_heads, scale, S, D, DP, BN, WINDOW, SOFTCAP, BOUNDED, True, True, STAGES,
    )  # fmt: skip

    answer = mixed / tl.where(total > 0.0, total, 1.0)[:, None]
    if PARTS:
        tl.store(sums + line * splits + split, best + tl.log2(total), mask=real)
        tl.store(out + (line * splits + split)[:, None] * D + d[None, :], answer, mask=wanted)
    else:
        tl.store(out + line[:, None] * D + d[None, :], answer.to(out.dtype.element_ty), mask=wanted)


_COMPUTE = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16}


def launch(
    query: Tensor, segments: Sequence[DeviceSegment], call: Attention, out: Tensor, sums: Tensor | None,
    tuning: Tuning, blocks: int, splits: int,
) -> None:  # fmt: skip
    """Run the kernel with `blocks` row blocks a sequence and head; `sums` is where parts' logarithms go, if any."""
    found = sort_segments(segments)
    newest = found.newest
    _, heads, dim = query.shape
    kv_heads, size = newest.kv.keys.shape[1:3]
    nothing: tuple[Any, ...] = (query, query, query, query, query)
    bits, groups, store = 0, 1, (*(query,) * 9, 0)
    store_size = older_size = 0
    if found.store is not None:
        coded, at = found.store.kv, found.store
        assert isinstance(coded, CodedKV)
        bits, groups, store_size = coded.bits, coded.key_scales.shape[-1], coded.keys.shape[2]
        parts = (coded.keys, coded.values, coded.key_scales, coded.value_scales, coded.means, coded.mean_scales)
        store = (*parts, at.block_table, at.lengths, at.starts, at.block_table.stride(0))
    older: tuple[Any, ...] = (*nothing, 0)
    older_kind = tl.float16
    if found.older is not None:
        older, older_size = _floats(found.older), found.older.kv.keys.shape[2]
        older_kind = _COMPUTE.get(found.older.kv.keys.dtype, tl.float16)
    centering = call.key_bias if found.store is not None else None
    bias, cos, sin = (query,) * 3 if centering is None else (centering.table, centering.cos, centering.sin)
    padded = triton.next_power_of_2(dim)
    _attend[(blocks * splits, kv_heads, call.cu_q.shape[0] - 1)](
        query, out, out if sums is None else sums, call.cu_q, call.positions,
        query if call.boundary is None else call.boundary, bias, cos, sin, call.scale, heads, kv_heads, splits,
        *older, *store, *_floats(newest),
        GROUP=heads // kv_heads, D=dim, DP=padded, HP=max(triton.next_power_of_2(dim // 2), 16), ROWS=tuning.rows,
        BN=tuning.tile, OLDER_S=older_size, STORE_S=store_size, S=size, BITS=bits, GROUPS=groups,
        CENTERED=centering is not None, ROPE_HALF=0 if centering is None else cos.shape[1],
        INTERLEAVED=centering is not None and centering.interleaved,
        BIAS_ROWS=1 if centering is None else bias.shape[2],
        WINDOW=call.window or 0, SOFTCAP=call.softcap or 0.0, BOUNDED=call.boundary is not None,
        PARTS=sums is not None, OLDER_KIND=older_kind, KIND=_COMPUTE.get(newest.kv.keys.dtype, tl.float16),
        STAGES=tuning.stages, num_warps=tuning.warps,
    )  # fmt: skip


def _floats(segment: DeviceSegment) -> tuple[Any, ...]:
    kv = segment.kv
    assert isinstance(kv, FloatKV)
    table = segment.block_table
    return kv.keys, kv.values, table, segment.lengths, segment.starts, table.stride(0)
