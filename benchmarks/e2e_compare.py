"""`compare`: ours and llama.cpp on the same file with the same threads, in turn."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from typing import Any

from sides import Side, interleave, start

from ruvllm_core.errors import ConfigError
from ruvllm_core.model.hub import resolve
from ruvllm_core.settings import load_settings

PHASES = ("prefill", "decode")


def compare(
    model: str, job: dict[str, Any], repeats: int, peer_python: str | None, flash: Sequence[str]
) -> dict[str, Any]:
    """Measure a model, with a `peer_python` in turn with llama.cpp.

    Args:
        model: as users name it.
        job: ``threads``, ``kernels``, ``prefill``, ``decode`` and ``depth``.
        flash: which of ``on`` and ``off`` to run llama.cpp's flash attention with; the better counts, phase by phase.

    Raises what `Side` raises, and `ConfigError` for a model that llama.cpp cannot read.
    """
    path = resolve(model, load_settings(model=model))
    if peer_python and path.is_dir():
        raise ConfigError(f"{path} is a folder, which llama.cpp cannot load", hint="name a GGUF file")
    job = {**job, "model": str(path)}
    with ExitStack() as stack:
        sides = [stack.enter_context(start("ruvllm", job))]
        if peer_python:
            sides.append(stack.enter_context(start("llama-cpp", {**job, "flash_attention": flash}, peer_python)))
        interleave(sides, repeats)
    result = {**job, "model": model, "path": str(path), "repeats": repeats}
    result |= {side.name: figures(side, job, path) for side in sides}
    if peer_python:
        ours, theirs = (result[side.name] for side in sides)
        result["ratios"] = {phase: ratios(ours, theirs, phase) for phase in PHASES}
    return result


def figures(side: Side, job: dict[str, Any], path: Path) -> dict[str, Any]:
    """Speeds in tokens a second, of the better variant of each phase; memory in MB (10⁶ bytes)."""
    found: dict[str, Any] = {key: value for key, value in side.about.items() if key not in ("variants", "path")}
    for phase in PHASES:
        speeds = {
            variant: [job[phase] / seconds for seconds in getattr(runs, f"{phase}_s")]
            for variant, runs in side.runs.items()
        }
        best = max(speeds, key=lambda variant: median(speeds[variant]))
        found |= {f"{phase}_tok_s": median(speeds[best]), f"{phase}_tok_s_runs": speeds[best]}
        if best:
            found[f"{phase}_flash_attention"] = best
    found["peak_mb"] = found["overhead_mb"] = None
    if side.peak_bytes is not None:
        found["peak_mb"] = side.peak_bytes / 1e6
        if path.is_file() and "kv_bytes" in found:
            found["overhead_mb"] = (side.peak_bytes - path.stat().st_size - found["kv_bytes"]) / 1e6
    found["busy_while_waiting"] = side.disturbing_s / side.waiting_s if side.waiting_s else 0.0
    return found


def ratios(ours: dict[str, Any], theirs: dict[str, Any], phase: str) -> dict[str, float]:
    """Our speed over theirs: of the medians, and the median of those of each round."""
    key = f"{phase}_tok_s"
    pairs = [mine / other for mine, other in zip(ours[f"{key}_runs"], theirs[f"{key}_runs"], strict=True)]
    return {"of_medians": ours[key] / theirs[key], "of_pairs": median(pairs)}
