"""Rotary position tables on the device, and the rotation inside a kernel (RoFormer, arXiv 2104.09864)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from ruvllm_core.decode.rope import rope_tables
from ruvllm_core.model.spec import ModelSpec


@dataclass(frozen=True, eq=False)
class RotaryTables:
    """cos and sin, float32 ``[variants, positions, d/2]``; `interleaved`: pairs are neighbours, not halves."""

    cos: Tensor
    sin: Tensor
    interleaved: bool


def rotary_tables(spec: ModelSpec, positions: int, device: torch.device) -> RotaryTables:
    """Tables of a model for positions 0 … `positions` - 1; a second variant only where its scaling has one."""
    variants = 2 if spec.rope_scaling.kind == "longrope" else 1
    pairs = [rope_tables(spec, variant, positions) for variant in range(variants)]
    cos, sin = (torch.stack([torch.from_numpy(pair[n]) for pair in pairs]).to(device) for n in range(2))
    return RotaryTables(cos, sin, spec.rope_interleaved)


@triton.jit
def pair_indices(h, ROPE_HALF: tl.constexpr, D: tl.constexpr, INTERLEAVED: tl.constexpr):
    """Where both members of pair `h` of D/2 are: the rotated pairs, then pairs of the values that are not."""
    rest = h + ROPE_HALF
    first = tl.where(h < ROPE_HALF, 2 * h if INTERLEAVED else h, rest)
    second = tl.where(h < ROPE_HALF, first + (1 if INTERLEAVED else ROPE_HALF), rest + D // 2 - ROPE_HALF)
    return first, second


@triton.jit
def rotated(first, second, cos, sin):
    """A pair turned by an angle."""
    return first * cos - second * sin, second * cos + first * sin
