"""Hugging Face folders become GGUF files that we, transformers and its tokenizers read alike."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch

from ruvllm_core.errors import FormatError, ModelError, TokenizerError
from ruvllm_core.model.gguf import GGUFFile
from ruvllm_core.model.tokenizer import Tokenizer
from ruvllm_core.registry import Registry
from ruvllm_quantizers.convert import convert
from ruvllm_quantizers.recipes import RECIPES
from ruvllm_quantizers.source import open_source
from ruvllm_quantizers.vocabulary import tokenizer_metadata

sys.path.append(str(Path(__file__).parents[3] / "tests"))
import realdata
from hard_texts import HARD_TEXTS

VOCAB = 600
BLANK = "\u2581"
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


def add_tokenizer(folder: Path, kind: str = "bytes") -> None:
    """Train a small tokenizer and save it as a model's folder has it."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

    special = ["<unk>", "<s>", "</s>", "<|endoftext|>"]
    if kind == "bytes":
        fast = Tokenizer(models.BPE())
        split = pre_tokenizers.Split(Regex(GPT2), "isolated")
        fast.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(False, use_regex=False)])
        fast.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
    else:
        fast = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
        fast.normalizer = normalizers.Sequence([normalizers.Prepend(BLANK), normalizers.Replace(" ", BLANK)])
        fast.decoder = decoders.Sequence(
            [decoders.Replace(BLANK, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        )
        special += [f"<0x{byte:02X}>" for byte in range(256)]
        alphabet = []
    trainer = trainers.BpeTrainer(vocab_size=VOCAB - 8, special_tokens=special, initial_alphabet=alphabet)
    corpus = ["The quick brown fox isn't over 1234 lazy dogs.", "def f(x):\n    return x + 12"] * 5
    fast.train_from_iterator(corpus, trainer)
    fast.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    path = folder / "tokenizer.json"
    fast.save(str(path))
    saved = json.loads(path.read_text())
    saved["added_tokens"] = [t for t in saved["added_tokens"] if not t["content"].startswith("<0x")]
    path.write_text(json.dumps(saved))
    config = {
        "bos_token": "<s>",
        "eos_token": "</s>",
        "pad_token": "</s>",
        "chat_template": "{{ messages[0].content }}",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, "tokenizer_class": "PreTrainedTokenizerFast"}))


LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
FACTORS = [1.0 + 0.2 * pair for pair in range(8)]
LONGROPE = {"rope_type": "longrope", "short_factor": FACTORS, "long_factor": [2 * factor for factor in FACTORS]}
# Our name of a case → transformers' configuration class, its fields, its rope scaling.
CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "llama": ("LlamaConfig", {}, {}),
    "llama, biases": ("LlamaConfig", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}, {}),
    "llama, llama3": ("LlamaConfig", {}, {**LLAMA3, "original_max_position_embeddings": 32}),
    "llama, linear": ("LlamaConfig", {}, {"rope_type": "linear", "factor": 4.0}),
    "llama, yarn": ("LlamaConfig", {}, {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}),
    "mistral": ("MistralConfig", {"sliding_window": 16}, {}),
    "qwen2": ("Qwen2Config", {"tie_word_embeddings": True}, {}),
    "phi3": ("Phi3Config", {"sliding_window": None}, {}),
    "phi3, longrope": ("Phi3Config", {"sliding_window": None}, {**LONGROPE, "original_max_position_embeddings": 64}),
}


def configuration(case: str, sizes: dict[str, Any]) -> Any:
    import transformers

    name, fields, rope = CASES[case]
    fields = {**sizes, "vocab_size": VOCAB, **fields}
    if rope:
        fields["rope_parameters"] = {**rope, "rope_theta": 10000.0}
    return getattr(transformers, name)(**fields)


# What transformers reads of GGUF; it passes over rope tensors, rope scaling, and biases of Llama.
READ_BY_TRANSFORMERS = ["llama", "qwen2", "phi3"]


