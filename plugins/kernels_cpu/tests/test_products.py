"""Each matrix product against float64, on the very activations that the kernels see, for odd numbers of rows."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from ruvllm_core.errors import ConfigError
from ruvllm_core.model.quant import FLOAT_SCHEMES, SCHEMES, QuantTensor
from ruvllm_core.protocols import DecoderOptions
from ruvllm_core.testing.tiny import CONTEXT, tiny_spec, tiny_weights
from ruvllm_kernels_cpu.library import ISAS, pick_isa
from ruvllm_kernels_cpu.provider import CpuKernels

ROWS, COLUMNS = 149, 768  # not a multiple of the panel's sixteen rows


def rounded(x: npt.NDArray[np.float32]) -> npt.NDArray[np.float64]:
    """Activations in blocks of 32 as 8-bit integers and a scale, back as floats."""
    blocks = x.reshape(-1, 32)
    top = np.abs(blocks).max(1, keepdims=True)
    scale = top / np.float32(127)
    inverse = np.divide(np.float32(127), top, out=np.zeros_like(top), where=top > 0)
    whole = np.rint(blocks * inverse).astype(np.float64)
    return (whole * scale).reshape(x.shape)


def weight(scheme: str, rng: np.random.Generator) -> QuantTensor:
    """Random bytes with every bit of a block in use, and block scales of the size of one."""
    kind = SCHEMES[scheme]
    if scheme in FLOAT_SCHEMES:
        values = rng.normal(size=(ROWS, COLUMNS)).astype(np.float32)
        if scheme == "f32":
            return QuantTensor.from_float(values)
        short: npt.NDArray[Any] = values.astype(np.float16) if scheme == "f16" else values.view(np.uint16)[:, 1::2]
        return QuantTensor(scheme, (ROWS, COLUMNS), np.ascontiguousarray(short).view(np.uint8))
    data = rng.integers(0, 256, (ROWS, kind.row_bytes(COLUMNS)), dtype=np.uint8)
    blocks = data.reshape(-1, kind.block_bytes)
    where = {"q2_k": [80, 82], "q3_k": [108], "q6_k": [208]}
    for offset in where.get(scheme, [0, 2] if scheme in ("q4_1", "q5_1", "q4_k", "q5_k") else [0]):
        scales = rng.uniform(-1, 1, (len(blocks), 1)).astype(np.float16)
        blocks[:, offset : offset + 2] = scales.view(np.uint8)
    return QuantTensor(scheme, (ROWS, COLUMNS), data)


@pytest.mark.parametrize("isa", ISAS[1:])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_product(scheme: str, isa: str) -> None:
    """1, few (row by row), and many tokens (panels, with every remainder of a tile)."""
    try:
        pick_isa(isa)
    except ConfigError:
        pytest.skip(f"this processor has no {isa}")
    rng = np.random.default_rng(1)
    spec = tiny_spec(hidden_size=COLUMNS, vocab_size=ROWS, num_layers=1)
    options = DecoderOptions(device="cpu", threads=2, max_context=CONTEXT)
    weights = {**tiny_weights(spec), "lm_head": weight(scheme, rng)}
    decoder = CpuKernels(options, isa=isa).decoder(spec, weights, options)
    plain = weights["lm_head"].dequantize().astype(np.float64)
    for tokens in (1, 2, 4, 5, 12, 31):
        x = rng.normal(size=(tokens, COLUMNS)).astype(np.float32)
        x[0, :32] = 0.0  # a block without a scale
        x[-1, 32:64] *= 1e4  # and one that dwarfs the others
        seen = x.astype(np.float64) if scheme in FLOAT_SCHEMES else rounded(x)
        size = np.abs(seen) @ np.abs(plain).T  # what the terms add up to before they cancel
        off = np.abs(decoder.logits(x) - seen @ plain.T) / size
        assert off.max() < 2e-6, f"{tokens} tokens: off by {off.max():.1e}"
    decoder.close()
