"""``benchmarks/e2e_bench.py``: a model beside a peer, the table of goals, and the time to the first token."""

from __future__ import annotations

import json
import os
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[3] / "benchmarks"))
import e2e_bench
import e2e_compare
import e2e_table
import synth
from sides import Runs

from ruvllm_cli import bench_start
from ruvllm_core.errors import ConfigError, GenerationError
from ruvllm_core.settings import load_settings

pytestmark = pytest.mark.usefixtures("candle")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small file of the Qwen2.5 family."""
    sizes = {"hidden_size": 64, "intermediate_size": 96, "vocab_size": 600, "num_layers": 2, "max_context": 128}
    heads = {"num_heads": 4, "num_kv_heads": 2, "head_dim": 16, "rope_dim": 16}
    path = tmp_path_factory.mktemp("bench") / "qwen2.5-0.5b-q4_k_m.gguf"
    synth.write_model(replace(synth.SHAPES["qwen2.5-0.5b"], **sizes, **heads), "small", "q8_0", path)
    return path


class Peer:
    """llama.cpp as `Side` shows it, at speeds of its own choosing: 16 tokens a second for prompts of 8."""

    name = "llama-cpp"

    def __init__(self, job: dict[str, Any]) -> None:
        self.job = job
        self.about = {"version": "1.0", "load_s": 0.5, "variants": list(job["flash_attention"])}
        self.runs = {variant: Runs() for variant in job["flash_attention"]}
        self.peak_bytes, self.waiting_s, self.disturbing_s = 5_000_000, 0.0, 0.0

    def run(self, variant: str) -> None:
        self.runs[variant].prefill_s.append(0.5 if variant == "off" else 0.6)
        self.runs[variant].decode_s.append(2.0 if variant == "off" else 1.0)

    def cpu_s(self) -> float:
        return 0.0

    def __enter__(self) -> Peer:
        return self

    def __exit__(self, *_: object) -> None: ...


@pytest.fixture
def peer(monkeypatch: pytest.MonkeyPatch) -> list[Peer]:
    """Takes llama.cpp's place; ours runs as it is, in a process of its own."""
    started: list[Peer] = []
    start = e2e_compare.start

    def choose(name: str, job: dict[str, Any], python: str = sys.executable) -> Any:
        if name == "ruvllm":
            return start(name, job)
        assert python == "their-python"
        started.append(Peer(job))
        return started[-1]

    monkeypatch.setattr(e2e_compare, "start", choose)
    monkeypatch.setenv("LLAMA_CPP_PYTHON", "their-python")
    return started


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[dict[str, Any], str]:
    """The JSON line, and all before it."""
    e2e_bench.main([str(argument) for argument in arguments])
    *table, line = capsys.readouterr().out.splitlines()
    return json.loads(line), "\n".join(table)


def test_a_model_beside_its_peer(model: Path, peer: list[Peer], capsys: pytest.CaptureFixture[str]) -> None:
    sizes = ("--prefill", "8", "--decode", "4", "--depth", "5", "--repeats", "2", "--threads", "1")
    result, table = run(capsys, model, *sizes, "--kernels", "torch", "--peer", "llama-cpp")
    assert [result[name] for name in ("benchmark", "model", "path")] == ["e2e", str(model), str(model)]
    expected = {"prefill": 8, "decode": 4, "depth": 5, "threads": 1, "repeats": 2, "kernels": "torch"}
    assert {name: result[name] for name in expected} == expected
    asked = {"model": str(model), "flash_attention": ("off", "on"), "prefill": 8, "decode": 4, "depth": 5}
    assert {name: peer[0].job[name] for name in asked} == asked
    ours, theirs = result["ruvllm"], result["llama-cpp"]
    assert ours["kernels"] == "torch"
    assert ours["scheme"] == "q8_0"
    assert ours["kv_bytes"] == 2 * 2 * 2 * 16 * 4 * 17  # keys and values, layers, heads, size, f32, tokens
    assert ours["overhead_mb"] == pytest.approx(
        ours["peak_mb"] - model.stat().st_size / 1e6 - ours["kv_bytes"] / 1e6, rel=1e-6
    )
    assert ours["load_s"] > 0
    # Of flash attention the better one for each figure.
    assert (theirs["prefill_tok_s"], theirs["prefill_flash_attention"]) == (16.0, "off")
    assert (theirs["decode_tok_s"], theirs["decode_flash_attention"]) == (4.0, "on")
    for phase, speed in (("prefill", 16.0), ("decode", 4.0)):
        assert len(ours[f"{phase}_tok_s_runs"]) == 2
        assert result["ratios"][phase]["of_medians"] == pytest.approx(ours[f"{phase}_tok_s"] / speed)
        assert f"{ours[f'{phase}_tok_s']:.2f}" in table


