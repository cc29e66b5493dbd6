"""Where deep training is, in a file."""

from __future__ import annotations

import json
from pathlib import Path

from ruvllm_core.protocols import LowRank
from ruvllm_sona.deep import DeepProgress
from ruvllm_sona.files import load_tensors, save_tensors


def save_progress(path: Path, progress: DeepProgress, covers: int) -> None:
    """Write it; `covers` is the last feedback of those that are trained on."""
    arrays = {f"state.{name}": values for name, values in progress.state.items()}
    for site, delta in (progress.deltas or {}).items():
        arrays[f"best.{site}.a"], arrays[f"best.{site}.b"] = delta.a, delta.b
    numbers = {"epoch": progress.epoch, "margin": progress.margin, "best": progress.best, "covers": covers}
    save_tensors(path, arrays, {"progress": json.dumps(numbers)})


def load_progress(path: Path, covers: int) -> DeepProgress | None:
    """What was saved; None if there is nothing, or it was trained on other feedback. Raises `LearningError`."""
    if not path.exists():
        return None
    arrays, metadata = load_tensors(path)
    numbers = json.loads(metadata["progress"])
    if numbers.pop("covers") != covers:
        return None
    best = {
        name[5:-2]: LowRank(values, arrays[f"{name[:-2]}.b"])
        for name, values in arrays.items()
        if name.startswith("best.") and name.endswith(".a")
    }
    state = {name[6:]: values for name, values in arrays.items() if name.startswith("state.")}
    return DeepProgress(deltas=best or None, state=state, **numbers)
