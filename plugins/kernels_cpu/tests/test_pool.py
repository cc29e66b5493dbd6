"""The thread pool on its own, under more jobs than a model's tests make."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parent.parent
COMPILER = os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++")


@pytest.mark.skipif(COMPILER is None or sys.platform == "win32", reason="needs a C++ compiler")
def test_every_task_of_every_job_runs_once(tmp_path: Path) -> None:
    """With more threads than processors some are stopped between any two instructions. Without the closing of a job
    before the next is written down, this fails within a second."""
    program = tmp_path / "pool_stress"
    sources = [FOLDER / "tests/native/pool_stress.cpp", FOLDER / "native/pool.cpp"]
    build = [
        str(COMPILER),
        "-std=c++17",
        "-O2",
        f"-I{FOLDER / 'native'}",
        *map(str, sources),
        "-o",
        str(program),
        "-pthread",
    ]
    built = subprocess.run(build, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stderr
    for threads in (2, 3, 4):
        ran = subprocess.run([str(program), str(threads), "300000"], capture_output=True, text=True, check=False)
        assert ran.returncode == 0, f"{threads} threads: {ran.stdout}{ran.stderr}"
