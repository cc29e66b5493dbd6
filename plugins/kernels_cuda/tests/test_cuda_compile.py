"""Kernels compile for real GPUs, which the interpreter says nothing about, and come out as they were meant."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="needs Triton, which there is for Linux on x86-64")


def compiled(program: str, capability: int, folder: Path) -> dict[str, dict[str, int]]:
    """What a program of this folder found when it compiled for GPUs of a compute capability."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(folder), "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, Path(__file__).with_name(program), capability]
    done = subprocess.run(map(str, command), env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, dict[str, int]] = json.loads(done.stdout)
    return found


@pytest.mark.parametrize("capability", [80, 90])
def test_kernels_compile(capability: int, tmp_path: Path) -> None:
    found = compiled("compile_kernels.py", capability, tmp_path)
    for name, seen in found.items():
        kind, scheme = name.split()
        if kind in ("vector", "gated"):
            chunks = {"q4_k": 9, "q5_1": 12, "q6_k": 13, "q8_0": 17, "bf16": 1}[scheme]
            assert seen["wide"] >= chunks, f"{name}: weights are not loaded 16 bytes at a time: {seen}"
            # Sums over warps need a few at the end; values that change lanes inside the loop would need dozens.
            assert seen["barriers"] <= 16, f"{name}: values change lanes in the loop: {seen}"
        if kind == "tiles":
            assert seen["matrix"] >= 4, f"{name}: no matrix instructions: {seen}"
            assert seen["async"] >= 4, f"{name}: no asynchronous copies: {seen}"
    assert len(found) == 21


@pytest.mark.parametrize("capability", [80, 90])
def test_all_kernels_of_a_step_compile(capability: int, tmp_path: Path) -> None:
    """Of steps of a whole model, as they launch them: with adapters and without, greedy and with all filters."""
    names = {name.split()[0] for name in compiled("compile_step.py", capability, tmp_path)}
    assert {"blocks_kernel", "float_kernel", "_tile_kernel", "_attend", "_combine", "_shrink", "_search"} < names
