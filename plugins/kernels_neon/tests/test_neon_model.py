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

from ruvllm_core.decode.contiguous import ContiguousCache
from ruvllm_core.decode.kv import STORE_BITS, KVView, Move, Segment
from ruvllm_core.decode.rope import rope_tables
from ruvllm_core.model.quant import SCHEMES, QuantTensor
from ruvllm_core.model.spec import ModelSpec
from ruvllm_core.protocols import Decoder, DecoderOptions, Weights
from ruvllm_core.testing import tiny
from ruvllm_kernels_cpu import abi
from ruvllm_kernels_cpu import library as cpu_library
from ruvllm_kernels_cpu.model import describe
from ruvllm_kernels_cpu.provider import CpuKernels
from ruvllm_kernels_cpu.storage import KV_TYPES

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


def image_of(spec: ModelSpec, weights: Weights, prompt: Sequence[int] = PROMPT) -> bytes:
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
    header = [len(prompt), STEPS, CONTEXT, image.add(bytes(model)), image.add(np.array(prompt, np.int64).tobytes())]
    header += [image.add(cos.tobytes()), image.add(sin.tobytes())]
    image.data[: 8 * len(header)] = np.array(header, np.int64).tobytes()
    return bytes(image.data)


class Older(ContiguousCache):
    """The same as in ``run_model.cpp``: tokens are read from quantized blocks of 16 once 8 newer ones are there."""

    def __init__(self, decoder: Decoder, scheme: str) -> None:
        super().__init__(tiny.cache_context(decoder, 1))
        self._coded = decoder.allocate_kv(CONTEXT // 16, 16, scheme)
        self._moved = 0

    def view(self, sequences: Sequence[str]) -> KVView:
        view, held = super().view(sequences), self._held[sequences[0]]
        bounds = np.maximum(np.arange(held.length, held.length + held.reserved) - 8, 0) // 16 * 16
        new = np.arange(self._moved, bounds[-1])
        self._moved = int(bounds[-1])
        blocks = np.arange(CONTEXT // 16, dtype=np.int32)[None]
        older = Segment(self._coded, blocks, bounds[-1:].astype(np.int32), np.zeros(1, np.int32))
        moves = [Move(self._storage, self._coded, new, new, new)] if len(new) else []
        return KVView([older, *view.segments], view.slots, moves, bounds.astype(np.int32))


def generate_here(
    spec: ModelSpec, weights: Weights, prompt: Sequence[int] = PROMPT, scheme: str | None = None
) -> tuple[list[int], npt.NDArray[np.float32]]:
    decoder = CpuKernels(OPTIONS).decoder(spec, weights, OPTIONS)
    assert decoder is not None
    feeder = tiny.Feeder(decoder, Older(decoder, scheme) if scheme else None)
    tokens, steps = [], []
    feeder.open("s", prompt, CONTEXT)
    for step in range(STEPS):
        steps.append(feeder.feed(s=1 if step else len(prompt))["s"][-1])
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


@pytest.mark.parametrize("scheme", STORE_BITS)
def test_older_tokens_quantized(arm64: Any, tmp_path: Path, scheme: str) -> None:
    """The prompt's own tokens see different numbers of each other in quantized blocks."""
    # One layer: keys of a second one would round off by a whole code where those of the first are off by a bit.
    spec = replace(BASE, qkv_bias=True, num_heads=6, num_kv_heads=2, num_layers=1)
    weights, prompt = weights_of(spec, ["f32"]), np.random.default_rng(3).integers(0, 256, 53).tolist()
    tokens, logits = generate_here(spec, weights, prompt, scheme)
    assert len(set(tokens)) > 5, "a model that repeats itself proves nothing"
    rounded = abs(generate_here(spec, weights, prompt)[1][0] - logits[0]).max() / abs(logits).max()
    assert rounded > 1e-3, "nothing was rounded"
    (tmp_path / "image").write_bytes(image_of(spec, weights, prompt))
    for cpu, threads in (("cortex-a53", 1), ("cortex-a76", 3), ("max", 2)):
        arguments = tmp_path / "image", "-1", str(threads), tmp_path / "logits", str(KV_TYPES[scheme])
        ran = arm64(cpu, "run_model", *arguments)
        assert ran.returncode == 0, f"{cpu}: {ran.returncode} {ran.stderr}"
        assert [int(token) for token in ran.stdout.split()[1:]] == tokens, cpu
        there = np.frombuffer((tmp_path / "logits").read_bytes(), np.float32).reshape(logits.shape)
        tiny.assert_close(there, logits, 5e-4, f"{scheme}, {cpu}")
