"""What this process may use of its machine: memory and processors."""

from __future__ import annotations

import math
import os
import sys
from pathlib import Path

import psutil

from ruvllm_core.errors import OutOfMemoryError

_CGROUP, _DEVICES = Path("/sys/fs/cgroup"), Path("/dev")


def available_memory() -> int:
    """Bytes that can be allocated without swapping: of the machine, or of the control group if that has less."""
    available = int(psutil.virtual_memory().available)
    for limit_file, usage_file in (
        ("memory.max", "memory.current"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
    ):
        try:
            limit, usage = ((_CGROUP / name).read_text().strip() for name in (limit_file, usage_file))
        except OSError:
            continue
        if limit.isdigit():
            available = min(available, max(0, int(limit) - int(usage)))
    return available


def require_memory(needed: int, purpose: str, remedy: str = "") -> None:
    """Raise `OutOfMemoryError` if `needed` bytes for `purpose` are more than there are."""
    available = available_memory()
    if needed > available:
        raise OutOfMemoryError(
            f"{purpose} need {needed / 2**30:.2f} GiB, but only {available / 2**30:.2f} GiB are available",
            hint=remedy or "use a smaller model or a smaller arithmetic type, or close other programs",
        )


def kernels_device(kernels: str | list[str], device: str) -> str:
    """The device to look for kernels on: `device`, but a GPU that PyTorch can use where both settings are ``auto``.

    PyTorch is not imported where Linux knows of no GPU.
    """
    nodes = [node.name for node in _DEVICES.glob("*") if node.name.startswith(("nvidia", "kfd", "dxg"))]
    if not kernels == device == "auto" or (sys.platform == "linux" and not nodes):
        return device
    import torch

    return "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else device


def usable_cpus() -> int:
    """Processors that this process may run on, its control group's share rounded up."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = (_CGROUP / "cpu.max").read_text().split()
    except (OSError, ValueError):
        return count
    return min(count, math.ceil(int(quota) / int(period))) if quota.isdigit() else count
