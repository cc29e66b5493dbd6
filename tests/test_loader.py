"""Opening models: families, tensors, errors, and quantizing while loading."""

from __future__ import annotations

import contextlib
import json
import shutil
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGMLQuantizationType, GGUFWriter
from gguf.quants import dequantize as reference_dequantize
from gguf.quants import quantize as reference_quantize
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

import ruvllm_candle_like.hooks
import ruvllm_quantizers.hooks
from ruvllm_core.errors import FormatError, ModelError, ModelNotFound, QuantizationError
from ruvllm_core.hookspecs import API_VERSION, Offer, hookimpl
from ruvllm_core.model.loader import ModelFile, open_model, quantize_weights
from ruvllm_core.model.quant import QuantTensor
from ruvllm_core.registry import Registry
from ruvllm_core.settings import Settings

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 40,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
}


def weights_of(names: dict[str, tuple[int, ...]], dtype: Any = np.float32) -> dict[str, Any]:
    generator = np.random.default_rng(0)
    return {name: generator.standard_normal(shape).astype(dtype) for name, shape in names.items()}


def shapes(prefix: str, names: tuple[str, ...]) -> Iterator[tuple[str, tuple[int, ...]]]:
    wanted = ((256,), (256, 256), (128, 256), (128, 256), (256, 256), (256,), (512, 256), (512, 256), (256, 512))
    for layer in range(2):
        for name, shape in zip(names, wanted, strict=True):
            yield f"{prefix}{layer}.{name}.weight", shape


HF_NAMES: dict[str, tuple[int, ...]] = {
    "model.embed_tokens.weight": (40, 256),
    "model.norm.weight": (256,),
    "lm_head.weight": (40, 256),
    **dict(
        shapes(
            "model.layers.",
            (
                "input_layernorm",
                *(f"self_attn.{name}_proj" for name in "qkvo"),
                "post_attention_layernorm",
                *(f"mlp.{name}_proj" for name in ("gate", "up", "down")),
            ),
        )
    ),
}
GGUF_NAMES: dict[str, tuple[int, ...]] = {
    "token_embd.weight": (40, 256),
    "output_norm.weight": (256,),
    **dict(
        shapes(
            "blk.",
            (
                *("attn_norm", "attn_q", "attn_k", "attn_v", "attn_output"),
                *("ffn_norm", "ffn_gate", "ffn_up", "ffn_down"),
            ),
        )
    ),
}


@pytest.fixture(scope="module")
def registry() -> Registry:
    registry = Registry(Settings())
    registry.register(ruvllm_candle_like.hooks, "candle_like", "ruvllm-candle-like", "0.1.0")
    registry.register(ruvllm_quantizers.hooks, "quantizers", "ruvllm-quantizers", "0.1.0")
    return registry


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "model"
    path.mkdir()
    (path / "config.json").write_text(json.dumps(CONFIG))
    save_file(weights_of(HF_NAMES), path / "model.safetensors")
    return path


def change(folder: Path, **tensors: Any) -> None:
    """Add tensors to the checkpoint, or take away those that are None."""
    held = {**load_file(folder / "model.safetensors"), **tensors}
    save_file({name: value for name, value in held.items() if value is not None}, folder / "model.safetensors")


def write_gguf(path: Path, architecture: str = "llama", scheme: str = "F32", **more: Any) -> Path:
    """A GGUF file from the gguf package's own writer; `more` are tensors, or integers and strings as metadata."""
    writer = GGUFWriter(path, architecture)
    for key, value in {
        "block_count": 2,
        "context_length": 64,
        "embedding_length": 256,
        "feed_forward_length": 512,
        "attention.head_count": 4,
        "attention.head_count_kv": 2,
    }.items():
        writer.add_uint32(f"llama.{key}", value)
    writer.add_float32("llama.attention.layer_norm_rms_epsilon", 1e-5)
    tensors = weights_of(GGUF_NAMES)
    for name, value in more.items():
        if isinstance(value, int):
            writer.add_uint32(name, value)
        elif isinstance(value, str):
            writer.add_string(name, value)
        else:
            tensors[name] = value
    kind = GGMLQuantizationType[scheme]
    for name, values in tensors.items():
        matrix = values.ndim == 2
        data = reference_quantize(values, kind) if matrix else values
        writer.add_tensor(name, data, raw_dtype=kind if matrix else None)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_folder(folder: Path, registry: Registry) -> None:
    model = open_model(folder, registry)
    stored = load_file(folder / "model.safetensors")
    assert model.path == folder
    assert model.spec.architecture == "llama"
    assert model.scheme == "f32"
    assert model.file_bytes == (folder / "model.safetensors").stat().st_size
    assert len(model.weights) == len(HF_NAMES)
    for canonical, source in model.sources.items():
        assert np.array_equal(model.weights[canonical].dequantize(), stored[source.hf])
        assert not model.weights[canonical].data.flags.owndata, "weights are views of the file"
    model.check_finite()
    model.close()
    assert not model.weights


