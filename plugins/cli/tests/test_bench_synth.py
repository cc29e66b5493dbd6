"""``benchmarks/synth.py``: files that others read, with the shapes, schemes and values it promises."""

from __future__ import annotations

import json
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[3] / "benchmarks"))
import synth

from ruvllm_core.generate.load import load_parts
from ruvllm_core.model.loader import open_gguf
from ruvllm_core.registry import Registry
from ruvllm_core.settings import Settings

pytestmark = pytest.mark.usefixtures("candle")
# As the models' cards have them.
PARAMETERS = {
    "qwen2.5-0.5b": 494_032_768,
    "qwen2.5-1.5b": 1_543_714_304,
    "qwen2.5-7b": 7_615_616_512,
    "llama-3-8b": 8_030_261_248,
    "mistral-7b": 7_248_023_552,
    "phi-3-mini": 3_821_079_552,
}
SCHEMES = ("f32", "f16", "bf16", "q4_0", "q4_1", "q5_0", "q5_1", "q8_0", "q2_k", "q3_k", "q4_k", "q5_k", "q6_k")
SMALL = {"hidden_size": 256, "intermediate_size": 512, "vocab_size": 700, "num_layers": 2, "max_context": 64}
SMALL |= {"num_heads": 4, "num_kv_heads": 2, "head_dim": 64, "rope_dim": 64}


def small(shape: str, scheme: str, path: Path, **changes: int) -> Path:
    """A file of the family of `shape`, everything about it small."""
    synth.write_model(replace(synth.SHAPES[shape], **{**SMALL, **changes}), shape, scheme, path)
    return path


def test_shapes_are_those_of_the_models() -> None:
    assert {name: spec.parameters for name, spec in synth.SHAPES.items()} == PARAMETERS


@pytest.mark.parametrize("scheme", SCHEMES)
def test_values_are_finite_and_of_the_promised_size(scheme: str, tmp_path: Path) -> None:
    import gguf

    reader = gguf.GGUFReader(small("llama-3-8b", scheme, tmp_path / "model.gguf"))
    seen = Counter()
    for tensor in reader.tensors:
        seen[tensor.tensor_type.name.lower()] += 1
        values = gguf.dequantize(tensor.data, tensor.tensor_type)
        assert np.isfinite(values).all(), tensor.name
        if len(tensor.shape) == 2:
            assert values.std() == pytest.approx(0.02, rel=0.05), tensor.name
            assert abs(values.mean()) < 6e-4, tensor.name
        else:
            assert values.mean() == pytest.approx(1.0, abs=0.01), tensor.name
    assert seen[scheme] >= 9  # some recipes raise the others above it
    assert len(np.unique(values)) > 100


