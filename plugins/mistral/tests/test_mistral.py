"""Mistral against transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import MistralConfig

from ruvllm_core.errors import ModelError


def test_names_and_sizes(check_names: Any) -> None:
    assert check_names(MistralConfig(), "mistral").parameters == 7_241_732_096, "Mistral 7B as published"


def test_without_window(oracle: Any, sizes: Any) -> None:
    assert oracle(MistralConfig(**sizes, sliding_window=None, head_dim=24)).check().spec.sliding_window is None


@pytest.mark.parametrize("window", [1, 9, 39, 40])
def test_window_shorter_than_the_prompt(oracle: Any, sizes: Any, window: int) -> None:
    spec = oracle(MistralConfig(**sizes, sliding_window=window)).check().spec
    assert [spec.window_of(n) for n in range(3)] == [window] * 3


def test_the_window_matters(oracle: Any, sizes: Any) -> None:
    made = oracle(MistralConfig(**sizes, sliding_window=9))
    made.edit_config(sliding_window=10)
    with pytest.raises(AssertionError, match="off by"):
        made.check()


def test_gguf_called_llama(oracle: Any, sizes: Any, tmp_path: Path) -> None:
    made = oracle(MistralConfig(**sizes, sliding_window=9))
    metadata = {"general.architecture": "llama", "llama.attention.sliding_window": 9}
    model = made.check(made.write_gguf(tmp_path / "m.gguf", metadata, made.gguf_tensors(permute=True)))
    assert model.spec.architecture == "llama"


def test_gguf_called_mistral3(oracle: Any, sizes: Any, tmp_path: Path) -> None:
    made = oracle(MistralConfig(**sizes, sliding_window=None, head_dim=24))
    metadata = {
        "general.architecture": "mistral3",
        "mistral3.attention.key_length": 24,
        "mistral3.attention.value_length": 24,
        "mistral3.rope.dimension_count": 24,
    }
    tensors = made.gguf_tensors(permute=True)
    model = made.check(made.write_gguf(tmp_path / "m.gguf", metadata, tensors))
    assert model.spec.architecture == "mistral"
    unsupported = {
        "mistral3.rope.scaling.type": "yarn",
        "mistral3.attention.temperature_scale": 0.1,
        "mistral3.expert_count": 8,
    }
    for key, value in unsupported.items():
        path = made.write_gguf(tmp_path / "u.gguf", {**metadata, key: value}, tensors)
        with pytest.raises(ModelError, match="not supported"):
            made.check(path)
