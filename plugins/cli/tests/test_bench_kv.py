"""``ruvllm bench kv``: memory and speed of cache policies against depth."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from ruvllm_cli.bench_kv import Case
from ruvllm_core.errors import ConfigError

pytestmark = pytest.mark.usefixtures("candle")
PNG = b"\x89PNG\r\n\x1a\n"


@pytest.mark.slow
def test_a_row_for_each_policy_and_depth(ruvllm: Any, tiny: Path, tmp_path: Path) -> None:
    output = tmp_path / "new" / "kv.v1"
    found = ruvllm(
        *("bench", "kv", tiny, "--policy", "contiguous", "--depth", "64", "--depth", "32", "--decode", "2"),
        *("--repeats", "2", "--output", output, "--json"),
    ).json
    assert [(row["policy"], row["depth"]) for row in found["results"]] == [("contiguous", 32), ("contiguous", 64)]
    small, large = found["results"]
    assert large["kv_mb"] == pytest.approx(2 * small["kv_mb"])
    assert all(
        len(row["decode_tok_s_runs"]) == 2 and row["decode_tok_s"] > 0 < row["prefill_tok_s"] for row in (small, large)
    )
    assert json.loads(output.with_name("kv.v1.json").read_text()) == found
    assert output.with_name("kv.v1.png").read_bytes().startswith(PNG)


def test_without_depths_it_stays_within_the_context(ruvllm: Any, tiny: Path) -> None:
    found = ruvllm(
        "bench", "kv", tiny, "--policy", "contiguous", "--max-context", "40", "--repeats", "1", "--json"
    ).json
    assert [row["depth"] for row in found["results"]] == [24]


def test_what_cannot_be_measured_is_said_before(ruvllm: Any, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ruvllm("bench", "kv", tiny, "--policy", "contigous").failed(1, "there is no 'contigous'", "contiguous")
    ruvllm("bench", "kv", tiny, "--policy", "contiguous,size").failed(1, "'size' is not SETTING=VALUE")
    ruvllm("bench", "kv", tiny, "--policy", "contiguous,size=3").failed(1, "has no settings")
    ruvllm("bench", "kv", tiny, "--depth", "50", "--max-context", "60").failed(1, "the context holds 60")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    ruvllm("bench", "kv", tiny, "--output", "x").failed(1, "needs matplotlib", "ruvllm-cli[plot]")


def test_policies_are_written_with_settings() -> None:
    case = Case.parse("two_tier,store_precision=q8,tail_length=64")
    assert (case.policy, case.changes) == ("two_tier", {"store_precision": "q8", "tail_length": "64"})
    assert case.label == "two_tier,store_precision=q8,tail_length=64"
    with pytest.raises(ConfigError, match="SETTING=VALUE"):
        Case.parse("paged,=3")
