"""The plugin without a GPU: what it registers, what it says, and that finding it imports nothing heavy."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import ruvllm_kernels_cuda.hooks
from ruvllm_core.errors import ConfigError, PluginError
from ruvllm_core.protocols import DecoderOptions
from ruvllm_core.registry import Registry
from ruvllm_core.settings import Settings
from ruvllm_kernels_cuda import probe
from ruvllm_kernels_cuda.provider import CudaKernels
from ruvllm_kernels_cuda.settings import CudaSettings


@pytest.fixture
def registry() -> Registry:
    made = Registry(Settings())
    made.register(ruvllm_kernels_cuda.hooks, "kernels_cuda", "ruvllm-kernels-cuda", "0.1.0")
    assert not made.quarantined
    return made


def test_it_is_for_nvidia_gpus_and_has_to_be_named(registry: Registry) -> None:
    entry = registry.entry("kernels", "cuda")
    assert entry.offer.priority < 0
    assert entry.reason("cpu") == "it runs on cuda, not on cpu"
    assert isinstance(registry.options("kernels_cuda"), CudaSettings)


def test_reasons(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, registry: Registry) -> None:
    """One after the other is put right; the last reason is what is left."""
    monkeypatch.setattr(probe, "_DEVICES", tmp_path)
    specs: dict[str, object | None] = {"triton": None, "torch": None}
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: specs[name])
    monkeypatch.setattr(sys, "platform", "darwin")
    assert probe.missing() == "Triton runs on Linux only"
    monkeypatch.setattr(sys, "platform", "linux")
    (tmp_path / "nvidiactl").touch()
    assert "no NVIDIA GPU" in (probe.missing() or "")
    with pytest.raises(PluginError, match="'cuda' of ruvllm-kernels-cuda cannot run here: there is no NVIDIA GPU"):
        registry.load("kernels", "cuda", "cuda")
    (tmp_path / "nvidia0").touch()
    assert "Triton is not installed" in (probe.missing() or "")
    specs["triton"] = SimpleNamespace()
    assert "without CUDA" in (probe.missing() or "")
    specs["torch"] = SimpleNamespace(origin=str(tmp_path / "__init__.py"))
    version = tmp_path / "version.py"
    version.write_text("debug = False\ncuda: str | None = None\nhip: str | None = None\n")
    assert "without CUDA" in (probe.missing() or "")
    version.write_text("debug = False\ncuda: str | None = '13.0'\nhip: str | None = None\n")
    assert probe.missing() is None
    (tmp_path / "nvidia0").unlink()
    (tmp_path / "dxg").touch()
    assert probe.missing() is None


def test_the_probe_reads_this_pytorch(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert probe._torch_is_without_cuda() == (torch.version.cuda is None)


def test_devices_that_will_not_do() -> None:
    with pytest.raises(ConfigError, match="kernels cuda run on NVIDIA GPUs only"):
        CudaKernels(DecoderOptions(device="cpu"))
    if not torch.cuda.is_available():
        with pytest.raises(ConfigError, match="no CUDA device"):
            CudaKernels(DecoderOptions(device="cuda"))


def test_gpus_that_are_too_old(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"GPU at {device}")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    with pytest.raises(ConfigError, match=r"8\.0 or later, GPU at cuda:1 has 7\.5"):
        CudaKernels(DecoderOptions(device="cuda:1"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    assert CudaKernels(DecoderOptions(device="cuda:1")).device == "cuda:1"


def test_discovery_imports_neither_pytorch_nor_triton() -> None:
    code = (
        "import sys, ruvllm_kernels_cuda.hooks as h\n"
        "(offer,) = h.kernels(); offer.probe()\n"
        "assert not {'torch', 'triton', 'numpy'} & set(sys.modules), sorted(sys.modules)"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True, timeout=60)
