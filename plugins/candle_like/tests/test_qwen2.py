"""Qwen 2 and 2.5 against transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import Qwen2Config

from ruvllm_core.errors import FormatError, ModelError

PLAIN = {"rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0}}
WINDOW = {"use_sliding_window": True, "sliding_window": 6}


@pytest.mark.parametrize("tied", [False, True])
def test_qwen2(oracle: Any, sizes: Any, tied: bool) -> None:
    spec = oracle(Qwen2Config(**sizes, **PLAIN, tie_word_embeddings=tied)).check().spec
    assert spec.qkv_bias
    assert spec.tied_embeddings is tied
    assert spec.sliding_window is None
    assert spec.rope_theta == 1000000.0


def test_names_and_sizes(check_names: Any) -> None:
    check_names(Qwen2Config(), "qwen2")
    tied = Qwen2Config(
        vocab_size=151936,
        hidden_size=896,
        intermediate_size=4864,
        num_hidden_layers=24,
        num_attention_heads=14,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    )
    assert check_names(tied, "qwen2").parameters == 494_032_768, "Qwen2.5-0.5B as published"


def test_sliding_layers(oracle: Any, sizes: Any) -> None:
    made = oracle(Qwen2Config(**sizes, **PLAIN, **WINDOW, max_window_layers=1))
    model = made.check()
    assert [model.spec.window_of(n) for n in range(3)] == [None, 6, 6]
    made.edit_config(layer_types=None)  # older configurations leave it to max_window_layers
    assert made.check().spec == model.spec


def test_layer_types(oracle: Any, sizes: Any) -> None:
    types = ["sliding_attention", "full_attention", "sliding_attention"]
    spec = oracle(Qwen2Config(**sizes, **PLAIN, **WINDOW, layer_types=types)).check().spec
    assert [spec.window_of(n) for n in range(3)] == [6, None, 6]


def test_gguf(oracle: Any, sizes: Any, tmp_path: Path) -> None:
    made = oracle(Qwen2Config(**sizes, **PLAIN, tie_word_embeddings=True))
    path = made.write_gguf(tmp_path / "m.gguf", {"general.architecture": "qwen2"}, made.gguf_tensors(permute=False))
    spec = made.check(path).spec
    made.check_their_reading(path)
    assert not spec.rope_interleaved
    assert spec.tied_embeddings


def test_gguf_with_window_pattern(oracle: Any, sizes: Any, tmp_path: Path) -> None:
    made = oracle(Qwen2Config(**sizes, **PLAIN, **WINDOW, max_window_layers=1))
    metadata = {
        "general.architecture": "qwen2",
        "qwen2.attention.sliding_window": 6,
        "qwen2.attention.sliding_window_pattern": np.array([False, True, True]),
    }
    made.check(made.write_gguf(tmp_path / "m.gguf", metadata, made.gguf_tensors(permute=False)))


def test_missing_bias_is_an_error(oracle: Any, sizes: Any, tmp_path: Path) -> None:
    made = oracle(Qwen2Config(**sizes, **PLAIN))
    tensors = made.gguf_tensors(permute=False)
    del tensors["blk.1.attn_k.bias"]
    path = made.write_gguf(tmp_path / "m.gguf", {"general.architecture": "qwen2"}, tensors)
    with pytest.raises(FormatError, match=r"m\.gguf: the tensor 'blk\.1\.attn_k\.bias' is missing"):
        made.check(path)


def test_wrong_layer_types(oracle: Any, sizes: Any) -> None:
    made = oracle(Qwen2Config(**sizes, **PLAIN, **WINDOW))
    made.edit_config(layer_types=["full_attention", "chunked_attention", "full_attention"])
    with pytest.raises(ModelError, match="layer_types should list sliding_attention or full_attention"):
        made.check()
    made.edit_config(layer_types=["sliding_attention"])
    with pytest.raises(ModelError, match="sliding_layers names 1 layers, not all"):
        made.check()
