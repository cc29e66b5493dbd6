"""``ruvllm bench lora``: what adapters cost."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from ruvllm_cli import bench_lora
from ruvllm_cli.bench import Workload
from ruvllm_core.decode.lora import combine
from ruvllm_core.testing import tiny as tiny_model

pytestmark = pytest.mark.usefixtures("candle")


def test_a_row_for_none_and_for_each_adapter(ruvllm: Any, tiny: Path) -> None:
    sizes = ("--prefill", "8", "--decode", "2", "--repeats", "3", "--rank", "3")
    found = ruvllm("bench", "lora", tiny, *sizes, "--json").json
    assert (found["benchmark"], found["rank"], found["final_rank"], found["decode"]) == ("lora", 3, 2, 2)
    none, *others = found["results"]
    assert [row["adapter"] for row in found["results"]] == ["none", "layers", "final", "both"]
    assert "decode_cost" not in none
    assert all(row["prefill_tok_s"] > 0 < row["decode_tok_s"] for row in found["results"])
    assert all(len(row["decode_cost_runs"]) == 3 for row in others)
    table = ruvllm("bench", "lora", tiny, *sizes)
    assert table.code == 0
    assert "both" in table.out and "%" in table.out


def test_costs_are_against_the_runs_on_both_sides(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a machine that gets slower from run to run, an adapter that takes a quarter longer costs a quarter."""
    clock = {"runs": 0}

    class Slowing:
        def __init__(self, *_: object) -> None: ...

        def run(self, prefill: int, decode: int, adapter: Any = None) -> tuple[float, float]:
            clock["runs"] += prefill > 1
            seconds = 1.0 + 0.1 * clock["runs"]
            return seconds, 2 * seconds * (1.25 if adapter is not None else 1.0)

    monkeypatch.setattr(bench_lora, "Runner", Slowing)
    parts: Any = SimpleNamespace(model=SimpleNamespace(spec=tiny_model.tiny_spec()))
    rows = list(bench_lora.measure(parts, Workload(prefill=8, decode=4, repeats=5), bench_lora.Ranks(), 8))
    for row in rows[1:]:
        assert row["prefill_cost"] == pytest.approx(0.0)
        assert row["decode_cost"] == pytest.approx(0.25)
        assert row["decode_tok_s"] * 1.25 == pytest.approx(row["prefill_tok_s"] * 4 / 8 / 2)


def test_the_adapters_are_of_the_ranks_asked_for() -> None:
    spec = tiny_model.tiny_spec()
    found = bench_lora.Ranks(layers=1, final=2).adapters(spec)
    assert set(found["both"].sites) == set(combine([found["layers"], found["final"]]).sites)
    assert found["both"].sites["final"].a.shape == (2, spec.hidden_size)
    assert len(found["layers"].sites) == 7 * spec.num_layers
    assert {len(delta.a) for delta in found["layers"].sites.values()} == {1}
    assert all(np.any(delta.b) for delta in found["both"].sites.values()), "zeros would cost as much, but prove less"
    assert not found["final"].changes_cache
    assert found["layers"].changes_cache


def test_what_does_not_fit_is_said(ruvllm: Any, tiny: Path) -> None:
    ruvllm("bench", "lora", tiny, "--prefill", "50", "--max-context", "60").failed(1, "the context holds 60")