def test_a_model_alone(model: Path, peer: list[Peer], capsys: pytest.CaptureFixture[str]) -> None:
    sizes = ("--prefill", "4", "--decode", "2", "--repeats", "1", "--kernels", "torch")
    result, table = run(capsys, model, *sizes)
    assert not peer
    assert "ratios" not in result
    assert "llama-cpp" not in result
    assert "ratio" not in table
    assert result["ruvllm"]["decode_tok_s"] > 0


def test_ratios_of_medians_and_of_pairs() -> None:
    ours = {"decode_tok_s": 20.0, "decode_tok_s_runs": [10.0, 20.0, 30.0]}
    theirs = {"decode_tok_s": 5.0, "decode_tok_s_runs": [10.0, 5.0, 4.0]}
    assert e2e_compare.ratios(ours, theirs, "decode") == {"of_medians": 4.0, "of_pairs": 4.0}
    theirs["decode_tok_s_runs"] = [5.0, 10.0, 4.0]
    assert e2e_compare.ratios(ours, theirs, "decode") == {"of_medians": 4.0, "of_pairs": 2.0}


def test_the_table_judges_every_row(
    model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for row in e2e_table.ROWS.values():
        if row.model != "smollm2":
            (model.parent / f"{row.model}.gguf").touch()
    asked = []

    def compare(name: str, job: dict[str, Any], repeats: int, python: str, flash: tuple[str, ...]) -> dict[str, Any]:
        asked.append((Path(name).stem, job["prefill"], job["decode"], job["depth"], job["threads"], repeats, python))
        speeds: dict[str, Any] = {"prefill_tok_s": 1.0, "decode_tok_s": 1.0, "overhead_mb": 200.0}
        ratios = {"prefill": {"of_medians": 2.0, "of_pairs": 1.99}, "decode": {"of_medians": 1.1, "of_pairs": 1.4}}
        return {**job, "model": name, "ruvllm": speeds, "llama-cpp": speeds, "ratios": ratios}

    monkeypatch.setattr(e2e_bench, "compare", compare)
    found = {"first_token_s": 0.9, "exit_s": 1.0, "first_token_s_runs": [0.9]}
    monkeypatch.setattr(e2e_bench, "first_token", lambda *_, **__: found)
    result, table = run(capsys, "--table", model.parent, "--repeats", "5", "--peer-python", "their-python")
    assert asked == [
        ("smollm2", 512, 64, 0, 2, 5, "their-python"),
        ("qwen2.5-0.5b-q4_k_m", 256, 64, 0, 2, 5, "their-python"),
        ("qwen2.5-1.5b-q4_k_m", 256, 32, 0, 2, 5, "their-python"),
        ("qwen2.5-1.5b-q4_k_m", 1, 32, 2048, 2, 5, "their-python"),
        ("qwen2.5-1.5b-q8_0", 256, 32, 0, 2, 5, "their-python"),
    ]
    reached = {(v["row"], v["what"].partition(",")[0]): v["reached"] for v in result["verdicts"]}
    memory = {(name, "memory beyond file and KV"): "must" for name in e2e_table.ROWS}
    assert reached == {
        **memory,
        ("smollm2", "prefill"): "missed",
        ("smollm2", "decode"): "missed",
        ("0.5b", "prefill"): "must",
        ("0.5b", "decode"): "missed",
        ("1.5b", "prefill"): "must",
        ("1.5b", "decode"): "must",
        ("1.5b-depth", "decode"): "missed",
        ("1.5b-q8", "prefill"): "must",
        ("1.5b-q8", "decode"): "must",
        ("first-token", "start to first token"): "aim",
    }
    assert table.count("missed") == 4


def test_verdicts_at_the_edge() -> None:
    speeds = [e2e_table.verdict(value, (1.4, 2.0)) for value in (1.39, 1.4, 1.99, 2.0)]
    assert speeds == ["missed", "must", "must", "aim"]
    assert [e2e_table.verdict(v, (250, 120), at_most=True) for v in (251, 250, 121, 120)] == speeds


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ([], 2, "name either a model or --table FOLDER"),
        (["smollm2", "--table", "."], 2, "name either a model or --table FOLDER"),
        (["smollm2", "--rows", "0.5b"], 2, "--rows picks from --table"),
        (["smollm2", "--peer", "llama-cpp", "--first-token"], 2, "a figure of ours alone"),
        (["smollm2", "--prefill", "0"], 2, "--prefill: 0 is less than 1"),
        (["smollm2", "--depth", "-1"], 2, "--depth: -1 is less than 0"),
        (["smollm2", "--peer", "ollama"], 2, "invalid choice: 'ollama'"),
        (["nowhere.gguf"], 1, "error: there is no file or folder nowhere.gguf"),
        (["--table", ".", "--rows", "0.6b"], 1, "the table has no row '0.6b'\n  did you mean 0.5b"),
        (
            ["--table", ".", "--rows", "0.5b"],
            1,
            "python benchmarks/synth.py qwen2.5-0.5b q4_k_m qwen2.5",
        ),
    ],
)
def test_mistakes(
    arguments: list[str],
    code: int,
    message: str,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as end:
        e2e_bench.main(arguments)
    assert end.value.code == code
    assert message in capsys.readouterr().err


def test_llama_cpp_needs_a_file(tiny: Path) -> None:
    with pytest.raises(ConfigError, match="is a folder, which"):
        e2e_compare.compare(str(tiny), {}, 1, "python", ("on",))


def test_the_first_token_is_that_of_the_command(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ("--first-token", "--repeats", "1", "--threads", "1", "--kernels", "torch")
    started = time.perf_counter()
    result, table = run(capsys, tiny, *options)
    assert result["benchmark"] == "first-token"
    assert 0.1 < result["first_token_s"] <= result["exit_s"] < time.perf_counter() - started
    assert result["first_token_s_runs"] == [result["first_token_s"]]
    assert "first_token_s" in table
    with pytest.raises(GenerationError, match=r"exit code 1 .*there is no file or folder nowhere\.gguf"):
        bench_start.first_token("nowhere.gguf", repeats=1)


def test_the_first_byte_and_the_end_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    code = "import time; time.sleep(0.2); print('x', flush=True); time.sleep(0.3)"
    monkeypatch.setattr(bench_start, "sys", SimpleNamespace(executable="env"))
    popen, calls = bench_start.subprocess.Popen, []

    def instead(command: list[str], **options: Any) -> Any:
        calls.append(command)
        return popen([sys.executable, "-c", code], **options)

    monkeypatch.setattr(bench_start.subprocess, "Popen", instead)
    found = bench_start.first_token("some-model", ["--threads", "7"], repeats=2)
    assert 0.2 < found["first_token_s"] < found["exit_s"] - 0.25
    assert len(found["first_token_s_runs"]) == 2
    assert len(calls) == 3  # the first one warms up
    assert calls[0][3:5] == ["run", "some-model"]
    assert "--max-tokens 1" in " ".join(calls[0])
    assert calls[0][-2:] == ["--threads", "7"]


def test_ruvllm_bench_passes_its_settings_on(
    ruvllm: Any, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, Any] = {}

    def first_token(model: str, options: list[str], *, repeats: int, environment: dict[str, str]) -> dict[str, Any]:
        seen.update(model=model, options=options, repeats=repeats, environment=environment)
        return {"first_token_s": 1.5}

    monkeypatch.setattr(bench_start, "first_token", first_token)
    file = tmp_path / "settings.toml"
    file.write_text("prefill_chunk = 7\n")
    flags = ("--kernels", "torch", "--cache", "contiguous", "--threads", "1", "--config", file)
    sizes = ("--prefill", "4", "--decode", "2", "--repeats", "2")
    result = ruvllm("bench", "e2e", tiny, "--first-token", *flags, *sizes, "--json", "--log-level", "error").json
    assert result["first_token_s"] == 1.5
    assert (seen["model"], seen["options"], seen["repeats"]) == (str(tiny), ["--config", str(file)], 2)
    for name in list(os.environ):
        monkeypatch.delenv(name)
    for name, value in seen["environment"].items():
        monkeypatch.setenv(name, value)
    settings = load_settings(file)
    assert (settings.model, settings.kernels, settings.threads) == (str(tiny), ["torch"], 1)
    assert (settings.cache.policy, settings.prefill_chunk, settings.log_level) == ("contiguous", 7, "error")
