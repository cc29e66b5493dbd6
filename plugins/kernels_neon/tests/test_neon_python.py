"""The plugin in Python: what it says where it cannot run, and what its functions refuse before C sees it."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import numpy as np
import pytest

import ruvllm_kernels_neon
from ruvllm_core.errors import ConfigError, PluginError
from ruvllm_core.protocols import DecoderOptions
from ruvllm_core.registry import Registry
from ruvllm_core.settings import Settings
from ruvllm_kernels_neon import AttentionConfig, flash_attention_neon, grouped_query_attention_neon, hooks, library
from ruvllm_kernels_neon.provider import NeonKernels

ELSEWHERE = library.missing() is not None
CONFIG = AttentionConfig(num_heads=4, num_kv_heads=2, head_dim=8)


def arrays(queries: Any = (4, 3, 8), keys: Any = (2, 5, 8), values: Any = (2, 5, 8)) -> list[Any]:
    return [np.ones(shape, np.float32) for shape in (queries, keys, values)]


def test_discovery_knows_it_and_why_it_cannot_run(monkeypatch: pytest.MonkeyPatch) -> None:
    registry = Registry(Settings())
    registry.register(hooks, "kernels_neon", library.DISTRIBUTION, "0.1.0")
    assert not registry.quarantined
    assert [entry.name for entry in registry.entries("kernels")] == ["neon"]
    monkeypatch.setattr(library.platform, "machine", lambda: "x86_64")
    assert hooks.probe() == "needs an ARM64 processor, this one is x86_64"
    with pytest.raises(PluginError, match="needs an ARM64 processor, this one is x86_64"):
        registry.load("kernels", "neon")
    monkeypatch.setattr(library.platform, "machine", lambda: "aarch64")
    monkeypatch.setattr(library, "NAME", "no-such-library.so")
    monkeypatch.setattr(library.cpu, "missing", lambda: None)
    assert "no-such-library.so is not built" in str(hooks.probe())
    monkeypatch.setattr(library, "missing", lambda: None)
    assert registry.load("kernels", "neon") is NeonKernels


@pytest.mark.skipif(not ELSEWHERE, reason="this is an ARM64 processor")
def test_elsewhere_everything_raises_with_the_reason() -> None:
    for use in (
        lambda: grouped_query_attention_neon(*arrays(), CONFIG),
        lambda: flash_attention_neon(*arrays((2, 3, 8)), 0.3, True),
        lambda: flash_attention_neon(*arrays((3, 8), (5, 8), (5, 8)), 0.3, True),
        lambda: NeonKernels(DecoderOptions(device="cpu")),
    ):
        with pytest.raises(PluginError, match="kernels neon: needs an ARM64 processor, this one is"):
            use()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"queries": (3, 3, 8)}, r"queries must be \[4, length, 8\], got \[3, 3, 8\]"),
        ({"keys": (2, 5, 9)}, r"keys must be \[2, length, 8\], got \[2, 5, 9\]"),
        ({"values": (2, 8)}, r"values must be \[2, length, 8\], got \[2, 8\]"),
        ({"values": (2, 6, 8)}, "5 keys but 6 values"),
        ({"queries": (4, 6, 8)}, "6 queries for 5 keys"),
    ],
)
def test_shapes_are_checked_first(change: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        grouped_query_attention_neon(*arrays(**change), CONFIG)


def test_other_bad_input_is_refused() -> None:
    with pytest.raises(ConfigError, match="keys must be floats, got int64"):
        grouped_query_attention_neon(np.ones((4, 3, 8)), np.ones((2, 5, 8), np.int64), np.ones((2, 5, 8)), CONFIG)
    with pytest.raises(ConfigError, match=r"key has shape \(5, 8\)"):
        flash_attention_neon(*arrays((2, 3, 8), (5, 8)), 0.3, True)
    with pytest.raises(ConfigError, match=r"keys must be \[3, length, 8\]"):
        flash_attention_neon(*arrays((3, 3, 8)), 0.3, False)
    for scale in (0.0, -1.0, float("nan")):
        with pytest.raises(ConfigError, match=r"AttentionConfig\.scale must be positive"):
            flash_attention_neon(*arrays((2, 3, 8)), scale, False)
    with pytest.raises(ConfigError, match="isa 'sve' is none of auto, neon"):
        library.kernels("sve")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"num_heads": 0}, "num_heads must be a positive integer"),
        ({"head_dim": 8.0}, "head_dim must be a positive integer"),
        ({"num_heads": 3}, "3 query heads cannot share 2"),
        ({"window": 0}, "window 0 with causal=True"),
        ({"window": 4, "causal": False}, "window 4 with causal=False"),
        ({"softcap": -1.0}, "softcap must be positive"),
    ],
)
def test_configurations_are_checked(change: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        AttentionConfig(**{"num_heads": 4, "num_kv_heads": 2, "head_dim": 8, **change})


def test_discovery_is_light() -> None:
    code = "import sys, ruvllm_kernels_neon.hooks as h; h.probe(); print({'numpy', 'torch'} & sys.modules.keys())"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "set()"
    with pytest.raises(AttributeError, match="no attribute 'paged'"):
        _ = ruvllm_kernels_neon.paged
