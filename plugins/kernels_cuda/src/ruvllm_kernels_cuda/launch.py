"""Launches that overlap: programmatic dependent launch (CUDA programming guide, the section of that name).

A kernel that is launched so may begin before the one ahead of it has ended: its programs take their places, and ask for
weights, while the last ones of the other still compute. `await_previous` is where they wait for it.

What makes that right: the wait ends when all of the preceding kernel has completed and what it wrote can be seen. That
one waited too, so all before it has completed as well. This holds only as long as every program of every kernel that is
launched with `launch_options` executes `await_previous` before it reads what any kernel writes, before it writes
anything, and before it returns: a kernel that does not wait lets the next one run ahead of all kernels before. What
PyTorch launches waits for everything ahead of it. Weights, norm weights and biases are written by none of the kernels,
so they may be asked for (`prefetch`) before the wait; factors of adapters may not, they change between steps.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
import triton
import triton.language as tl

from ruvllm_kernels_cuda.attention_tiles import INTERPRETED

try:
    from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait
except ImportError:  # Triton before 3.4
    gdc_launch_dependents = gdc_wait = None

#: Kernels one after the other; the next may begin when this one's wait is over; or as soon as this one has begun.
OFF, LATE, EARLY = 0, 1, 2
_LEAST = (9, 0)  # compute capability

_mode: ContextVar[int] = ContextVar("overlap", default=OFF)


@contextmanager
def overlapping(mode: int) -> Iterator[None]:
    """Launches in this context, of this thread, are of `mode`: `OFF`, `LATE` or `EARLY`."""
    before = _mode.set(mode)
    try:
        yield
    finally:
        _mode.reset(before)


@functools.cache
def can_overlap(device: torch.device) -> bool:
    """Whether the device and this Triton know of it."""
    if device.type != "cuda" or INTERPRETED.value or gdc_wait is None:
        return False
    from triton.backends.nvidia.compiler import CUDAOptions

    known = "launch_pdl" in CUDAOptions.__dataclass_fields__
    return known and torch.version.hip is None and torch.cuda.get_device_capability(device) >= _LEAST


def launch_options(device: torch.device) -> dict[str, Any]:
    """What every launch of a kernel on `device` is given: `PDL` for `await_previous`, and the launch's own option."""
    mode = _mode.get()
    if mode == OFF or not can_overlap(device):
        return {"PDL": OFF}
    return {"PDL": mode, "launch_pdl": True}


@triton.jit
def await_previous(PDL: tl.constexpr):
    """Wait for the kernels ahead, and let the next one begin: what a kernel does first, but for `prefetch`."""
    if PDL == 2:
        gdc_launch_dependents()
    if PDL > 0:
        gdc_wait()
    if PDL == 1:
        gdc_launch_dependents()


@triton.jit
def prefetch(at, wanted):
    """Ask for the lines of 128 bytes at pointers `at`, where `wanted`, to be brought into the second-level cache."""
    tl.inline_asm_elementwise(
        "{ .reg .pred wanted; setp.ne.b32 wanted, $2, 0; @wanted prefetch.global.L2 [$1]; mov.b32 $0, 0; }",
        "=r,l,r",
        [at.to(tl.int64), wanted.to(tl.int32)],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


@triton.jit
def prefetch_vector(values, count, program, THREADS: tl.constexpr):
    """Ask for `count` values that all programs need: each asks for other THREADS lines of them."""
    LINE: tl.constexpr = 1024 // values.dtype.element_ty.primitive_bitwidth
    start = (program * THREADS + tl.arange(0, THREADS)) * LINE
    prefetch(values + start, start < count)