def test_gguf(tmp_path: Path, registry: Registry) -> None:
    path = write_gguf(tmp_path / "m.gguf", scheme="Q8_0")
    model = open_model(path, registry)
    assert (model.scheme, model.file_bytes, model.spec.tied_embeddings) == ("q8_0", path.stat().st_size, True)
    expected = reference_quantize(weights_of(GGUF_NAMES)["blk.1.attn_v.weight"], GGMLQuantizationType.Q8_0)
    assert np.array_equal(model.weights["layers.1.attn.v"].data, expected)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"model.norm.weight": None}, r"model: the tensor 'model\.norm\.weight' is missing"),
        (
            {"lm_head.weight": np.ones((41, 256), np.float32)},
            r"'lm_head\.weight' should have the shape \(40, 256\), found \(41, 256\)",
        ),
        ({"model.norm.weight": np.ones((256,))}, r"'model\.norm\.weight' has type F64, which cannot be read"),
        ({"lm_head.bias": np.ones(40, np.float32)}, r"'lm_head\.bias' has no place in this model family"),
        (
            {"model.layers.0.self_attn.q_norm.weight": np.ones(64, np.float32)},
            r"q_norm\.weight' has no place in this model family",
        ),
    ],
)
def test_wrong_tensors(folder: Path, registry: Registry, tensors: dict[str, Any], message: str) -> None:
    change(folder, **tensors)
    with pytest.raises(FormatError, match=message):
        open_model(folder, registry)


def test_harmless_tensors(folder: Path, registry: Registry) -> None:
    change(
        folder,
        **{
            "model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(32),
            "score.weight": np.ones((2, 256), np.float32),
        },
    )
    assert len(open_model(folder, registry).weights) == len(HF_NAMES)


def test_not_finite(folder: Path, registry: Registry) -> None:
    broken = np.ones(256, np.float32)
    broken[[3, 7]] = np.nan, np.inf
    change(folder, **{"model.layers.1.input_layernorm.weight": broken})
    model = open_model(folder, registry)
    with pytest.raises(FormatError, match=r"tensor 'layers\.1\.attn_norm' \(f32\) has 2 values or scales NaN"):
        model.check_finite()


def test_no_model(tmp_path: Path, registry: Registry) -> None:
    with pytest.raises(ModelNotFound, match="no such file"):
        open_model(tmp_path / "none.gguf", registry)
    with pytest.raises(ModelNotFound, match=r"no such file: .*config\.json"):
        open_model(tmp_path, registry)


