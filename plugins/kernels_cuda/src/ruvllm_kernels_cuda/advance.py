"""From a step's tokens to the next step's inputs without leaving the device."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ruvllm_kernels_cuda.inputs import StepInputs


@triton.jit
def _advance(
    sampled, tokens, positions, slots, lengths, starts, table, counter, uniforms, uniform, log, sequences, width, steps,
    S: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    b = tl.arange(0, BLOCK)
    inside = b < sequences
    step = tl.load(counter)
    token = tl.load(sampled + b, mask=inside, other=0)
    tl.store(log + step * sequences + b, token, mask=inside)
    tl.store(tokens + b, tl.maximum(token, 0).to(tl.int32), mask=inside)
    live = inside & (tl.load(slots + b, mask=inside, other=-1) >= 0)
    position = tl.load(positions + b, mask=inside, other=0) + 1
    tl.store(positions + b, position, mask=live)
    tl.store(lengths + b, tl.load(lengths + b, mask=inside, other=0) + 1, mask=live)
    at = position - tl.load(starts + b, mask=inside, other=0)
    more = inside & (step + 1 + 0 * b < steps)  # a tile: the interpreter makes no mask of a tile and a scalar
    # After the last step there may be no room for another token.
    block = tl.load(table + b * width + at // S, mask=live & more, other=0).to(tl.int64)
    tl.store(slots + b, block * S + at % S, mask=live)
    tl.store(uniform + b, tl.load(uniforms + (step + 1) * sequences + b, mask=more, other=0.0), mask=inside)
    tl.debug_barrier()  # everybody has read the counter
    tl.store(counter, step + 1)


def advance(sampled: Tensor, step: StepInputs, counter: Tensor, uniforms: Tensor, uniform: Tensor, log: Tensor) -> None:
    """Log tokens and make them the next inputs: their positions, slots and lengths in the newest segment.

    Args:
        sampled: int64 ``[B]``; what is negative is logged, and taken for token 0.
        counter: int32 ``[1]``, which of the `steps` this is.
        uniforms: float64 ``[steps, B]``; the next row goes to `uniform` ``[B]``.
        log: int64 ``[steps, B]``.
    """
    run, (steps, sequences) = step.runs[-1], log.shape
    _advance[(1,)](
        sampled, step.tokens, step.positions, step.slots, run.lengths, run.starts, run.block_table, counter,
        uniforms, uniform, log, sequences, run.block_table.shape[1], steps,
        S=run.storage.block_size, BLOCK=triton.next_power_of_2(sequences), num_warps=1,
    )  # fmt: skip
