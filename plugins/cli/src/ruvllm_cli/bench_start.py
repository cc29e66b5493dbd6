"""How long somebody who types ``ruvllm run`` waits for the first word: process, imports, loading and prompt."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from ruvllm_core.errors import GenerationError

#: Everything a short question needs; a template of the model's own is applied as always.
PROMPT = "Why is the sky blue?"


def first_token(
    model: str, options: Sequence[str] = (), *, repeats: int = 3, environment: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """Seconds from starting ``ruvllm run MODEL PROMPT --max-tokens 1`` to the first byte of its answer.

    Runs it once more than `repeats`, the first time to have files in memory ("warm disk").

    Args:
        options: more options of the command.
        environment: of the process; None is ours.

    Returns:
        ``first_token_s`` and ``exit_s`` (the end of the process), medians, and ``first_token_s_runs``.

    Raises `GenerationError` with the end of its standard error if the command fails or writes nothing.
    """
    once = ["--max-tokens", "1", "--temperature", "0", "--log-level", "error"]
    command = [sys.executable, "-m", "ruvllm_core.cli.main", "run", model, PROMPT, *once, *options]
    runs = [_timed(command, environment) for _ in range(repeats + 1)][1:]
    first = [seconds for seconds, _ in runs]
    return {
        "first_token_s": median(first),
        "exit_s": median(seconds for _, seconds in runs),
        "first_token_s_runs": first,
    }


def _timed(command: Sequence[str], environment: Mapping[str, str] | None) -> tuple[float, float]:
    with tempfile.TemporaryDirectory() as folder:
        errors = Path(folder) / "stderr"
        with errors.open("wb") as sink:
            begin = time.perf_counter()
            with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=sink, env=environment) as child:
                assert child.stdout is not None
                some = os.read(child.stdout.fileno(), 1)
                first = time.perf_counter() - begin
                child.stdout.read()
                child.wait()
                end = time.perf_counter() - begin
        if child.returncode or not some:
            said = errors.read_text(encoding="utf-8", errors="replace").strip()[-2000:]
            raise GenerationError(
                f"`ruvllm run` ended with exit code {child.returncode} before its first token: {said}"
            )
    return first, end
