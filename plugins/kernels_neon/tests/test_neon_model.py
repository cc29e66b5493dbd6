"""Whole tiny models: the tokens that emulated ARM64 processors generate are those of this machine."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from ruvllm_core.decode.rope import rope_tables
from ruvllm_core.model.quant import SCHEMES, QuantTensor
from ruvllm_core.model.spec import ModelSpec
from ruvllm_core.protocols import DecoderOptions, Weights
from ruvllm_core.testing import tiny
from ruvllm_kernels_cpu import abi
from ruvllm_kernels_cpu import library as cpu_library
from ruvllm_kernels_cpu.model import describe
from ruvllm_kernels_cpu.provider import CpuKernels

pytestmark = pytest.mark.skipif(cpu_library.missing() is not None, reason=str(cpu_library.missing()))
CONTEXT, STEPS = 96, 40
PROMPT = np.random.default_rng(2).integers(0, 256, 21).tolist()
OPTIONS = DecoderOptions(dtype="float32", device="cpu", threads=1, max_context=CONTEXT)
BASE = tiny.tiny_spec(hidden_size=256, intermediate_size=512, head_dim=64, max_context=CONTEXT)
MODELS = {
    "every scheme": (BASE, list(SCHEMES)),
    "biases, window, softcaps": (
        replace(
            BASE,
            qkv_bias=True,
            mlp_bias=True,
            num_heads=7,
            num_kv_heads=1,
            sliding_window=11,
            sliding_layers=(True, False),
            attention_softcap=8.0,
            logit_softcap=20.0,
            activation="gelu_tanh",
            rope_interleaved=True,
            rope_dim=40,
        ),
        ["q8_0", "f32", "q5_1"],
    ),
}


def weights_of(spec: ModelSpec, schemes: Sequence[str]) -> dict[str, QuantTensor]:
    """Random weights; biases about zero, because larger ones would drown the tokens."""
    weights = tiny.tiny_weights(spec, schemes)
    for name in weights:
        if name.endswith(".bias"):
            weights[name] = QuantTensor.from_float(weights[name].dequantize() - np.float32(1.0))
    return weights


class Image:
    """Memory of one process for another: structures whose pointers are offsets into it. See ``run_model.cpp``."""

    def __init__(self, owners: Sequence[Any]) -> None:
        self.data = bytearray(4096)  # the header; offset 0 is null
        self._arrays = {one.ctypes.data: one for one in owners if isinstance(one, np.ndarray)}

    def add(self, content: bytes) -> int:
        self.data += bytes(-len(self.data) % 64)
        self.data += content
        return len(self.data) - len(content)

    def moved(self, structure: Any, *names: str) -> None:
        """Put what pointers of a structure point to, all of them arrays, into the image."""
        for name in names:
            if address := getattr(structure, name):
                setattr(structure, name, self.add(self._arrays[address].tobytes()))


def image_of(spec: ModelSpec, weights: Weights) -> bytes:
    model, owners = describe(spec, weights, 16)
    image = Image(owners)
    layers = (abi.Layer * spec.num_layers).from_buffer_copy(ctypes.cast(model.layer, ctypes.POINTER(abi.Layer * 2))[0])
    for layer in layers:
        image.moved(layer, "attn_norm", "mlp_norm")
        for matrix in layer.sites:
            image.moved(matrix, "data", "bias")
    image.moved(model.embed, "data", "bias")
    image.moved(model.head, "data", "bias")
    image.moved(model, "final_norm")
    model.layer = ctypes.cast(image.add(bytes(layers)), ctypes.POINTER(abi.Layer))
    cos, sin = (np.ascontiguousarray(table, np.float32) for table in rope_tables(spec, 0, CONTEXT))
    header = [len(PROMPT), STEPS, CONTEXT, image.add(bytes(model)), image.add(np.array(PROMPT, np.int64).tobytes())]
    header += [image.add(cos.tobytes()), image.add(sin.tobytes())]
    image.data[: 8 * len(header)] = np.array(header, np.int64).tobytes()
    return bytes(image.data)


def generate_here(spec: ModelSpec, weights: Weights) -> tuple[list[int], npt.NDArray[np.float32]]:
    decoder = CpuKernels(OPTIONS).decoder(spec, weights, OPTIONS)
    feeder, tokens, steps = tiny.Feeder(decoder), [], []
    feeder.open("s", PROMPT, CONTEXT)
    for step in range(STEPS):
        steps.append(feeder.feed(s=1 if step else len(PROMPT))["s"][-1])
        tokens.append(int(steps[-1].argmax()))
        feeder.running["s"].accept(tokens[-1])
    decoder.close()
    return tokens, np.stack(steps)


@pytest.mark.parametrize("name", MODELS)
def test_the_same_tokens_as_here(arm64: Any, tmp_path: Path, name: str) -> None:
    spec, schemes = MODELS[name]
    weights = weights_of(spec, schemes)
    tokens, logits = generate_here(spec, weights)
    assert len(set(tokens)) > 5, "a model that repeats itself proves nothing"
    (tmp_path / "image").write_bytes(image_of(spec, weights))
    for cpu, threads, level, table in (
        ("cortex-a53", 1, -1, "neon"),
        ("cortex-a76", 3, -1, "neon-dotprod"),
        ("max", 2, -1, "neon-i8mm"),
        ("max", 1, -2, "generic"),
    ):
        arguments = tmp_path / "image", str(level), str(threads), tmp_path / "logits"
        ran = arm64(cpu, "run_model", *arguments)
        assert ran.returncode == 0, f"{cpu}: {ran.returncode} {ran.stderr}"
        found = ran.stdout.split()
        assert found[0] == table
        assert [int(token) for token in found[1:]] == tokens, cpu
        there = np.frombuffer((tmp_path / "logits").read_bytes(), np.float32).reshape(logits.shape)
        tiny.assert_close(there, logits, 1e-3, f"{name}, {cpu}")
