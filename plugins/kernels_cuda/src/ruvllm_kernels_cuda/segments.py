"""What attention reads on the device: one layer's keys and values, and where each sequence's tokens are in them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ruvllm_core.decode.kv import STORE_BITS, store_group
from ruvllm_core.errors import ConfigError

#: Storage of each float scheme. ``fp8`` is e4m3 without a scale: beyond 448 values are cut off. It needs sm_89.
KV_DTYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16, "fp8": torch.float8_e4m3fn}


@dataclass(frozen=True, eq=False)
class FloatKV:
    """Keys and values of one layer, each ``[N, K, S, D]`` of a type of `KV_DTYPES`, contiguous."""

    keys: Tensor
    values: Tensor


@dataclass(frozen=True, eq=False)
class CodedKV:
    """Keys and values of one layer in the scheme ``q8`` or ``q4``: what `ruvllm_core.decode.coded` defines, laid out
    for wide loads: codes and scales apart, and a byte of 4-bit codes has value j (low) and value j + D/2 (high).

    Attributes:
        bits: 8 or 4.
        head_dim: D, at most 128.
        keys, values: codes, uint8 ``[N, K, S, D * bits / 8]``.
        key_scales, value_scales: float16 ``[N, K, S, D / group]``.
        means: of the turned keys of each block, codes of 8 bits, uint8 ``[N, K, D]``.
        mean_scales: float16 ``[N, K]``.
    """

    bits: int
    head_dim: int
    keys: Tensor
    values: Tensor
    key_scales: Tensor
    value_scales: Tensor
    means: Tensor
    mean_scales: Tensor


@dataclass(frozen=True, eq=False)
class DeviceSegment:
    """A run of cached tokens, see `ruvllm_core.decode.kv.Segment`: int32 tensors on the device, rewritten each step.

    Attributes:
        block_table: ``[B, M]``. Entries past a sequence's length are not read.
        lengths, starts: ``[B]``.
    """

    kv: FloatKV | CodedKV
    block_table: Tensor
    lengths: Tensor
    starts: Tensor


@dataclass(frozen=True, eq=False)
class KeyBias:
    """The key bias that coded keys are stored without, as `ruvllm_core.decode.coded` wants it for centring.

    Attributes:
        bias: float32 ``[K, D]``.
        table: float16 ``[K, 2, rows, D/2]``: the bias as it stands at positions 0 … rows - 1 without any factor on cos
            and sin; first members of its pairs, then second ones. See `key_bias_table`.
        cos, sin: float32 ``[positions, d/2]``, d of D are rotated.
        interleaved: whether pairs are neighbours, not halves.
    """

    bias: Tensor
    table: Tensor
    cos: Tensor
    sin: Tensor
    interleaved: bool


def coded_kv(num_blocks: int, kv_heads: int, block_size: int, head_dim: int, scheme: str, device: str) -> CodedKV:
    """Zeroed storage of a quantized scheme for one layer. Raises `ConfigError` for a head that cannot be coded."""
    if head_dim > 128 or head_dim % 16:
        takes = "quantized keys and values: kernels for CUDA take a head_dim of at most 128, a multiple of 16"
        what = f"{takes}, not {head_dim}"
        raise ConfigError(what, hint="use a cache policy that keeps floats")
    bits, groups = STORE_BITS[scheme], head_dim // store_group(head_dim)
    shape = num_blocks, kv_heads, block_size
    codes = [torch.zeros(*shape, head_dim * bits // 8, dtype=torch.uint8, device=device) for _ in range(2)]
    scales = [torch.zeros(*shape, groups, dtype=torch.float16, device=device) for _ in range(2)]
    means = torch.zeros(num_blocks, kv_heads, head_dim, dtype=torch.uint8, device=device)
    mean_scales = torch.zeros(num_blocks, kv_heads, dtype=torch.float16, device=device)
    return CodedKV(bits, head_dim, codes[0], codes[1], scales[0], scales[1], means, mean_scales)


def key_bias_table(bias: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, rows: int = 128) -> KeyBias:
    """`KeyBias` of a bias ``[K, D]`` and rotary tables float32 ``[positions, d/2]``.

    Position 0 has cos = the tables' factor. Any more rows than tables have positions are left zero.
    """
    kv_heads, dim = bias.shape
    half = cos.shape[1]
    first, second = pair_members(dim, half, interleaved, bias.device)
    one, two = bias.float()[:, None, first], bias.float()[:, None, second]
    count = min(rows, len(cos))
    c, s = torch.ones(count, dim // 2, device=bias.device), torch.zeros(count, dim // 2, device=bias.device)
    c[:, :half], s[:, :half] = cos[:count] / cos[0], sin[:count] / cos[0]
    table = torch.zeros(kv_heads, 2, rows, dim // 2, dtype=torch.float16, device=bias.device)
    table[:, 0, :count], table[:, 1, :count] = (one * c - two * s).half(), (two * c + one * s).half()
    return KeyBias(bias.float().contiguous(), table, cos.contiguous(), sin.contiguous(), interleaved)


def pair_members(dim: int, half: int, interleaved: bool, device: torch.device) -> tuple[Tensor, Tensor]:
    """Indices of both members of each pair, `half` rotated ones, then pairs of the values that are not rotated."""
    turned, rest = torch.arange(half, device=device), torch.arange(2 * half, dim, device=device)
    first, second = (2 * turned, 2 * turned + 1) if interleaved else (turned, turned + half)
    low, high = rest.chunk(2) if len(rest) else (rest, rest)
    return torch.cat((first, low)), torch.cat((second, high))


@dataclass(frozen=True, eq=False)
class Sorted:
    """A view's segments by what the kernel does with them; at most one of each kind."""

    older: DeviceSegment | None
    store: DeviceSegment | None
    newest: DeviceSegment


def sort_segments(segments: Sequence[DeviceSegment]) -> Sorted:
    """Segments, oldest first, by kind: floats, coded ones, and the newest, floats too. Raises `ConfigError`."""
    *before, newest = segments
    older = [one for one in before if isinstance(one.kv, FloatKV)]
    store = [one for one in before if isinstance(one.kv, CodedKV)]
    if not isinstance(newest.kv, FloatKV) or len(older) > 1 or len(store) > 1:
        kinds = ", ".join("floats" if isinstance(one.kv, FloatKV) else "coded" for one in segments)
        raise ConfigError(
            f"kernels for CUDA read at most one segment of floats and one coded one before the newest, which has "
            f"floats; these are {kinds}",
            hint="use the cache policy contiguous, paged or two_tier",
        )
    return Sorted(older[0] if older else None, store[0] if store else None, newest)
