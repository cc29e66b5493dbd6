"""Kernels compile for real GPUs, which the interpreter says nothing about, and come out as they were meant."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="needs Triton, which there is for Linux on x86-64")


@pytest.mark.parametrize("capability", [80, 90])
def test_kernels_compile(capability: int, tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    program = Path(__file__).with_name("compile_kernels.py")
    done = subprocess.run(
        [sys.executable, str(program), str(capability)], env=environment, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout)
    for name, seen in found.items():
        kind, scheme = name.split()
        if kind == "vector":
            chunks = {"q4_k": 9, "q5_1": 12, "q6_k": 13, "q8_0": 17, "bf16": 1}[scheme]
            assert seen["wide"] >= chunks, f"{name}: weights are not loaded 16 bytes at a time: {seen}"
            # Sums over warps need a few at the end; values that change lanes inside the loop would need dozens.
            assert seen["barriers"] <= 16, f"{name}: values change lanes in the loop: {seen}"
        if kind == "tiles":
            assert seen["matrix"] >= 4, f"{name}: no matrix instructions: {seen}"
            assert seen["async"] >= 4, f"{name}: no asynchronous copies: {seen}"
    assert len(found) == 18
