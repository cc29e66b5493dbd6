"""Compiles kernels for a GPU that need not be there, and prints what became of them as JSON. A program, not a test."""

from __future__ import annotations

import json
import re
import sys
from typing import Any

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from ruvllm_kernels_cuda import dequant, embed, gemm, gemv_kernel
from ruvllm_kernels_cuda.packing import LAYOUTS

_FLOATS = ("norm", "bias", "residual", "out", "partial")
_DIVISIBLE = ("rows", "columns", "x_stride", "residual_stride", "out_stride", "total")


def build(
    kernel: Any, capability: int, warps: int, stages: int = 1, data: str = "*i32", **constants: Any
) -> dict[str, int]:
    types = {"x": "*bf16", "data": data, "factors": "*fp16", "arrived": "*i32", "tokens": "*i64", "eps": "fp32"}
    types |= dict.fromkeys(_FLOATS, "*fp32")
    names = kernel.arg_names
    signature = {name: "constexpr" if name in constants else types.get(name, "i32") for name in names}
    aligned = [
        i
        for i, name in enumerate(names)
        if signature[name].startswith("*") or (name in _DIVISIBLE and name not in constants)
    ]
    source = ASTSource(
        fn=kernel,
        signature=signature,
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={(i,): [["tt.divisibility", 16]] for i in aligned},
    )
    return seen(triton.compile(source, GPUTarget("cuda", capability, 32), {"num_warps": warps, "num_stages": stages}))


def seen(made: Any) -> dict[str, int]:
    """What there is in a compiled kernel."""
    ptx = made.asm["ptx"]
    return {
        "wide": len(re.findall(r"ld\.global\.v4\.b32", ptx)),
        "async": len(re.findall(r"cp\.async\.cg\.shared\.global", ptx)),
        "matrix": len(re.findall(r"wgmma\.mma_async|mma\.sync", ptx)),
        "barriers": len(re.findall(r"bar\.sync", ptx)),
        "code": len(made.asm["cubin"]),
    }


def main(capability: int) -> None:
    found = {}
    for scheme in ("q4_k", "q5_1", "q6_k", "q8_0"):
        layout = LAYOUTS[scheme]
        record = {"SCALES": layout.scales, "BITS": layout.bits, "CHUNKS": layout.chunks}
        product = record | {"BIAS": True, "RESIDUAL": True, "EVEN": True}
        vector = {"M": 1, "SPLIT": True, **product}
        found[f"vector {scheme}"] = build(
            gemv_kernel.blocks_kernel, capability, 4, REPEAT=2, WARPS=4, NORM=scheme == "q6_k", GATE=-1, **vector
        )
        found[f"tiles {scheme}"] = build(
            gemm._tile_kernel, capability, 4, 3, ROWS=64, TOKENS=16, GROUPS=4, SPLIT=True, FACTOR=tl.bfloat16,
            **product,
        )  # fmt: skip
        found[f"unpack {scheme}"] = build(dequant._dequant_kernel, capability, 4, ROWS=16, **record)
        found[f"embed {scheme}"] = build(embed._embed_blocks, capability, 4, TOKENS=4, **record)
        if scheme in ("q4_k", "q6_k"):  # as the rule of `gemv` cuts up the gates of a large model
            repeat, warps = (4, 2) if scheme == "q4_k" else (2, 4)
            found[f"gated {scheme}"] = build(
                gemv_kernel.blocks_kernel, capability, warps, REPEAT=repeat, WARPS=warps, NORM=True, GATE=0, **vector
            )
    floats = {"NORM": False, "BIAS": True, "RESIDUAL": True}
    floats |= {"M": 2, "REPEAT": 8, "WIDTH": 1024, "WARPS": 4}
    found["vector bf16"] = build(gemv_kernel.float_kernel, capability, 4, data="*bf16", GATE=-1, **floats)
    found["gated bf16"] = build(gemv_kernel.float_kernel, capability, 4, data="*bf16", GATE=0, **floats)
    found["embed bf16"] = build(embed._embed_floats, capability, 4, data="*bf16", TOKENS=4, WIDTH=256)
    print(json.dumps(found))  # noqa: T201


if __name__ == "__main__":
    main(int(sys.argv[1]))
