"""`Side`: a process that measures when it is told to; and `interleave`, which lets several do so in turn.

Each has loaded its model and stays alive, so that what is compared ran within seconds on the same machine in the same
state, and neither pays for the other's memory or threads.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from ruvllm_core.errors import ConfigError, RuvLLMError

CHILD = Path(__file__).resolve().parent / "e2e_side.py"
SETTLE_S = 0.2  # threads that spin after their last work have given up by then
IDLE_SHARE = 0.05  # of a core; who uses more while the others are measured disturbs them


@dataclass
class Runs:
    """What one variant of a side measured: seconds of every run."""

    prefill_s: list[float] = field(default_factory=list)
    decode_s: list[float] = field(default_factory=list)


class Side:
    """A child process; use it as a context manager.

    Attributes:
        name: for tables and messages.
        about: what it says about itself, once it has loaded.
        runs: by variant.
        peak_bytes: most memory it has used, if it says so.
        waiting_s, disturbing_s: seconds for which others were measured, and processor seconds it used meanwhile.

    Raises `ConfigError` if the program is not there, and `RuvLLMError` with what the child reports.
    """

    def __init__(self, name: str, command: Sequence[str], job: dict[str, Any]) -> None:
        self.name = name
        self.runs: dict[str, Runs] = {}
        self.peak_bytes: int | None = None
        self.waiting_s = self.disturbing_s = 0.0
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        environment = {**os.environ, "OMP_NUM_THREADS": str(job["threads"])}
        try:
            self._child = subprocess.Popen(command, env=environment, **pipes)
        except OSError as error:
            raise ConfigError(f"{name}: cannot start {command[0]}: {error.strerror}") from None
        try:
            self.about = self._ask(job)
            self.runs = {variant: Runs() for variant in self.about["variants"]}
        except BaseException:
            self.close()
            raise

    def run(self, variant: str) -> None:
        """Measure once. Raises `RuvLLMError`."""
        answer = self._ask({"variant": variant})
        self.runs[variant].prefill_s.append(answer["prefill_s"])
        self.runs[variant].decode_s.append(answer["decode_s"])
        self.peak_bytes = answer["peak_bytes"]

    def cpu_s(self) -> float:
        """Processor seconds used so far."""
        times = psutil.Process(self._child.pid).cpu_times()
        return float(times.user + times.system)

    def close(self) -> None:
        """End the child: it does so by itself when nobody speaks to it any more."""
        assert self._child.stdin is not None and self._child.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self._child.stdin.close()
        try:
            self._child.wait(20)
        except subprocess.TimeoutExpired:
            self._child.kill()
            self._child.wait()
        self._child.stdout.close()

    def __enter__(self) -> Side:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _ask(self, question: dict[str, Any]) -> dict[str, Any]:
        assert self._child.stdin is not None and self._child.stdout is not None
        try:
            self._child.stdin.write(json.dumps(question) + "\n")
            self._child.stdin.flush()
            line = self._child.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise RuvLLMError(f"{self.name} ended with exit code {self._child.wait()} and without an answer")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise RuvLLMError(f"{self.name}: {answer['error']}")
        return answer


def start(name: str, job: dict[str, Any], python: str = sys.executable) -> Side:
    """A side that `e2e_side.py` knows, run by the interpreter `python`."""
    return Side(name, [python, str(CHILD), name], job)


def interleave(sides: Sequence[Side], rounds: int) -> None:
    """Let each side run each of its variants, one after the other, `rounds` times; results are in ``side.runs``."""
    for _ in range(rounds):
        for side in sides:
            for variant in side.runs:
                time.sleep(SETTLE_S)
                others = [other for other in sides if other is not side]
                before = [other.cpu_s() for other in others]
                started = time.perf_counter()
                side.run(variant)
                waited = time.perf_counter() - started
                for other, used in zip(others, before, strict=True):
                    other.waiting_s += waited
                    other.disturbing_s += other.cpu_s() - used
    for side in sides:
        if side.disturbing_s > IDLE_SHARE * side.waiting_s + 0.1:
            print(
                f"warning: {side.name} used {side.disturbing_s:.1f} processor seconds in the {side.waiting_s:.1f} s in "
                "which it had to wait: the others were disturbed",
                file=sys.stderr,
            )
