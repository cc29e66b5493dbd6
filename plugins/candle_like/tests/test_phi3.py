"""Phi-3 against transformers."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import Phi3Config

from ruvllm_core.errors import FormatError, ModelError

#: The first 20 positions are the original context of the longrope models here, the maximum is 128.
ORIGINAL = 20


def longrope(pairs: int) -> dict[str, Any]:
    return {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "short_factor": [1.0 + 0.05 * i for i in range(pairs)],
        "long_factor": [1.5 + 0.7 * i for i in range(pairs)],
        "original_max_position_embeddings": ORIGINAL,
    }


def long_config(sizes: dict[str, Any], **more: Any) -> Phi3Config:
    return Phi3Config(**sizes, rope_parameters=longrope(8), original_max_position_embeddings=ORIGINAL, **more)


def gguf_of_long(made: Any, path: Path, metadata: dict[str, Any]) -> Path:
    tensors = made.gguf_tensors(permute=False)
    for name in ("short", "long"):
        factors = np.array(made.config.rope_parameters[f"{name}_factor"], dtype=np.float32)
        tensors[f"rope_factors_{name}.weight"] = factors
    common = {
        "general.architecture": "phi3",
        "phi3.rope.dimension_count": 2 * len(factors),
        "phi3.rope.scaling.original_context_length": ORIGINAL,
        "phi3.attention.sliding_window": 0,
    }
    return made.write_gguf(path, {**common, **metadata}, tensors)


def test_names_and_sizes(check_names: Any) -> None:
    assert check_names(Phi3Config(), "phi3").parameters == 3_821_079_552, "Phi-3-mini as published"
    check_names(Phi3Config(num_key_value_heads=8, tie_word_embeddings=True, num_hidden_layers=2), "phi3")


def test_short_context_model(oracle: Any, sizes: Any) -> None:
    spec = oracle(Phi3Config(**sizes)).check().spec
    assert spec.rope_scaling.kind == "none"
    assert spec.sliding_window is None


def test_sliding_window(oracle: Any, sizes: Any) -> None:
    assert oracle(Phi3Config(**sizes, sliding_window=7)).check().spec.sliding_window == 7


def test_longrope_within_and_beyond_the_original_context(oracle: Any, sizes: Any) -> None:
    made = oracle(long_config(sizes))
    made.check(length=ORIGINAL)
    spec = made.check(length=ORIGINAL + 1).spec
    made.check(length=40)
    assert spec.rope_scaling.factor == 128 / ORIGINAL
    assert (spec.rope_variant(ORIGINAL), spec.rope_variant(ORIGINAL + 1)) == (0, 1)


def test_factors_matter(oracle: Any, sizes: Any) -> None:
    """The long factors change what is said, so the comparison above tells one from the other."""
    made = oracle(long_config(sizes))
    with pytest.raises(AssertionError, match="off by"):
        made.check(length=ORIGINAL, capacity=ORIGINAL + 1)


def test_old_configuration_files(oracle: Any, sizes: Any) -> None:
    made = oracle(long_config(sizes, tie_word_embeddings=True))
    model = made.check()
    scaling = {name: value for name, value in longrope(8).items() if name.endswith("_factor")}
    made.edit_config(rope_parameters=None, rope_theta=10000.0, rope_scaling={"type": "su", **scaling})
    assert made.check().spec == model.spec


def test_partial_rotary(oracle: Any, sizes: Any) -> None:
    rope = {**longrope(6), "partial_rotary_factor": 0.75}
    config = Phi3Config(**sizes, rope_parameters=rope, original_max_position_embeddings=ORIGINAL)
    spec = oracle(config).check().spec
    assert (spec.head_dim, spec.rope_dim) == (16, 12)


def test_gguf(oracle: Any, sizes: Any, tmp_path: Path) -> None:
    made = oracle(Phi3Config(**sizes, sliding_window=7))
    metadata = {"general.architecture": "phi3", "phi3.attention.sliding_window": 7}
    spec = made.check(made.write_gguf(tmp_path / "m.gguf", metadata, made.gguf_tensors(permute=False))).spec
    assert not spec.rope_interleaved


def test_gguf_without_window(oracle: Any, sizes: Any, tmp_path: Path) -> None:
    made = oracle(Phi3Config(**sizes))
    metadata = {"general.architecture": "phi3", "phi3.attention.sliding_window": 0}
    path = made.write_gguf(tmp_path / "m.gguf", metadata, made.gguf_tensors(permute=False))
    assert made.check(path).spec.sliding_window is None
    made.check_their_reading(path)


@pytest.mark.parametrize("explicit", [False, True], ids=["rule", "attn_factor"])
def test_gguf_longrope(oracle: Any, sizes: Any, tmp_path: Path, explicit: bool) -> None:
    made = oracle(long_config(sizes))
    factor = math.sqrt(1 + math.log(128 / ORIGINAL) / math.log(ORIGINAL))
    metadata = {"phi3.rope.scaling.type": "longrope", "phi3.rope.scaling.attn_factor": factor} if explicit else {}
    path = gguf_of_long(made, tmp_path / "m.gguf", metadata)
    made.check(path, length=ORIGINAL)
    made.check(path, length=40)


def test_gguf_partial_rotary(oracle: Any, sizes: Any, tmp_path: Path) -> None:
    rope = {**longrope(6), "partial_rotary_factor": 0.75}
    made = oracle(Phi3Config(**sizes, rope_parameters=rope, original_max_position_embeddings=ORIGINAL))
    made.check(gguf_of_long(made, tmp_path / "m.gguf", {}))


def test_fused_tensor_of_another_size(oracle: Any, sizes: Any) -> None:
    made = oracle(Phi3Config(**sizes))
    made.edit_config(num_key_value_heads=1)
    with pytest.raises(FormatError, match=r"qkv_proj\.weight' should have the shape \(96, 64\), found \(128, 64\)"):
        made.check()


def test_wrong_rope(oracle: Any, sizes: Any, tmp_path: Path) -> None:
    made = oracle(long_config(sizes))
    made.edit_config(rope_parameters={**longrope(8), "long_factor": [1.0] * 7})
    with pytest.raises(ModelError, match="rope long_factors has 7 entries, rope_dim needs 8"):
        made.check()
    made.edit_config(rope_parameters={**longrope(8), "short_factor": [1.0, "x"]})
    with pytest.raises(ModelError, match=r"'rope_parameters\.short_factor' should be a list of numbers"):
        made.check()
    made.edit_config(rope_parameters={"rope_type": "yarn", "factor": 2.0})
    with pytest.raises(ModelError, match="rope scaling 'yarn' is none that Phi-3 models have"):
        made.check()
    tensors = made.gguf_tensors(permute=False)
    tensors["rope_factors_long.weight"] = np.ones(8, dtype=np.float32)
    path = made.write_gguf(tmp_path / "m.gguf", {"general.architecture": "phi3"}, tensors)
    with pytest.raises(ModelError, match=r"longrope needs the tensors 'rope_factors_short\.weight'"):
        made.check(path)
