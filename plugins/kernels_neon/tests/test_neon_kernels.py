"""Every micro-kernel of every level under emulation, against double; and the public functions' attention."""

from __future__ import annotations

import ctypes
import signal
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from ruvllm_kernels_neon import attention

#: Emulated processors, and the best level each has.
PROCESSORS = {"cortex-a53": "neon", "cortex-a76": "neon-dotprod", "max": "neon-i8mm"}
LEVELS = ["neon", "neon-dotprod", "neon-i8mm"]
SCHEMES = ["f32", "f16", "bf16", "q4_0", "q4_1", "q5_0", "q5_1", "q8_0", "q2_k", "q3_k", "q4_k", "q5_k", "q6_k"]
ATTENTION = ["attention", "attention-q8", "attention-q4"]


@pytest.mark.parametrize("cpu", PROCESSORS)
def test_every_kernel_against_double(arm64: Any, cpu: str) -> None:
    ran = arm64(cpu, "check_kernels")
    assert ran.returncode == 0, ran.stdout + ran.stderr
    lines = ran.stdout.splitlines()
    assert f"detected {PROCESSORS[cpu]}" in lines
    had = LEVELS[: LEVELS.index(PROCESSORS[cpu]) + 1]
    expected = [(level, what) for level in had for what in ("quantize", *SCHEMES, *ATTENTION)]
    expected += [("neon", what) for what in ("norm", "rope", "gated", "moves", "moves-q8", "moves-q4")]
    found = [tuple(line.split(":")[0].split()) for line in lines if "comparisons" in line]
    assert sorted(found) == sorted(expected)


@pytest.mark.parametrize(("level", "lacks", "has"), [(1, "cortex-a53", "cortex-a76"), (2, "cortex-a76", "max")])
def test_each_level_uses_its_instructions(arm64: Any, level: int, lacks: str, has: str) -> None:
    """Forced upon a processor that has not got them, they end the program; so they were what was checked above."""
    for what in ([], ["attention"]):
        ran = arm64(lacks, "check_kernels", "force", str(level), *what)
        assert ran.returncode in (-signal.SIGILL, 128 + signal.SIGILL)
    assert arm64(has, "check_kernels", "force", str(level)).stdout.startswith("ran")


def test_the_structure_is_the_same_in_c(arm64: Any) -> None:
    fields = dict(line.split() for line in arm64("max", "check_kernels", "layout").stdout.splitlines())
    assert int(fields.pop("size")) == ctypes.sizeof(attention._Call)
    assert {name: int(at) for name, at in fields.items()} == {
        name: getattr(attention._Call, name).offset for name, *_ in attention._Call._fields_
    }


def reference(
    query: npt.NDArray[Any], key: npt.NDArray[Any], value: npt.NDArray[Any], scale: float, causal: bool, window: int
) -> npt.NDArray[np.float64]:
    """Attention of ``[T, H, D]`` with ``[K, S, D]`` by its formula, in float64."""
    tokens, heads, length = query.shape[0], query.shape[1], key.shape[1]
    group = heads // key.shape[0]
    wide = [np.repeat(one.astype(np.float64), group, axis=0) for one in (key, value)]
    scores = np.einsum("thd,hsd->hts", query.astype(np.float64), wide[0]) * scale
    own = np.arange(tokens)[:, None] + length - tokens
    at = np.arange(length)[None, :]
    if causal:
        scores[:, (at > own) | ((window > 0) & (at <= own - window))] = -np.inf
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return np.einsum("hts,hsd->thd", weights / weights.sum(-1, keepdims=True), wide[1])


@pytest.mark.parametrize(
    ("heads", "kv_heads", "dim", "tokens", "length", "causal", "window"),
    [
        (1, 1, 64, 1, 1, True, 0),
        (2, 2, 40, 70, 70, True, 0),
        (6, 2, 64, 9, 130, False, 0),
        (8, 1, 128, 3, 200, True, 0),
        (4, 2, 33, 66, 150, True, 20),
    ],
)
def test_flash_attention_against_numpy(
    arm64: Any, tmp_path: Path, heads: int, kv_heads: int, dim: int, tokens: int, length: int, causal: bool, window: int
) -> None:
    rng = np.random.default_rng(heads + tokens)
    query = rng.normal(size=(tokens, heads, dim)).astype(np.float32)
    key, value = (rng.normal(size=(kv_heads, length, dim)).astype(np.float32) for _ in range(2))
    scale = 2.0 * dim**-0.5
    call = attention._Call(
        tokens=tokens,
        keys=length,
        window=window,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=dim,
        causal=causal,
        scale=scale,
    )
    given, made = tmp_path / "in", tmp_path / "out"
    given.write_bytes(bytes(call) + query.tobytes() + key.tobytes() + value.tobytes())
    assert arm64("cortex-a53", "check_kernels", "attention", given, made).returncode == 0
    found = np.frombuffer(made.read_bytes(), np.float32).reshape(query.shape)
    expected = reference(query, key, value, scale, causal, window)
    assert np.abs(found - expected).max() < 3e-6