def test_folder_without_weights(folder: Path, registry: Registry) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(ModelNotFound, match=r"neither model\.safetensors nor .*\n  only safetensors and GGUF"):
        open_model(folder, registry)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"architecture": "lama"}, r"m\.gguf: no installed plugin knows the model family 'lama'\n  did you mean llama"),
        ({"split.count": 3}, r"m\.gguf is one of 3 parts of a split model"),
        ({"split.count": "two"}, r"m\.gguf: the field 'split\.count' should be an integer, found 'two'"),
        ({"llama.expert_count": 8}, r"m\.gguf: models with experts are not supported \(expert_count is 8\)"),
        ({"llama.attention.value_length": 32}, r"differ in width are not supported \(attention\.value_length\)"),
        (
            {"llama.attention.sliding_window": 8, "llama.attention.sliding_window_pattern": 2},
            "should say of each layer",
        ),
        ({"blk.0.attn_q_norm.weight": np.ones(64, np.float32)}, r"'blk\.0\.attn_q_norm\.weight' has no place"),
        ({"blk.1.attn_q.bias": np.ones(256, np.float32)}, r"'blk\.1\.attn_q\.bias' has no place"),
        ({"rope_freqs.weight": np.zeros(32, np.float32)}, r"'rope_freqs\.weight' should hold positive factors"),
        ({"rope_freqs.weight": np.ones(16, np.float32)}, "rope freq_factors has 16 entries, rope_dim needs 32"),
    ],
)
def test_wrong_gguf(tmp_path: Path, registry: Registry, more: dict[str, Any], message: str) -> None:
    path = write_gguf(tmp_path / "m.gguf", **more)
    with pytest.raises(ModelError, match=message):
        open_model(path, registry)


def test_gguf_without_a_family(tmp_path: Path, registry: Registry) -> None:
    writer = GGUFWriter(tmp_path / "m.gguf", "llama")
    writer.kv_data[0].pop("general.architecture")
    writer.add_uint32("general.quantization_version", 2)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ModelError, match=r"m\.gguf: the field 'general\.architecture' \(a string\) is missing"):
        open_model(tmp_path / "m.gguf", registry)


def opened(path: Path, registry: Registry) -> tuple[ModelFile, dict[str, Any]]:
    model = open_model(path, registry)
    return model, {name: tensor.dequantize() for name, tensor in model.weights.items()}


def test_quantize_while_loading(folder: Path, registry: Registry) -> None:
    model, before = opened(folder, registry)
    quantize_weights(model, registry.load("quantizers", "q8_0"))
    assert model.scheme == "q8_0"
    for name, tensor in model.weights.items():
        if len(tensor.shape) == 1:
            assert tensor.scheme == "f32"
        else:
            assert np.array_equal(tensor.data, reference_quantize(before[name], GGMLQuantizationType.Q8_0))
    again = dict(model.weights)
    quantize_weights(model, registry.load("quantizers", "q8_0"))
    assert model.weights == again, "what has the scheme already is left alone"


def test_quantize_by_recipe(folder: Path, registry: Registry) -> None:
    """Recipes know tensors by their GGUF names; the pieces of a large matrix make one matrix."""
    from ruvllm_core.model import loader

    model, before = opened(folder, registry)
    pieces, loader._QUANTIZED_AT_ONCE = loader._QUANTIZED_AT_ONCE, 256 * 100
    try:
        quantize_weights(model, registry.load("quantizers", "q4_k_m"))
    finally:
        loader._QUANTIZED_AT_ONCE = pieces
    schemes = {name: tensor.scheme for name, tensor in model.weights.items()}
    assert schemes["lm_head"] == "q6_k"
    assert schemes["embed"] == schemes["layers.0.attn.q"] == schemes["layers.1.mlp.gate"] == "q4_k"
    assert {schemes[f"layers.{n}.{site}"] for n in range(2) for site in ("attn.v", "mlp.down")} >= {"q6_k"}
    for name, tensor in model.weights.items():
        if len(tensor.shape) == 2:
            kind = GGMLQuantizationType[tensor.scheme.upper()]
            theirs = reference_dequantize(tensor.data, kind)
            error = np.sqrt(np.mean((theirs - before[name]) ** 2)) / before[name].std()
            assert error < (0.03 if tensor.scheme == "q6_k" else 0.1)


def test_tied_embedding_counts_as_output(tmp_path: Path, registry: Registry) -> None:
    model = open_model(write_gguf(tmp_path / "m.gguf"), registry)
    quantize_weights(model, registry.load("quantizers", "q4_k_m"))
    assert model.weights["embed"].scheme == "q6_k"


def test_quantized_already(tmp_path: Path, registry: Registry) -> None:
    model = open_model(write_gguf(tmp_path / "m.gguf", scheme="Q8_0"), registry)
    held = dict(model.weights)
    with pytest.raises(QuantizationError, match=r"m\.gguf cannot be quantized to q4_0 .* already \(q8_0"):
        quantize_weights(model, registry.load("quantizers", "q4_0"))
    assert model.weights == held
    quantize_weights(model, registry.load("quantizers", "q8_0"))
    assert model.weights == held


