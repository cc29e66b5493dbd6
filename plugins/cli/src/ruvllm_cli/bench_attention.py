"""Speed of attention alone, through the operation that a kernel provider ships.

Queries, keys and values are random; what counts is their number. Calls go round over as many layers of cache as the
model has, so that a single query finds its keys where a model would: in memory, not in the processor's cache.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from ruvllm_core.decode.kv import KVStorage, KVView, Segment
from ruvllm_core.decode.ops import AttentionInput
from ruvllm_core.errors import PluginError, RequestError, near
from ruvllm_core.machine import require_memory
from ruvllm_core.model.quant import SCHEMES

if TYPE_CHECKING:
    from torch import Tensor

    from ruvllm_core.protocols import DecoderOptions
    from ruvllm_core.registry import Registry

_LEAST_S = 0.05  # a measurement repeats its call until it takes as long
_MOST_CACHE = 1 << 28  # bytes of keys and values; more layers would show nothing new


class Heads(NamedTuple):
    """Query heads, key/value heads, head size and layers of a model."""

    query: int
    kv: int
    size: int
    layers: int


SHAPES = {
    "smollm2-135m": Heads(9, 3, 64, 30),
    "qwen2.5-0.5b": Heads(14, 2, 64, 24),
    "qwen2.5-1.5b": Heads(12, 2, 128, 28),
    "qwen2.5-7b": Heads(28, 4, 128, 28),
    "llama-3-8b": Heads(32, 8, 128, 32),
    "mistral-7b": Heads(32, 8, 128, 32),
    "phi-3-mini": Heads(32, 32, 96, 32),
}


@dataclass(frozen=True)
class Side:
    """A provider's attention operation.

    Attributes:
        kernels: the provider's name.
        device: where it runs.
        op: the operation.
        name: what ran, as in ``ruvllm_core.decode.reference.attention``.
    """

    kernels: str
    device: str
    op: Callable[[AttentionInput], Tensor]
    name: str


def open_side(kernels: str, registry: Registry, options: DecoderOptions) -> Side:
    """The operation of the provider `kernels`; that of ``torch`` is core's reference.

    Raises `PluginError` if a provider has none of its own: nothing else is measured in its name.
    """
    provider = registry.load("kernels", kernels)(options)
    op = provider.ops().get("attention")
    if op is None and kernels == "torch":
        from ruvllm_core.decode.reference import attention as op
    if op is None:
        raise PluginError(
            f"the kernel provider {kernels!r} has no attention operation of its own",
            hint="its decoder computes attention inside a whole step: measure that with `ruvllm bench e2e`",
        )
    module, name = getattr(op, "__module__", None), getattr(op, "__qualname__", None)
    return Side(kernels, provider.device, op, f"{module}.{name}" if name else repr(op))


def measure(
    sides: Sequence[Side],
    shapes: Sequence[str],
    prompts: Sequence[int],
    depths: Sequence[int],
    *,
    dtype: str = "f32",
    kv: str = "f32",
    repeats: int = 3,
) -> Iterator[dict[str, Any]]:
    """One row for each shape, prompt length, depth and side, as soon as it is known; sides are measured in turn.

    Args:
        prompts: queries of one call, which see one another causally.
        depths: tokens in the cache before them.
        dtype, kv: ``f32``, ``f16`` or ``bf16``, of the queries, and of keys and values.

    Yields:
        ``ms`` of one call (median), ``gflop_s`` counting two products of each query with each key it sees, and
        ``kv_gb_s``, bytes of keys and values that one pass over the cache reads.
    """
    for shape in shapes:
        if shape not in SHAPES:
            raise RequestError(f"there is no head shape {shape!r}", hint=near(shape, SHAPES))
    for shape in shapes:
        heads = SHAPES[shape]
        for prompt in prompts:
            for depth in depths:
                cases = [Case(heads, prompt, depth, side.device, dtype, kv) for side in sides]
                counts = [_count(side, case) for side, case in zip(sides, cases, strict=True)]
                times: list[list[float]] = [[] for _ in sides]
                for _ in range(repeats):
                    for n, (side, case) in enumerate(zip(sides, cases, strict=True)):
                        times[n].append(case.run(side.op, counts[n]) / counts[n])
                for side, case, seconds in zip(sides, cases, times, strict=True):
                    middle = median(seconds)
                    yield {
                        "shape": shape,
                        "prompt": prompt,
                        "depth": depth,
                        "kernels": side.kernels,
                        "ms": 1e3 * middle,
                        "gflop_s": case.flop / middle / 1e9,
                        "kv_gb_s": case.kv_bytes / middle / 1e9,
                    }


class Case:
    """Everything one call needs.

    Attributes:
        calls: the input of a call for each layer.
        flop: floating-point operations of one call.
        kv_bytes: bytes of the keys and values that are seen.

    Raises `OutOfMemoryError`.
    """

    def __init__(self, heads: Heads, prompt: int, depth: int, device: str, dtype: str, kv: str) -> None:
        import torch

        from ruvllm_core.decode.reference import DTYPES

        length = depth + prompt
        self.flop = 4 * heads.query * heads.size * (prompt * depth + prompt * (prompt + 1) // 2)
        self.kv_bytes = 2 * heads.kv * length * SCHEMES[kv].row_bytes(heads.size)
        layers = max(1, min(heads.layers, _MOST_CACHE // self.kv_bytes))
        require_memory(layers * self.kv_bytes, f"keys and values of {length} tokens in {layers} layers")
        generator = torch.Generator(device).manual_seed(0)

        def random(*shape: int, scheme: str) -> Tensor:
            return torch.randn(shape, generator=generator, device=device).to(DTYPES[scheme])

        sizes = (1, heads.kv, length, heads.size)
        keys, values = ([random(*sizes, scheme=kv) for _ in range(layers)] for _ in range(2))
        storage = KVStorage(kv, 1, length, keys, values, layers * self.kv_bytes)
        one = np.zeros(1, dtype=np.int32)
        segment = Segment(storage, one[None], one + length, one)
        view = KVView([segment], np.arange(depth, length, dtype=np.int64))
        query = random(prompt, heads.query, heads.size, scheme=dtype)
        scale = heads.size**-0.5
        self.calls = [
            AttentionInput(query, layer, view, (0, prompt), (depth,), scale, window=None, softcap=None)
            for layer in range(layers)
        ]
        self._wait = torch.cuda.synchronize if device.startswith("cuda") else _nothing
        if device.startswith("mps"):
            self._wait = torch.mps.synchronize

    def run(self, op: Callable[[AttentionInput], Tensor], count: int) -> float:
        """Seconds for `count` calls."""
        import torch

        with torch.inference_mode():
            self._wait()
            begin = time.perf_counter()
            for number in range(count):
                op(self.calls[number % len(self.calls)])
            self._wait()
            return time.perf_counter() - begin


def _count(side: Side, case: Case) -> int:
    """Calls that make up one measurement: all layers once if that is quick, and enough to be measured."""
    case.run(side.op, 1)
    once = case.run(side.op, 1)
    return max(1, min(round(_LEAST_S / once), 10_000)) if once > 0 else 10_000


def _nothing() -> None:
    """A processor is done when a call returns."""
