"""Limits of this process, from files as the kernel writes them."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from ruvllm_core import machine
from ruvllm_core.errors import OutOfMemoryError


@pytest.fixture
def group(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(machine, "_CGROUP", tmp_path)
    return tmp_path


def test_a_control_group_limits_memory(group: Path) -> None:
    assert machine.available_memory() == pytest.approx(psutil.virtual_memory().available, rel=0.2)
    (group / "memory.max").write_text("3000000\n")
    (group / "memory.current").write_text("1000000\n")
    assert machine.available_memory() == 2_000_000
    with pytest.raises(OutOfMemoryError, match=r"weights need 1\.00 GiB, but only 0\.00 GiB"):
        machine.require_memory(2**30, "weights")
    (group / "memory.max").write_text("max\n")
    machine.require_memory(1, "a byte")


def test_a_gpu_goes_first_where_nothing_else_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "_DEVICES", tmp_path)
    monkeypatch.setattr(machine.sys, "platform", "linux")
    (tmp_path / "null").touch()
    monkeypatch.setitem(sys.modules, "torch", None)  # importing it would raise
    assert machine.kernels_device("auto", "auto") == "auto"
    (tmp_path / "nvidia0").touch()
    assert machine.kernels_device(["cpu"], "auto") == "auto"
    assert machine.kernels_device("auto", "cpu") == "cpu"
    for cuda, metal, expected in ((True, False, "cuda"), (False, True, "mps"), (False, False, "auto")):
        seen = SimpleNamespace(is_available=lambda cuda=cuda: cuda), SimpleNamespace(is_available=lambda m=metal: m)
        torch = SimpleNamespace(cuda=seen[0], backends=SimpleNamespace(mps=seen[1]))
        monkeypatch.setitem(sys.modules, "torch", torch)
        assert machine.kernels_device("auto", "auto") == expected


def test_a_control_group_limits_processors(group: Path) -> None:
    everything = len(os.sched_getaffinity(0))
    assert machine.usable_cpus() == everything
    for text, count in (("max 100000", everything), ("50000 100000", 1), (f"{10**9} 100000", everything)):
        (group / "cpu.max").write_text(text + "\n")
        assert machine.usable_cpus() == count
