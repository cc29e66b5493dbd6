"""Adapters to PEFT and back, with peft and transformers as the oracle of what an adapter does."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.numpy import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, Phi3Config, Qwen2Config

from ruvllm_core.errors import LearningError
from ruvllm_core.model.loader import ModelFile, open_model
from ruvllm_core.protocols import Adapter, LowRank
from ruvllm_core.testing.tiny import tiny_decoder, whole
from ruvllm_sona.fingerprint import Fingerprint
from ruvllm_sona.peft_export import export_peft
from ruvllm_sona.peft_import import import_peft
from ruvllm_sona.peft_modules import hf_order
from ruvllm_sona.sites import final_site, linear_sites

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
FAMILIES: dict[str, Callable[..., Any]] = {
    "llama": LlamaConfig,
    "llama tied": lambda **sizes: LlamaConfig(**sizes, tie_word_embeddings=True),
    "llama biases": lambda **sizes: LlamaConfig(**sizes, attention_bias=True, mlp_bias=True, head_dim=24),
    "qwen2": Qwen2Config,
    "qwen2 tied": lambda **sizes: Qwen2Config(**sizes, tie_word_embeddings=True),
    "mistral": lambda **sizes: MistralConfig(**sizes, sliding_window=11),
    "phi3": Phi3Config,
    "phi3 tied": lambda **sizes: Phi3Config(**sizes, tie_word_embeddings=True),
}


def random_deltas(model: ModelFile, seed: int = 0, final: bool = True) -> dict[str, LowRank]:
    """Ranks and scales that differ from site to site; in layer 1 only some sites."""
    random = np.random.default_rng(seed)
    shapes = {**linear_sites(model.spec), **(final_site(model.spec) if final else {})}
    found = {}
    for index, (site, (rows, columns)) in enumerate(shapes.items()):
        if site.startswith("layers.1.") and index % 2:
            continue
        rank = 1 + index % 3
        a = random.normal(0.0, columns**-0.5, (rank, columns)).astype(np.float32)
        b = random.normal(0.0, 0.2, (rows, rank)).astype(np.float32)
        found[site] = LowRank(a, b, (0.5, 1.0, -0.3)[index % 3])
    return found


def ours(model: ModelFile, deltas: dict[str, LowRank] | None, tokens: list[int]) -> np.ndarray:
    adapter = Adapter("x", deltas) if deltas else None
    decoder = tiny_decoder(replace(model.spec, max_context=64), model.weights)
    return whole(decoder, tokens, 64, adapter)


def theirs(made: Any, folder: Path) -> np.ndarray:
    """Logits of PEFT, on a fresh copy of the model."""
    base = AutoModelForCausalLM.from_pretrained(made.folder, dtype=torch.float32, attn_implementation="eager")
    tuned = PeftModel.from_pretrained(base, str(folder)).eval()
    with torch.inference_mode():
        return tuned(torch.tensor([made.tokens])).logits[0].numpy()


def assert_same(got: np.ndarray, expected: np.ndarray) -> None:
    assert np.abs(got - expected).max() <= 1e-4 * np.abs(expected).max()


def assert_same_deltas(got: dict[str, LowRank], expected: dict[str, LowRank]) -> None:
    assert list(got) == list(expected) or set(got) == set(expected)
    for site, delta in expected.items():
        assert got[site].a.shape == delta.a.shape, site
        change = delta.scale * (delta.b @ delta.a)
        off = got[site].scale * (got[site].b @ got[site].a) - change
        assert np.abs(off).max() <= 1e-4 * np.abs(change).max(), site


def export(deltas: dict[str, LowRank], model: ModelFile, folder: Path) -> Path:
    export_peft(deltas, model.spec, model.sources, folder, base_model="tiny", weights=model.weights)
    return folder


def back(folder: Path, model: ModelFile, **more: Any) -> dict[str, LowRank]:
    return import_peft(folder, model.spec, model.sources, weights=model.weights, **more)


@pytest.fixture
def made(oracle: Any, sizes: Any) -> Any:
    return oracle(LlamaConfig(**sizes))


@pytest.fixture
def model(made: Any) -> ModelFile:
    return open_model(made.folder, made.registry)


@pytest.mark.parametrize("family", FAMILIES)
def test_peft_says_what_we_say(oracle: Any, sizes: Any, tmp_path: Path, family: str) -> None:
    made = oracle(FAMILIES[family](**sizes))
    model = open_model(made.folder, made.registry)
    deltas = random_deltas(model)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*(inconsistency|missing|unexpected).*")
        expected = theirs(made, export(deltas, model, tmp_path / "adapter"))
    got = ours(model, deltas, made.tokens)
    assert_same(got, expected)
    plain = made.logits(made.tokens)
    assert np.abs(expected - plain).max() > 0.1 * np.abs(plain).max()
    again = back(tmp_path / "adapter", model)
    assert_same_deltas(again, deltas)
    assert_same(ours(model, again, made.tokens), expected)
    assert_same(theirs(made, export(again, model, tmp_path / "again")), expected)


@pytest.mark.parametrize("tied", [False, True])
def test_rows_of_gguf_files_are_put_in_order(oracle: Any, sizes: Any, tmp_path: Path, tied: bool) -> None:
    made = oracle(LlamaConfig(**sizes, tie_word_embeddings=tied))
    metadata = {"general.architecture": "llama", "llama.rope.dimension_count": 16}
    path = made.write_gguf(tmp_path / "m.gguf", metadata, made.gguf_tensors(permute=True))
    model = open_model(path, made.registry)
    assert model.spec.rope_interleaved
    deltas = random_deltas(model)
    expected = theirs(made, export(deltas, model, tmp_path / "adapter"))
    assert_same(ours(model, deltas, made.tokens), expected)
    assert_same_deltas(back(tmp_path / "adapter", model), deltas)
    # The same adapter on the model's other file, whose rows are as PEFT has them.
    other = open_model(made.folder, made.registry)
    assert_same(ours(other, back(tmp_path / "adapter", other), made.tokens), expected)


def test_order_of_partly_rotated_heads(model: ModelFile) -> None:
    spec = replace(model.spec, rope_interleaved=True, head_dim=6, rope_dim=4, num_heads=2)
    order = hf_order(spec, "layers.0.attn.q")
    assert order is not None
    assert order.tolist() == [0, 2, 1, 3, 4, 5, 6, 8, 7, 9, 10, 11]
    assert hf_order(spec, "layers.0.attn.v") is None


@pytest.mark.parametrize("family", ["llama", "phi3", "qwen2 tied"])
@pytest.mark.parametrize("rslora", [False, True])
def test_what_peft_wrote(oracle: Any, sizes: Any, tmp_path: Path, family: str, rslora: bool) -> None:
    made = oracle(FAMILIES[family](**sizes))
    last = ["qkv_proj", "down_proj"] if family == "phi3" else ["q_proj", "v_proj", "up_proj"]
    config = LoraConfig(
        r=4,
        lora_alpha=6,
        target_modules=last,
        use_rslora=rslora,
        rank_pattern={last[-1]: 2, rf"layers\.[12]\.self_attn\.{last[0]}": 3},
        alpha_pattern={f"0.self_attn.{last[0]}": 5, last[1]: 1},
    )
    tuned = get_peft_model(made.model, config).eval()
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.2)
    tuned.save_pretrained(tmp_path / "adapter")
    with torch.inference_mode():
        expected = tuned(torch.tensor([made.tokens])).logits[0].numpy()
    model = open_model(made.folder, made.registry)
    deltas = back(tmp_path / "adapter", model)
    assert_same(ours(model, deltas, made.tokens), expected)
    plain = ours(model, None, made.tokens)
    assert np.abs(expected - plain).max() > 0.02 * np.abs(plain).max()
    assert {len(delta.a) for delta in deltas.values()} == {4, 3, 2}


def test_peft_keeps_the_input_side_of_a_tied_embedding(oracle: Any, sizes: Any, tmp_path: Path) -> None:
    """PEFT keeps the delta beside the shared matrix; only merging it there spoils the input side."""
    made = oracle(LlamaConfig(**sizes, tie_word_embeddings=True))
    model = open_model(made.folder, made.registry)
    deltas = {"final": random_deltas(model)["final"]}
    expected = ours(model, deltas, made.tokens)
    folder = export(deltas, model, tmp_path / "adapter")
    base = AutoModelForCausalLM.from_pretrained(made.folder, dtype=torch.float32, attn_implementation="eager")
    tuned = PeftModel.from_pretrained(base, str(folder)).eval()
    tokens = torch.tensor([made.tokens])
    with torch.inference_mode():
        assert_same(tuned(tokens).logits[0].numpy(), expected)
        tuned.save_pretrained(tmp_path / "resaved")
        resaved = load_file(tmp_path / "resaved" / WEIGHTS)
        assert any("base_layer" in name or "embed_tokens" in name for name in resaved), "PEFT adds the embedding"
        assert_same_deltas(back(tmp_path / "resaved", model), deltas)
        with pytest.warns(UserWarning, match="tie_word_embeddings"):
            merged = tuned.merge_and_unload()
        assert np.abs(merged(tokens).logits[0].numpy() - expected).max() > 0.05 * np.abs(expected).max()
        # Untied first, as PEFT's warning advises, merging is exact.
        base = AutoModelForCausalLM.from_pretrained(made.folder, dtype=torch.float32, tie_word_embeddings=False)
        base.lm_head.weight.data = base.model.embed_tokens.weight.data.clone()
        merged = PeftModel.from_pretrained(base, str(folder)).merge_and_unload().eval()
        assert_same(merged(tokens).logits[0].numpy(), expected)
    # Tied adapters are something else, so the configuration has to say that these are none.
    assert json.loads((folder / CONFIG).read_text())["ensure_weight_tying"] is False
    edit_config(folder, ensure_weight_tying=True)
    assert np.abs(theirs(made, folder) - expected).max() > 0.05 * np.abs(expected).max()
    with pytest.raises(LearningError, match="'ensure_weight_tying' is True, which is not supported"):
        back(folder, model)
    # With another embedding in it, the file is no longer an adapter of this model.
    name = next(name for name in resaved if "lora" not in name)
    save_file({**resaved, name: resaved[name] + 1.0}, tmp_path / "resaved" / WEIGHTS)
    with pytest.raises(LearningError, match="replaces the model's own embedding"):
        back(tmp_path / "resaved", model)


def test_a_foreign_delta_of_the_head_is_refused(made: Any, model: ModelFile, tmp_path: Path) -> None:
    tuned = get_peft_model(made.model, LoraConfig(r=2, target_modules=["lm_head"], init_lora_weights=False))
    tuned.save_pretrained(tmp_path)
    with pytest.raises(LearningError, match=r"\d+% of the delta of 'lm_head' cannot be had by changing hidden states"):
        back(tmp_path, model)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"use_dora": True}, "use_dora"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"bias": "lora_only"}, "bias"),
        ({"lora_bias": True, "init_lora_weights": False}, "lora_bias"),
        ({"trainable_token_indices": [1, 2]}, "trainable_token_indices"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights"),
        ({"layer_replication": [(0, 2), (1, 3)]}, "layer_replication"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_refused_by_name(oracle: Any, sizes: Any, tmp_path: Path, options: dict[str, Any], named: str) -> None:
    made = oracle(LlamaConfig(**sizes, attention_bias=True))
    model = open_model(made.folder, made.registry)
    tuned = get_peft_model(made.model, LoraConfig(r=2, target_modules=["q_proj", "v_proj"], **options))
    tuned.save_pretrained(tmp_path)
    with pytest.raises(LearningError, match=f"'{named}' is .* not supported"):
        back(tmp_path, model)


def test_embedding_deltas_and_other_kinds_are_refused(made: Any, model: ModelFile, tmp_path: Path) -> None:
    get_peft_model(made.model, LoraConfig(r=2, target_modules=["embed_tokens"])).save_pretrained(tmp_path)
    with pytest.raises(LearningError, match="lora_embedding_A' cannot be used"):
        back(tmp_path, model)
    edit_config(tmp_path, peft_type="IA3")
    with pytest.raises(LearningError, match="of the kind 'IA3' cannot be used, only LORA"):
        back(tmp_path, model)


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / CONFIG
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def edit_weights(folder: Path, change: Callable[[dict[str, np.ndarray]], None]) -> None:
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS)


Q = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


@pytest.mark.parametrize(
    ("config", "change", "message"),
    [
        ({"something_new": 3}, None, "'something_new' is 3, which is not supported"),
        ({"r": 7, "rank_pattern": {}}, None, r"the rank of '.*' should be 7, but its factors have"),
        ({"lora_alpha": "big", "alpha_pattern": {}}, None, "should be a number, found 'big'"),
        ({"alpha_pattern": {"(": 1}}, None, "is no regular expression"),
        ({"rank_pattern": [1]}, None, "'rank_pattern' should map names to numbers"),
        ({"target_modules": ["q_proj"]}, None, "'target_modules' leaves out"),
        ({}, lambda tensors: tensors.pop(Q), "q_proj' has only one of its two factors"),
        ({}, lambda tensors: tensors.update({Q: tensors[Q][:, 1:].copy()}), r"is 64 × 64 in this model, but the"),
        ({}, lambda tensors: tensors.update({Q: tensors[Q] * np.nan}), "values that are not finite"),
        ({}, lambda tensors: tensors.update({Q.replace(".0.", ".9."): tensors[Q]}), "has no place"),
        ({}, lambda tensors: tensors.update({"x.weight": tensors[Q]}), "'x.weight' cannot be used"),
        ({}, lambda tensors: tensors.clear(), "holds no delta at all"),
    ],
)
def test_damaged(
    model: ModelFile, tmp_path: Path, config: dict[str, Any], change: Callable[[Any], None] | None, message: str
) -> None:
    export(random_deltas(model), model, tmp_path)
    edit_config(tmp_path, **config)
    if change:
        edit_weights(tmp_path, change)
    with pytest.raises(LearningError, match=message):
        back(tmp_path, model)


def test_pickles_and_empty_folders(model: ModelFile, tmp_path: Path) -> None:
    with pytest.raises(LearningError, match="holds no adapter"):
        back(tmp_path, model)
    export(random_deltas(model), model, tmp_path)
    (tmp_path / WEIGHTS).rename(tmp_path / "adapter_model.bin")
    with pytest.raises(LearningError, match="a pickle, and reading one can run any code"):
        back(tmp_path, model)


def test_what_cannot_be_exported(model: ModelFile, tmp_path: Path) -> None:
    good = random_deltas(model)["layers.0.attn.q"]
    with pytest.raises(LearningError, match="nothing in the adapter"):
        export({}, model, tmp_path)
    with pytest.raises(LearningError, match=r"no site 'layers\.0\.attn\.x'"):
        export({"layers.0.attn.x": good}, model, tmp_path)
    with pytest.raises(LearningError, match=r"'layers\.0\.mlp\.down' is 64 × 96"):
        export({"layers.0.mlp.down": good}, model, tmp_path)
    with pytest.raises(LearningError, match="not finite"):
        export({"layers.0.attn.q": replace(good, a=good.a * np.inf)}, model, tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(LearningError, match="cannot write the adapter"):
        export({"layers.0.attn.q": good}, model, tmp_path / "file")


def test_adapters_know_their_model(oracle: Any, sizes: Any, tmp_path: Path, model: ModelFile) -> None:
    deltas = random_deltas(model)
    folder = export(deltas, model, tmp_path / "adapter")
    wider = open_model(oracle(LlamaConfig(**{**sizes, "vocab_size": 97})).folder, oracle(LlamaConfig(**sizes)).registry)
    with pytest.raises(LearningError, match=r"made for another model .*96 tokens.*97 tokens"):
        back(folder, wider)
    moved = ModelFile(model.path, model.spec, dict(model.weights), model.sources, 0)
    rng = np.random.default_rng(0)

    def shake(name: str) -> None:
        tensor = moved.weights[name]
        values = tensor.dequantize() + rng.normal(0.0, 0.01, tensor.shape).astype(np.float32)
        moved.weights[name] = type(tensor).from_float(values)

    shake("layers.1.mlp.down")
    with pytest.raises(LearningError, match="other weights of this model"):
        back(folder, moved)
    shake("final_norm")
    with pytest.raises(LearningError, match="the norms differ"):
        back(folder, moved)
    assert_same_deltas(back(folder, moved, force=True), deltas)
    with pytest.raises(LearningError, match="the fingerprint of its model cannot be read"):
        Fingerprint.parse('{"architecture": 1}', "x")
    edit_weights(folder, lambda tensors: None)  # written anew without metadata, as by PEFT
    assert_same_deltas(back(folder, moved), deltas)
