"""Whether the kernels can run here, found out without importing PyTorch or Triton."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path

_DEVICES = Path("/dev")


def missing() -> str | None:
    """Why the kernels cannot run here, or None."""
    if not sys.platform.startswith("linux"):
        return "Triton runs on Linux only"
    # A GPU is a device file of its number; under WSL all of them are one.
    if not any(_DEVICES.glob("nvidia[0-9]*")) and not (_DEVICES / "dxg").exists():
        return "there is no NVIDIA GPU, or its driver is not installed"
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed: pip install triton"
    if _torch_is_without_cuda():
        return "this PyTorch was built without CUDA: install the build for your driver, see pytorch.org"
    return None


def _torch_is_without_cuda() -> bool:
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        return True
    version = Path(spec.origin).parent / "version.py"
    text = version.read_text(encoding="utf-8") if version.is_file() else ""
    return re.search(r"^cuda\b.*=\s*None\s*$", text, flags=re.MULTILINE) is not None
