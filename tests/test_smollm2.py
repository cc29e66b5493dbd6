"""SmolLM2 against transformers in float32, from the same GGUF file."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from prompts import PROMPTS

from ruvllm_core import Engine, GenerateParams, ModelConfig, Settings
from ruvllm_core.model.hub import resolve


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    settings = Settings(kernels=["torch"], plugins={"candle_like": {"max_sequences": len(PROMPTS)}})
    with Engine.load("smollm2", settings=settings, config=ModelConfig(max_context=256)) as made:
        yield made


@pytest.mark.slow
def test_greedy_equals_transformers(engine: Engine) -> None:
    """20 prompts × 64 tokens. Given our tokens, transformers would have chosen each of them itself."""
    from transformers import AutoModelForCausalLM

    path = resolve("smollm2", Settings())
    folder, file = str(Path(path).parent), Path(path).name
    reference = AutoModelForCausalLM.from_pretrained(folder, gguf_file=file, dtype=torch.float32).eval()
    params = GenerateParams(max_tokens=64, temperature=0.0, ignore_eos=True)
    answers = engine.generate_batch(PROMPTS, params)
    agreeing = 0
    with torch.inference_mode():
        for prompt, answer in zip(PROMPTS, answers, strict=True):
            ids = engine.encode_prompt(prompt)
            logits = reference(torch.tensor([[*ids, *answer.token_ids]])).logits[0, len(ids) - 1 : -1]
            agreeing += tuple(logits.argmax(-1).tolist()) == answer.token_ids
    assert agreeing == len(PROMPTS) == 20
