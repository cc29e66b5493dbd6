"""What logits are changed by before a token is drawn, and what is counted afterwards, on the device."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

CHUNK = 2048  # tokens of a program


@dataclass(frozen=True, eq=False)
class Penalties:
    """What logits are changed by before anything else.

    Attributes:
        repetition, frequency, presence: float32 ``[R]``; 1, 0 and 0 are off.
        counts: int32 ``[slots, V]``, generated tokens of each sequence.
        seen: bool ``[slots, V]``, those and the prompt's.
        slots: int32 ``[R]``, each row's sequence.
        bias_ids, bias: int32 and float32 ``[R, N]``, a logit bias; -1 fills up.
    """

    repetition: Tensor
    frequency: Tensor
    presence: Tensor
    counts: Tensor
    seen: Tensor
    slots: Tensor
    bias_ids: Tensor
    bias: Tensor


@triton.jit
def _penalize(logits, repetition, frequency, presence, counts, seen, slots, width, BLOCK: tl.constexpr):
    row = tl.program_id(1)
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    place = logits + row.to(tl.int64) * width + column
    owner = tl.load(slots + row).to(tl.int64) * width + column
    x = tl.load(place, mask=inside, other=0.0)
    penalty = tl.load(repetition + row)
    x = tl.where(
        tl.load(seen + owner, mask=inside, other=0) != 0,
        tl.where(x > 0, tl.div_rn(x, penalty + 0.0 * x), x * penalty),
        x,
    )
    count = tl.load(counts + owner, mask=inside, other=0)
    # As NumPy does it: whole numbers make float64 of the product.
    x = (x.to(tl.float64) - tl.load(frequency + row).to(tl.float64) * count.to(tl.float64)).to(tl.float32)
    x = tl.where(count > 0, x - tl.load(presence + row), x)
    tl.store(place, x, mask=inside)


@triton.jit
def _add_bias(logits, ids, bias, width, count, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    n = tl.arange(0, BLOCK)
    token = tl.load(ids + row * count + n, mask=n < count, other=-1)
    place = logits + row * width + token
    x = tl.load(place, mask=token >= 0, other=0.0)
    tl.store(place, x + tl.load(bias + row * count + n, mask=token >= 0, other=0.0), mask=token >= 0)


@triton.jit
def _count(tokens, counts, seen, slots, width):
    row = tl.program_id(0)
    token = tl.load(tokens + row)
    place = tl.load(slots + row).to(tl.int64) * width + token
    if token >= 0:
        tl.store(counts + place, tl.load(counts + place) + 1)
        tl.store(seen + place, tl.full((), 1, tl.int8))


def penalize(logits: Tensor, penalties: Penalties) -> None:
    """Apply penalties, then bias, to float32 logits ``[R, V]`` in place."""
    rows, width = logits.shape
    p = penalties
    _penalize[(triton.cdiv(width, CHUNK), rows)](
        logits, p.repetition, p.frequency, p.presence, p.counts, p.seen.view(torch.int8), p.slots, width, BLOCK=CHUNK
    )
    if count := p.bias_ids.shape[1]:
        block = triton.next_power_of_2(count)
        _add_bias[(rows,)](logits, p.bias_ids, p.bias, width, count, BLOCK=block, num_warps=1)


def count_tokens(tokens: Tensor, penalties: Penalties) -> None:
    """Let the penalties know of drawn tokens, int64 ``[R]``; -1 is none."""
    counts, seen = penalties.counts, penalties.seen.view(torch.int8)
    _count[(tokens.shape[0],)](tokens, counts, seen, penalties.slots, counts.shape[1], num_warps=1)