@pytest.mark.parametrize("case", CASES)
def test_logits_survive_the_conversion(
    case: str, oracle: Callable[[Any], Any], sizes: dict[str, Any], registry: Registry, tmp_path: Path
) -> None:
    made = oracle(configuration(case, sizes))
    add_tokenizer(made.folder, "pieces" if case.startswith("phi3") else "bytes")
    path = tmp_path / "m.gguf"
    report = convert(open_source(made.folder, registry), path, RECIPES.f32)
    assert set(report.schemes) == {"f32"}
    made.check(path)
    reader = gguf.GGUFReader(path)
    assert reader.fields["general.architecture"].contents() == {"mistral": "llama"}.get(
        case, case.split()[0].strip(",")
    )
    assert len(reader.tensors) == len(GGUFFile.open(path).tensors)
    if case in READ_BY_TRANSFORMERS:
        import transformers

        theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="m.gguf", dtype=torch.float32)
        with torch.inference_mode():
            logits = theirs(torch.tensor([made.tokens])).logits[0].numpy()
        assert np.abs(logits - made.logits(made.tokens)).max() <= 1e-4


@pytest.mark.parametrize("kind", ["bytes", "pieces"])
def test_the_tokenizer_survives_the_conversion(
    kind: str, oracle: Callable[[Any], Any], sizes: dict[str, Any], registry: Registry, tmp_path: Path
) -> None:
    made = oracle(configuration("llama", sizes))
    add_tokenizer(made.folder, kind)
    convert(open_source(made.folder, registry), tmp_path / "m.gguf", RECIPES.f16)
    before, after = Tokenizer.load(made.folder), Tokenizer.load(tmp_path / "m.gguf")
    import tokenizers

    reference = tokenizers.Tokenizer.from_file(str(made.folder / "tokenizer.json"))
    for text in HARD_TEXTS:
        ids = reference.encode(text, add_special_tokens=False).ids
        assert after.encode(text, add_special=False) == ids, repr(text)
        assert after.encode(text) == before.encode(text)
    assert (after.bos_id, after.eos_id, after.chat_template) == (1, 2, "{{ messages[0].content }}")
    assert after.add_bos and not after.add_eos and after.eos_ids == before.eos_ids
    assert after.vocab_size == VOCAB  # filled up to the embedding


@pytest.mark.parametrize(
    ("name", "architecture", "expected"),
    [
        ("llama3", "llama", {"model": "gpt2", "pre": "llama-bpe"}),
        ("qwen2_5", "qwen2", {"model": "gpt2", "pre": "qwen2"}),
        ("llama2", "llama", {"model": "llama", "add_space_prefix": True}),
    ],
)
def test_real_tokenizers_are_recognized(name: str, architecture: str, expected: dict[str, Any]) -> None:
    folder = realdata.npm_tokenizer(name)
    original = Tokenizer.load(folder)
    metadata = tokenizer_metadata(folder, architecture, original.vocab_size)
    assert {key: metadata[f"tokenizer.ggml.{key}"] for key in expected} == expected
    converted = Tokenizer.from_gguf(metadata, name)
    for text in HARD_TEXTS:
        assert converted.encode(text) == original.encode(text), repr(text)


def test_what_cannot_be_converted_is_named(
    oracle: Callable[[Any], Any], sizes: dict[str, Any], registry: Registry, tmp_path: Path
) -> None:
    made = oracle(configuration("llama", sizes))
    with pytest.raises(TokenizerError, match=r"has no tokenizer\.json"):
        open_source(made.folder, registry)
    add_tokenizer(made.folder)
    path = made.folder / "tokenizer.json"
    good = json.loads(path.read_text())
    path.write_text(json.dumps({**good, "normalizer": {"type": "Lowercase"}}))
    with pytest.raises(TokenizerError, match="no GGUF tokenizer gives the same tokens"):
        open_source(made.folder, registry)
    path.write_text(json.dumps({**good, "model": {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"}}))
    with pytest.raises((TokenizerError, ModelError)):
        open_source(made.folder, registry)
    path.write_text(json.dumps(good))
    weights = made.folder / "model.safetensors"
    shutil.copy(weights, tmp_path / "whole")
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(FormatError, match=r"model\.safetensors"):
        open_source(made.folder, registry)
