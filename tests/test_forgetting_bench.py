"""The benchmark of forgetting: what it counts, how it chooses, and that it runs from end to end on a real model."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture
def report(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    from forgetting import report

    return report


def _row(report, way: str, strength: float, order: tuple[int, ...], table: list[list[float]]):
    from forgetting.arms import Arm, Cell

    accuracy = np.full((3, 3), np.nan)
    for n, row in enumerate(table):
        accuracy[n, : len(row)] = row
    return report.Row(Cell(Arm(way, strength), order, 0), accuracy, np.ones(3))


def test_forgetting_and_choice_by_hand(report) -> None:
    none = _row(report, "none", 0.0, (0, 1, 2), [[0.8], [0.9, 0.7], [0.4, 0.5, 0.6]])
    assert none.learned == pytest.approx(0.7)
    assert none.forgotten == pytest.approx(((0.9 - 0.4) + (0.7 - 0.5)) / 2)
    assert none.final == pytest.approx(0.5)
    weak = _row(report, "ewc", 1.0, (0, 1, 2), [[0.8], [0.8, 0.7], [0.6, 0.6, 0.6]])
    strong = _row(report, "ewc", 9.0, (0, 1, 2), [[0.8], [0.8, 0.3], [0.8, 0.3, 0.3]])
    found = {one.arm.strength: one for one in report.summarize([weak, strong], [none])}
    assert found[1.0].change == pytest.approx(0.15 / 0.35 - 1)
    assert found[9.0].change == -1.0
    assert found[9.0].learned_share == pytest.approx(1.4 / 2.1)
    assert report.choose([weak, strong], [none], "ewc", 0.95).strength == 1.0
    assert report.choose([weak, strong], [none], "ewc", 0.5).strength == 9.0
    assert report.choose([strong], [none], "ewc", 0.95) is None
    assert "| EWC++, numbers of ΔW, λ = 1 | 1 | 70.0 % | 100.0 % | 15.0 | -57 %" in report.table(
        "", report.summarize([weak], [none]), {}
    )


def test_every_task_is_early_once_and_late_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    from forgetting.arms import orders

    found = orders(5, 3)
    assert len(set(found)) == 3
    assert all(sorted(one) == list(range(5)) for one in found)
    assert len({one[0] for one in found}) == 3
    assert len({one[-1] for one in found}) == 3


@pytest.mark.slow
def test_it_runs(tmp_path: Path) -> None:
    words = {"stars": ["comet", "orbit", "moon"], "sea": ["wave", "fish", "boat"]}
    tasks = {
        name: {
            "kinds": sorted(words),
            **{
                part: [[f"{words[kind][n % 3]} {part} {n} {name}", label] for n in range(4)
                       for label, kind in enumerate(sorted(words))]
                for part in ("train", "test")
            },
        }
        for name in ("first", "second")
    }  # fmt: skip
    data, out = tmp_path / "tasks.json", tmp_path / "out.json"
    data.write_text(json.dumps(tasks), encoding="utf-8")
    command = [
        sys.executable,
        str(BENCHMARKS / "forgetting_bench.py"),
        "--small",
        "--data",
        str(data),
        "--out",
        str(out),
    ]
    done = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=240, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "here it is measured" in done.stdout
    found = json.loads(out.read_text(encoding="utf-8"))
    arms = {(row["way"], row["seed"]) for row in found["rows"]}
    assert arms == {
        ("none", 0), ("damped", 0), ("directions", 0), ("ewc", 0), ("l2", 0), ("factors", 0),
        ("none", 1), ("damped", 1), ("directions", 1), ("ewc", 1), ("l2", 1), ("factors", 1), ("replay", 1),
    }  # fmt: skip
    by_arm = {one["arm"]["way"]: one for one in found["summary"]}
    assert by_arm["none"]["memory_bytes"] == 0
    assert by_arm["ewc"]["memory_bytes"] > by_arm["replay"]["memory_bytes"] > 0
    assert all(0.0 <= one["learned"] <= 1.0 and one["cells"] == 1 for one in found["summary"])
    first = [row["accuracy"][0] for row in found["rows"] if row["seed"] == 1]
    assert all(row == first[0] for row in first), "the first task is learned alike under every arm"
