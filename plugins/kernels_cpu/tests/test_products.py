"""Each matrix product against float64, on the very activations that the kernels see, for odd numbers of rows."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from ruvllm_core.errors import ConfigError
from ruvllm_core.model.quant import FLOAT_SCHEMES, SCHEMES, QuantTensor
from ruvllm_core.protocols import DecoderOptions
from ruvllm_core.testing.tiny import CONTEXT, TEXTS, assert_close, tiny_spec, tiny_weights, whole
from ruvllm_kernels_cpu.library import ISAS, kernels
from ruvllm_kernels_cpu.provider import CpuKernels

ROWS, COLUMNS = 149, 768  # not a multiple of the panel's sixteen rows


def rounded(x: npt.NDArray[np.float32]) -> npt.NDArray[np.float64]:
    """Activations in blocks of 32 as 8-bit integers and a scale, back as floats."""
    blocks = x.reshape(-1, 32)
    top = np.abs(blocks).max(1, keepdims=True)
    whole = np.rint(blocks * np.divide(np.float32(127), top, out=np.zeros_like(top), where=top > 0))
    return (whole * (top.astype(np.float64) / 127)).reshape(x.shape)


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


@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("isa", ISAS[1:])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_product(scheme: str, isa: str, bits: int) -> None:
    """One token, few, and many, with every width of the last tile."""
    try:
        kernels(isa)
    except ConfigError:
        pytest.skip(f"this processor has no {isa}")
    rng = np.random.default_rng(1)
    spec = tiny_spec(hidden_size=COLUMNS, vocab_size=ROWS, num_layers=1)
    options = DecoderOptions(device="cpu", threads=2, max_context=CONTEXT)
    weights = {**tiny_weights(spec), "lm_head": weight(scheme, rng)}
    decoder = CpuKernels(options, isa=isa, activation_bits=bits).decoder(spec, weights, options)
    assert decoder is not None
    plain = weights["lm_head"].dequantize().astype(np.float64)
    for tokens in (1, 2, 3, 4, 5, 8, 12, 19, 31):
        x = rng.normal(size=(tokens, COLUMNS)).astype(np.float32)
        x[0, :32] = 0.0  # a block without a scale
        x[-1, 32:64] *= 1e4  # and one that dwarfs the others
        seen = rounded(x) if bits == 8 and scheme not in FLOAT_SCHEMES else x.astype(np.float64)
        size = np.abs(seen) @ np.abs(plain).T  # what the terms add up to before they cancel
        off = np.abs(decoder.logits(x) - seen @ plain.T) / size
        # 16 bits are compared with what was not rounded at all: a step is 1/65024 of a block's largest value.
        assert off.max() < (2e-6 if bits == 8 or scheme in FLOAT_SCHEMES else 4e-5), f"{tokens} tokens: {off.max():.1e}"
    decoder.close()


@pytest.mark.parametrize("isa", ISAS[2:])
def test_instruction_sets_agree_with_portable_code(isa: str) -> None:
    try:
        kernels(isa)
    except ConfigError:
        pytest.skip(f"this processor has no {isa}")
    options = DecoderOptions(device="cpu", threads=1, max_context=CONTEXT)
    spec = tiny_spec(hidden_size=256, intermediate_size=512, head_dim=64)
    weights = tiny_weights(spec, ("q4_k", "q6_k", "q5_0", "q8_0"))
    logits = []
    for name in ("generic", isa):
        decoder = CpuKernels(options, isa=name).decoder(spec, weights, options)
        assert decoder is not None
        logits.append(whole(decoder, TEXTS["c"]))
        decoder.close()
    assert_close(logits[1], logits[0], 2e-4, f"{isa} against generic")
