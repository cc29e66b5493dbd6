"""``ruvllm bench attention``: what is called, and what is counted."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ruvllm_cli.bench_attention import SHAPES, Case, Heads, Side, measure, open_side
from ruvllm_core.decode.reference import attention
from ruvllm_core.errors import PluginError
from ruvllm_core.protocols import DecoderOptions
from ruvllm_core.registry import Registry

BENCHMARKS = Path(__file__).resolve().parents[3] / "benchmarks"
HEADS = Heads(query=6, kv=2, size=16, layers=3)
PROVIDERS = """
    from ruvllm_core.decode.reference import attention

    class Slow:
        device = "cpu"
        def __init__(self, options): self.options = options
        def ops(self): return {"attention": slow_attention}
        def decoder(self, spec, weights, options): return None

    class Bare(Slow):
        def ops(self): return {"gated": None}

    def slow_attention(call):
        attention(call)
        return attention(call)

    @hookimpl
    def kernels():
        return [Offer("slow", "their_kernels_hooks:Slow", ""), Offer("bare", "their_kernels_hooks:Bare", "")]
"""


@pytest.mark.parametrize(("prompt", "depth"), [(1, 0), (1, 9), (5, 0), (5, 7)])
def test_a_call_is_causal_attention_over_the_cache(prompt: int, depth: int) -> None:
    """Against float64, and with every operation counted."""
    case = Case(HEADS, prompt, depth, "cpu", "f32", "f32")
    assert [call.layer for call in case.calls] == [0, 1, 2]
    flop = 0
    for call in case.calls:
        (segment,) = call.view.segments
        keys = segment.storage.keys[call.layer][0].double().numpy()
        values = segment.storage.values[call.layer][0].double().numpy()
        query = call.query.double().numpy()
        assert keys.shape == values.shape == (2, depth + prompt, 16)
        expected = np.empty_like(query)
        for token in range(prompt):
            for head in range(6):
                seen = slice(0, depth + token + 1)
                scores = keys[head // 3, seen] @ query[token, head] / 4.0
                weights = np.exp(scores - scores.max())
                expected[token, head] = weights @ values[head // 3, seen] / weights.sum()
                flop += 2 * 2 * 16 * (depth + token + 1)
        np.testing.assert_allclose(attention(call).numpy(), expected, atol=1e-5)
    assert case.flop == flop // len(case.calls)
    assert case.kv_bytes == 2 * 2 * (depth + prompt) * 16 * 4
    first, second, _ = segment.storage.keys
    assert (first != second).any()


def test_calls_go_round_over_the_layers_and_times_are_those_of_one_call() -> None:
    seen: list[int] = []

    def op(call: Any) -> None:
        seen.append(call.layer)

    case = Case(HEADS, 1, 4, "cpu", "f32", "f16")
    assert case.calls[0].view.segments[0].storage.scheme == "f16"
    case.run(op, 7)
    assert seen == [0, 1, 2, 0, 1, 2, 0]


def test_rows_are_consistent_and_sides_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    import time

    from ruvllm_cli import bench_attention

    order: list[str] = []

    def op(name: str, seconds: float) -> Any:
        def run(call: Any) -> None:
            order.append(name)
            time.sleep(seconds)

        return run

    monkeypatch.setitem(bench_attention.SHAPES, "small", HEADS)
    sides = [Side("quick", "cpu", op("quick", 0.06), "q"), Side("slow", "cpu", op("slow", 0.2), "s")]
    quick, slow = measure(sides, ["small"], [4], [2], repeats=2)
    assert order[-4:] == ["quick", "slow", "quick", "slow"]
    assert 60 <= quick["ms"] < 150
    assert 200 <= slow["ms"] < 400
    case = Case(HEADS, 4, 2, "cpu", "f32", "f32")
    for row in (quick, slow):
        assert (row["shape"], row["prompt"], row["depth"]) == ("small", 4, 2)
        assert row["gflop_s"] == pytest.approx(case.flop / row["ms"] / 1e6)
        assert row["kv_gb_s"] == pytest.approx(case.kv_bytes / row["ms"] / 1e6)


def test_the_operation_of_the_provider_that_was_asked_for_runs(ruvllm: Any, install: Any) -> None:
    install("their-kernels", "their_kernels", PROVIDERS)
    sizes = ("--shape", "smollm2-135m", "--prompt", "3", "--prompt", "1", "--depth", "5", "--repeats", "1")
    flags = ("--threads", "1", "--kv", "f16", "--log-level", "error")
    result = ruvllm("bench", "attention", *sizes, *flags, "--kernels", "slow,torch", "--json").json
    assert result["operations"] == {
        "slow": "their_kernels_hooks.slow_attention on cpu",
        "torch": "ruvllm_core.decode.reference.attention on cpu",
    }
    expected = {"benchmark": "attention", "threads": 1, "dtype": "f32", "kv": "f16", "repeats": 1}
    assert {name: result[name] for name in expected} == expected
    rows = [(row["prompt"], row["depth"], row["kernels"]) for row in result["results"]]
    assert rows == [(3, 5, "slow"), (3, 5, "torch"), (1, 5, "slow"), (1, 5, "torch")]
    assert set(result["results"][0]) == {"shape", "prompt", "depth", "kernels", "ms", "gflop_s", "kv_gb_s"}
    assert all(row["ms"] > 0 for row in result["results"])


def test_auto_is_the_first_provider_that_can_run(ruvllm: Any, install: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    lame = """
        @hookimpl
        def kernels():
            return [Offer("lame", "nowhere:Kernels", probe=lambda: "not on this machine", priority=1000)]
        """
    install("lame-kernels", "lame_kernels", lame)
    monkeypatch.delenv("RUVLLM_KERNELS", raising=False)
    sizes = ("--shape", "smollm2-135m", "--prompt", "2", "--depth", "3", "--repeats", "1", "--threads", "1")
    result = ruvllm("bench", "attention", *sizes, "--log-level", "error", "--json").json
    assert len(result["operations"]) == 1
    assert "lame" not in result["operations"]


def test_a_provider_without_the_operation_is_an_error(ruvllm: Any, install: Any) -> None:
    install("their-kernels", "their_kernels", PROVIDERS)
    call = ("bench", "attention", "--log-level", "error")
    ruvllm(*call, "--kernels", "bare").failed(1, "'bare' has no attention operation of its own", "ruvllm bench e2e")
    ruvllm(*call, "--kernels", "torch,bare").failed(1, "'bare' has no attention")
    ruvllm(*call, "--kernels", "turch").failed(1, "'turch'", "did you mean torch")
    ruvllm(*call, "--shape", "smollm", "--kernels", "torch").failed(1, "no head shape 'smollm'", "smollm2-135m")
    ruvllm(*call, "--prompt", "0").failed(2, "--prompt")
    ruvllm(*call, "--kv", "q8_0").failed(2, "--kv")
    with pytest.raises(PluginError, match="'bare' has no attention"):
        open_side("bare", Registry.discover(), DecoderOptions())


def test_head_shapes_are_those_of_synth() -> None:
    sys.path.insert(0, str(BENCHMARKS))
    import synth

    for name, spec in synth.SHAPES.items():
        assert SHAPES[name] == (spec.num_heads, spec.num_kv_heads, spec.head_dim, spec.num_layers), name
    assert set(SHAPES) - set(synth.SHAPES) == {"smollm2-135m"}


@pytest.mark.usefixtures("candle")
def test_the_script_is_the_command() -> None:
    sizes = ("--shape", "smollm2-135m", "--prompt", "2", "--depth", "3", "--repeats", "1", "--kernels", "torch")
    script = [sys.executable, str(BENCHMARKS / "attention_bench.py"), *sizes, "--threads", "1"]
    *table, line = subprocess.run(script, capture_output=True, text=True, check=True).stdout.splitlines()
    assert json.loads(line)["results"][0]["prompt"] == 2
    assert any("gflop_s" in row for row in table)
