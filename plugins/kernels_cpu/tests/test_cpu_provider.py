"""What the provider registers, and how settings reach it."""

from __future__ import annotations

import importlib
from dataclasses import replace

import pytest

from ruvllm_cli.plugins_command import selections
from ruvllm_core.errors import ConfigError, PluginError
from ruvllm_core.protocols import DecoderOptions
from ruvllm_core.registry import Registry
from ruvllm_core.settings import Settings, load_settings
from ruvllm_core.testing import tiny
from ruvllm_kernels_cpu import hooks, library
from ruvllm_kernels_cpu.provider import CpuKernels

OPTIONS = DecoderOptions(device="cpu", threads=1, max_context=tiny.CONTEXT)


def test_it_is_there_by_name_and_comes_before_pytorch_on_a_cpu() -> None:
    registry = Registry(Settings())
    registry.register(importlib.import_module("ruvllm_core.builtin"), "core", "ruvllm-core", "0.1.0")
    registry.register(hooks, "kernels_cpu", library.DISTRIBUTION, "0.1.0")
    assert not registry.quarantined
    assert registry.load("kernels", "cpu") is CpuKernels
    for device, chosen in (("cpu", "cpu"), ("cuda", "torch"), ("mps", "torch")):
        assert selections(registry, Settings(device=device))["kernels"]["selected"] == [chosen]
    with pytest.raises(PluginError, match="it runs on cpu, not on cuda:1"):
        registry.load("kernels", "cpu", "cuda:1")


def test_a_setting_or_a_variable_forces_an_instruction_set(monkeypatch: pytest.MonkeyPatch) -> None:
    generic = replace(OPTIONS, plugin=hooks.Settings(isa="generic"))
    assert CpuKernels(generic).isa == "generic"
    assert CpuKernels(OPTIONS).isa == CpuKernels(replace(OPTIONS, plugin=hooks.Settings())).isa
    with pytest.raises(ConfigError, match=r"no NEON code\n.*kernels neon"):
        CpuKernels(replace(OPTIONS, plugin=hooks.Settings(isa="neon")))
    monkeypatch.setenv("RUVLLM_CPU_ISA", "generic")
    settings = load_settings(kernels=["cpu"])
    registry = Registry.discover(settings)
    assert registry.options("kernels_cpu") == hooks.Settings(isa="generic")
    monkeypatch.setenv("RUVLLM_CPU_ISA", "sse9")
    with pytest.raises(ConfigError, match=r"plugins\.kernels_cpu\.isa: .*'avx2'"):
        Registry.discover(load_settings()).check_settings()
    monkeypatch.setenv("RUVLLM_CPU_ISO", "avx2")
    with pytest.raises(ConfigError, match="did you mean RUVLLM_CPU_ISA"):
        load_settings()