NUMBERS = (0, -1, 1, 3, 7, 10**9, 10**400, 0.5, -2.0, 1e-320, 1e308, float("nan"), float("inf"))
OTHERS = (None, True, "8", "", [], [1], [[1]], {}, {"factor": 1}, "yarn", "longrope", "llama3", [1.0] * 32)
ODD = st.sampled_from((*NUMBERS, *OTHERS))
ODD_METADATA = st.sampled_from((4, *NUMBERS, True, "8", "yarn", ["x"], np.ones(2, np.float32), np.array([True])))
ROPE = st.dictionaries(
    st.sampled_from(["rope_type", "factor", "rope_theta", "low_freq_factor", "high_freq_factor", "beta_fast"])
    | st.sampled_from(["short_factor", "long_factor", "original_max_position_embeddings", "partial_rotary_factor"]),
    ODD,
)


@pytest.mark.parametrize("family", ["llama", "qwen2", "phi3"])
@settings(max_examples=300, deadline=None)
@given(st.data())
def test_odd_values_give_a_spec_or_a_model_error(registry: Registry, family: str, data: st.DataObject) -> None:
    architecture = registry.load("architectures", family)
    config = {**CONFIG, "use_sliding_window": True, "sliding_window": 4, "head_dim": 64, "layer_types": None}
    config |= data.draw(st.dictionaries(st.sampled_from(sorted(config)), ODD, max_size=2))
    config["rope_scaling"] = data.draw(ROPE | ODD)
    with contextlib.suppress(ModelError):
        spec = architecture.spec_from_hf(config)
        assert len(architecture.tensor_names(spec)) >= 9 * spec.num_layers
    keys = ("block_count", "context_length", "embedding_length", "feed_forward_length", "rope.dimension_count")
    keys += ("attention.head_count", "attention.head_count_kv", "attention.key_length", "rope.scaling.type")
    keys += ("attention.layer_norm_rms_epsilon", "rope.freq_base", "rope.scaling.factor", "attention.sliding_window")
    metadata = {"general.architecture": family, **{f"{family}.{key}": data.draw(ODD_METADATA) for key in keys}}
    embedding = QuantTensor.from_float(np.ones((8, 4), np.float32))
    with contextlib.suppress(ModelError):
        architecture.spec_from_gguf(metadata, {"token_embd.weight": embedding}.get)


def test_no_registered_family(folder: Path) -> None:
    with pytest.raises(
        ModelError, match="no installed plugin knows the model family 'LlamaForCausalLM'\n  there are none"
    ):
        open_model(folder, Registry(Settings()))


def test_a_broken_family_is_in_nobodys_way(folder: Path, registry: Registry) -> None:
    broken = types.ModuleType("broken_hooks")
    broken.RUVLLM_API_VERSION = API_VERSION  # type: ignore[attr-defined]
    offers = [Offer("lost", "module_that_is_nowhere:family")]
    broken.architectures = hookimpl(lambda: offers, specname="architectures")  # type: ignore[attr-defined]
    registry.register(broken, "broken", "ruvllm-broken", "1.0")
    assert open_model(folder, registry).spec.architecture == "llama"
    (folder / "config.json").write_text(json.dumps({**CONFIG, "architectures": ["LostForCausalLM"]}))
    with pytest.raises(ModelError) as caught:
        open_model(folder, registry)
    for part in ("'LostForCausalLM'; not in use: broken (", "'lost' of ruvllm-broken 1.0", "module_that_is_nowhere"):
        assert part in caught.value.message


def test_tokenizer_must_fit(tmp_path: Path, folder: Path, registry: Registry) -> None:
    from tokenizers import Tokenizer, models

    from ruvllm_core.errors import TokenizerError

    vocabulary = {f"t{i}": i for i in range(41)}
    Tokenizer(models.BPE(vocab=vocabulary, merges=[])).save(str(folder / "tokenizer.json"))
    with pytest.raises(TokenizerError):
        open_model(folder, registry).tokenizer()
    shutil.rmtree(folder)