@pytest.mark.parametrize(
    ("shape", "layers", "expected"),
    [
        # What llama.cpp's own recipe gives these models: rows of 896 fill no block of 256.
        ("qwen2.5-0.5b", 24, {"f32": 121, "q5_0": 132, "q8_0": 13, "q4_k": 12, "q6_k": 12}),
        ("qwen2.5-1.5b", 28, {"f32": 141, "q4_k": 168, "q6_k": 29}),
    ],
)
def test_the_mixture_is_that_of_the_recipe(
    shape: str, layers: int, expected: dict[str, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(synth, "write_gguf", lambda path, metadata, tensors: sum(t.nbytes for t in tensors))
    report = synth.synthesize(shape, "q4_k_m", tmp_path / "model.gguf")
    assert report["schemes"] == expected
    assert synth.SHAPES[shape].num_layers == layers


@pytest.mark.parametrize(
    ("shape", "scheme"), [("qwen2.5-0.5b", "q4_k_m"), ("llama-3-8b", "q8_0"), ("phi-3-mini", "q4_k")]
)
def test_we_compute_what_transformers_computes_from_it(shape: str, scheme: str, tmp_path: Path) -> None:
    import torch
    import transformers

    vocab_size = 32064 if shape == "phi-3-mini" else 700  # transformers takes its padding token for granted
    path = small(shape, scheme, tmp_path / "model.gguf", vocab_size=vocab_size)
    settings = Settings(model=str(path), kernels=["torch"], dtype="float32", max_context=16)
    parts = load_parts(settings, Registry.discover(settings))
    from ruvllm_core.testing import tiny

    tokens = np.random.default_rng(1).integers(0, vocab_size, 12).tolist()
    ours = tiny.whole(parts.decoder, tokens, 16)
    oracle = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=path.name, dtype=torch.float32)
    with torch.inference_mode():
        theirs = oracle(torch.tensor([tokens])).logits[0].numpy()
    assert np.isfinite(ours).all()
    assert ours.std() > 0.05
    np.testing.assert_allclose(ours, theirs, atol=1e-4)


@pytest.mark.parametrize("shape", ["qwen2.5-0.5b", "llama-3-8b", "mistral-7b", "phi-3-mini"])
def test_llama_cpp_computes_the_same_from_it(shape: str, tmp_path: Path) -> None:
    pytest.importorskip("llama_cpp")
    from llama_cpp_peer import LlamaCpp

    from ruvllm_core.testing import tiny

    path = small(shape, "f32", tmp_path / "model.gguf")
    settings = Settings(model=str(path), kernels=["torch"], dtype="float32", max_context=16)
    parts = load_parts(settings, Registry.discover(settings))
    tokens = np.random.default_rng(1).integers(0, 700, 12).tolist()
    peer = LlamaCpp(path, 16, 1, flash_attention=False)
    theirs = peer.decode(tokens, every=True)
    np.testing.assert_allclose(tiny.whole(parts.decoder, tokens, 16), theirs, atol=2e-3)
    peer.truncate(11)
    np.testing.assert_allclose(peer.decode(tokens[11:]), theirs[-1], atol=2e-3)
    other = LlamaCpp(path, 16, 1, flash_attention=True, weights_of=peer)
    np.testing.assert_allclose(other.decode(tokens), theirs[-1], atol=2e-3)
    other.close()
    peer.close()


def test_the_vocabulary_is_as_large_as_the_model_says(tmp_path: Path) -> None:
    import gguf

    path = small("qwen2.5-1.5b", "q8_0", tmp_path / "model.gguf", vocab_size=66_000)
    fields = gguf.GGUFReader(path).fields
    tokens = fields["tokenizer.ggml.tokens"].contents()
    assert len(tokens) == len(set(tokens)) == 66_000
    merged = [merge.replace(" ", "") for merge in fields["tokenizer.ggml.merges"].contents()]
    assert merged == tokens[256:-4]
    assert fields["general.file_type"].contents() == gguf.LlamaFileType.MOSTLY_Q8_0
    settings = Settings(model=str(path), max_context=16)
    tokenizer = load_parts(settings, Registry.discover(settings)).tokenizer
    text = "Why is the sky blue? 世界"
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert len(ids) < len(text.encode())


def test_files_are_repeatable_and_seeds_differ(tmp_path: Path) -> None:
    spec, files = replace(synth.SHAPES["qwen2.5-0.5b"], **SMALL), [tmp_path / name for name in "abc"]
    for path, seed in zip(files, (0, 0, 1), strict=True):
        synth.write_model(spec, "small", "q4_k_m", path, seed)
    assert files[0].read_bytes() == files[1].read_bytes() != files[2].read_bytes()
    tensors = open_gguf(files[0]).tensors
    assert (tensors["blk.0.attn_q.weight"].data != tensors["blk.1.attn_q.weight"].data).any()


def test_the_command_writes_what_was_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(synth.SHAPES, "mistral-7b", replace(synth.SHAPES["mistral-7b"], **SMALL))
    path = tmp_path / "model.gguf"
    synth.main(["mistral-7b", "q6_k", str(path), "--layers", "3", "--seed", "4"])
    report = json.loads(capsys.readouterr().out)
    assert report == {
        "file": str(path),
        "shape": "mistral-7b",
        "scheme": "q6_k",
        "file_bytes": path.stat().st_size,
        "schemes": {"f32": 7, "q6_k": 23},
    }
    assert open_gguf(path).metadata["llama.block_count"] == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["qwen2.5-2b", "q8_0"], "there is no shape 'qwen2.5-2b'\n  did you mean qwen2.5-"),
        (["phi-3-mini", "q4_k_x"], "there is no scheme 'q4_k_x'\n  did you mean q4_k"),
        (["phi-3-mini", "q4_k", "--layers", "0"], "a model of 0 layers"),
    ],
)
def test_mistakes(arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "model.gguf"
    with pytest.raises(SystemExit) as end:
        synth.main([*arguments[:2], str(path), *arguments[2:]])
    assert end.value.code == 1
    assert message in capsys.readouterr().err
    assert not path.exists()
