"""The table of comparisons with llama.cpp: what is run, and the ratios that must be reached and are aimed at.

Ratios are our speed over llama.cpp's with two threads on the same machine in the same run.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ruvllm_core.errors import ConfigError, near

Goal = tuple[float, float]  # must, aim
#: The row of `ruvllm run smollm2`, a process of its own each time.
FIRST_TOKEN = "first-token"
#: Seconds from start to first token, at most.
FIRST_TOKEN_S: Goal = (2.5, 1.0)
#: Peak memory beyond the file and its keys and values, in MB, at most.
OVERHEAD_MB: Goal = (250.0, 120.0)


@dataclass(frozen=True)
class Row:
    """One workload.

    Attributes:
        model: ``smollm2``, or the shape and scheme of a file that ``synth.py`` makes.
        goals: least ratio of ``prefill`` and ``decode``; what is not named is not judged.
    """

    model: str
    prefill: int
    decode: int
    depth: int = 0
    goals: dict[str, Goal] = field(default_factory=dict)

    def file(self, folder: Path) -> str:
        """What to load: a short name, or a file in `folder`. Raises `ConfigError` if that is not there."""
        if self.model == "smollm2":
            return self.model
        path = folder / f"{self.model}.gguf"
        if not path.is_file():
            shape, _, scheme = self.model.rpartition("-")
            raise ConfigError(f"{path} is not there", hint=f"python benchmarks/synth.py {shape} {scheme} {path}")
        return str(path)


ROWS = {
    "smollm2": Row("smollm2", 512, 64, goals={"prefill": (2.5, 4.0), "decode": (1.5, 2.0)}),
    "0.5b": Row("qwen2.5-0.5b-q4_k_m", 256, 64, goals={"prefill": (1.4, 2.0), "decode": (1.15, 1.35)}),
    "1.5b": Row("qwen2.5-1.5b-q4_k_m", 256, 32, goals={"prefill": (1.4, 2.0), "decode": (1.05, 1.15)}),
    "1.5b-depth": Row("qwen2.5-1.5b-q4_k_m", 1, 32, depth=2048, goals={"decode": (1.3, 1.45)}),
    "1.5b-q8": Row("qwen2.5-1.5b-q8_0", 256, 32, goals={"prefill": (1.2, 2.0), "decode": (1.05, 1.15)}),
}


def pick(names: str | None) -> list[str]:
    """Names of rows, given with commas between, or all. Raises `ConfigError` for one that there is not."""
    known = [*ROWS, FIRST_TOKEN]
    chosen = names.split(",") if names else known
    for name in chosen:
        if name not in known:
            raise ConfigError(f"the table has no row {name!r}", hint=near(name, known))
    return chosen


def verdict(value: float, goal: Goal, *, at_most: bool = False) -> str:
    """``aim``, ``must`` or ``missed``: the best that `value` reaches."""
    must, aim = goal
    sign = -1 if at_most else 1
    return "aim" if sign * value >= sign * aim else "must" if sign * value >= sign * must else "missed"


def judge(row: Row, result: dict[str, Any]) -> list[tuple[str, float, Goal, str]]:
    """What is judged, its figure, the goal and the verdict, for a result of `compare` with a peer.

    Of the two ratios, that of medians and that of pairs, the lower one counts.
    """
    found = []
    for phase, goal in row.goals.items():
        ratio = min(result["ratios"][phase].values())
        found.append((f"{phase}, times llama.cpp", ratio, goal, verdict(ratio, goal)))
    if (over := result["ruvllm"]["overhead_mb"]) is not None:
        mark = verdict(over, OVERHEAD_MB, at_most=True)
        found.append(("memory beyond file and KV, MB", over, OVERHEAD_MB, mark))
    return found
