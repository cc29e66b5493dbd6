"""Compiles every kernel that steps of a tiny model launch, for a GPU that need not be there. A program, not a test.

Launches are caught before they reach a device, so nothing is computed; what a kernel is given says how it is compiled,
as it does on a GPU. Prints JSON: what is in each kernel (`compile_kernels.seen`).
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from typing import Any
from unittest import mock

import torch
import triton
from compile_kernels import seen
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from ruvllm_core.decode.contiguous import ContiguousCache
from ruvllm_core.generate.sequence import Sequence, make_batch
from ruvllm_core.protocols import DecoderOptions
from ruvllm_core.testing import tiny
from ruvllm_kernels_cuda import decoder as decoder_module
from ruvllm_kernels_cuda.scratch import Scratch

_TYPES = {
    torch.float64: "*fp64", torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16",
    torch.int64: "*i64", torch.int32: "*i32", torch.int8: "*i8", torch.uint8: "*u8", torch.bool: "*i1",
}  # fmt: skip


class Launches:
    """Stands in for `JITFunction.run`."""

    def __init__(self, capability: int) -> None:
        self._target = GPUTarget("cuda", capability, 32)
        self._made: set[tuple[str, ...]] = set()
        self.found: dict[str, dict[str, int]] = {}

    def __call__(self, kernel: Any, *args: Any, grid: Any, warmup: bool, **given: Any) -> None:
        values = dict(zip(kernel.arg_names, args, strict=False))
        values |= {name: value for name, value in given.items() if name in kernel.arg_names}
        options = {name: value for name, value in given.items() if name not in kernel.arg_names}
        constants = {p.name: values[p.name] for p in kernel.params if p.is_constexpr}
        signature, attributes = {}, {}
        for i, name in enumerate(kernel.arg_names):
            value = values[name]
            if name in constants:
                signature[name] = "constexpr"
                continue
            if isinstance(value, torch.Tensor):
                signature[name] = _TYPES[value.dtype]
            else:
                signature[name] = "fp32" if isinstance(value, float) else "i32"
            if isinstance(value, torch.Tensor) or (isinstance(value, int) and value % 16 == 0):
                attributes[(i,)] = [["tt.divisibility", 16]]
        key = (kernel.__name__, repr(constants), repr(signature), repr(attributes), repr(options))
        if key not in self._made:
            constexprs = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
            source = ASTSource(fn=kernel, signature=signature, constexprs=constexprs, attrs=attributes)
            made = triton.compile(source, self._target, options)
            self._made.add(key)
            self.found[f"{kernel.__name__} {len(self.found)}"] = seen(made)


def main(capability: int) -> None:
    spec = tiny.tiny_spec(hidden_size=256, intermediate_size=256, head_dim=64, qkv_bias=True, max_context=112)
    options = DecoderOptions(dtype="bfloat16", max_context=spec.max_context)
    scratch = replace(Scratch.on("cpu", partial=1 << 16, arrived=1 << 10, dense=1 << 14), processors=132)
    launches = Launches(capability)
    with (
        mock.patch.object(JITFunction, "run", lambda kernel, *args, **given: launches(kernel, *args, **given)),
        mock.patch.object(decoder_module, "_checked", lambda tokens: tokens),  # nothing wrote them
    ):
        weights = tiny.tiny_weights(spec, ("q4_k", "q6_k", "f16"))
        decoder = decoder_module.CudaDecoder(spec, weights, options, torch.device("cpu"), scratch=scratch)
        adapter = tiny.tiny_adapter(spec)
        for asked in ([{}], [{"temperature": 0.7, "top_k": 5, "top_p": 0.8, "adapter": adapter}] * 3):
            requests = [tiny.tiny_request([5 + n], **how) for n, how in enumerate(asked)]
            cache = ContiguousCache(tiny.cache_context(decoder, 8))
            sequences = [Sequence(request, cache, spec) for request in requests]
            for request in requests:
                cache.extend(request.id, 1)
            batch = make_batch(cache, [(sequence, 1) for sequence in sequences])
            decoder.decode(batch, 2, requests)
    print(json.dumps(launches.found))  # noqa: T201


if __name__ == "__main__":
    main(int(sys.argv[1]))
