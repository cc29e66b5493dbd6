"""Single operations in core's eager decoder, each against PyTorch's, and what they refuse."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from ruvllm_core.decode.decoder import EagerDecoder
from ruvllm_core.decode.kv import KVStorage, KVView, Segment
from ruvllm_core.decode.ops import AttentionInput
from ruvllm_core.errors import ConfigError
from ruvllm_core.model.quant import QuantTensor
from ruvllm_core.protocols import DecoderOptions, KernelProvider
from ruvllm_core.registry import Registry
from ruvllm_core.settings import Settings
from ruvllm_core.testing import KernelSuite, tiny
from ruvllm_kernels_cpu import hooks, library
from ruvllm_kernels_cpu.ops import CpuOps
from ruvllm_kernels_cpu.provider import CpuKernels

EAGER = hooks.Settings(decoder=False)


class TestOps(KernelSuite):
    settings = EAGER
    quantized_tolerance = 5e-4  # activations are rounded to 16 bits

    def make_provider(self, options: DecoderOptions) -> KernelProvider:
        provider = CpuKernels(replace(options, threads=2, plugin=self.settings))
        assert provider.decoder(tiny.tiny_spec(), {}, options) is None
        return provider


class TestGenericOps(TestOps):
    settings = hooks.Settings(decoder=False, isa="generic")


@pytest.mark.parametrize("kind", ["f16", "bf16"])
def test_a_cache_in_half_precision(kind: str) -> None:
    """Keys and values are rounded as PyTorch rounds them, so what is found there is the same but for the last bits."""
    options = DecoderOptions(dtype="float32", device="cpu", threads=2, max_context=tiny.CONTEXT, plugin=EAGER)
    spec = tiny.tiny_spec()
    weights, text = tiny.tiny_weights(spec), tiny.TEXTS["c"]
    provider, reference = CpuKernels(options), tiny.tiny_decoder(spec, weights)
    decoder = EagerDecoder(spec, weights, provider, options)
    decoder.kv_schemes = reference.kv_schemes = (kind,)
    tiny.assert_close(tiny.whole(decoder, text), tiny.whole(reference, text), 1e-3, kind)


@pytest.fixture(scope="module")
def ops() -> CpuOps:
    return CpuOps(library.kernels("auto"), 2, 16)


def matrix(rows: int = 8, columns: int = 32) -> QuantTensor:
    return QuantTensor.from_float(np.random.default_rng(0).normal(size=(rows, columns)).astype(np.float32))


def view(table: int = 0, length: int = 3, dtype: torch.dtype = torch.float32) -> KVView:
    stored = [torch.zeros((2, 2, 4, 32), dtype=dtype)]
    storage = KVStorage("f32", 2, 4, stored, [stored[0].clone()], 0)
    numbers = (np.array(x, np.int32) for x in ([[table]], [length], [0]))
    return KVView([Segment(storage, *numbers)], np.arange(3, dtype=np.int64))


def attend(ops: CpuOps, query: Any = None, cu_q: Any = (0, 3), positions: Any = (0,), **changes: Any) -> Any:
    query = torch.zeros((3, 4, 32)) if query is None else query
    return ops.attention(AttentionInput(query, 0, view(**changes), cu_q, positions, 1.0, None, None))


def test_numbers_of_rows_that_fill_no_panel(ops: CpuOps) -> None:
    """Stacked matrices of odd heights, no tokens, one, and many; and tensors with gaps."""
    rng = np.random.default_rng(1)
    parts = [matrix(rows) for rows in (1, 17, 49)]
    plain = torch.cat([torch.from_numpy(part.dequantize()) for part in parts])
    weight = ops.prepare(parts)
    for count in (0, 1, 2, 7, 33):
        x = torch.from_numpy(rng.normal(size=(count, 64)).astype(np.float32))[:, ::2]
        torch.testing.assert_close(ops.linear(x, weight), x @ plain.T, rtol=1e-5, atol=1e-5)
    one = ops.prepare(parts[2:])
    ids = torch.tensor([0, 48, 7, 7])
    torch.testing.assert_close(ops.embed(one, ids), plain[18:][ids], rtol=0, atol=0)
    assert ops.embed(one, ids[:0]).shape == (0, 32)


def test_what_it_is_given_stays_as_it_is(ops: CpuOps) -> None:
    x, residual, weight = torch.randn(5, 2, 32), torch.randn(5, 32), torch.randn(32)
    before = x.clone(), residual.clone()
    ops.rope(x, torch.randn(5, 16), torch.randn(5, 16), False)
    ops.add_rms_norm(x[:, 0], residual, weight, 1e-5)
    ops.rms_norm(residual, weight, 1e-5)
    assert torch.equal(x, before[0]) and torch.equal(residual, before[1])


BAD: dict[str, tuple[type[Exception], str, Callable[[CpuOps], Any]]] = {
    "half": (ConfigError, "x is torch.float16", lambda o: o.rms_norm(torch.zeros(1, 4).half(), torch.zeros(4), 1e-5)),
    "weight": (ValueError, r"weight must be \[4\]", lambda o: o.rms_norm(torch.zeros(1, 4), torch.zeros(5), 1e-5)),
    "residual": (
        *(ValueError, r"residual must be \[2, 4\]"),
        lambda o: o.add_rms_norm(torch.zeros(2, 4), torch.zeros(1, 4), torch.zeros(4), 1e-5),
    ),
    "columns": (ValueError, r"x must be \[None, 32\]", lambda o: o.linear(torch.zeros(1, 31), o.prepare([matrix()]))),
    "stack": (ValueError, "equal width", lambda o: o.prepare([matrix(), matrix(columns=64)])),
    "nothing": (ValueError, "equal width", lambda o: o.prepare([])),
    "token": (ValueError, r"tokens must be in \[0, 8\)", lambda o: o.embed(o.prepare([matrix()]), torch.tensor([8]))),
    "negative": (ValueError, r"tokens must be in", lambda o: o.embed(o.prepare([matrix()]), torch.tensor([-1]))),
    "two": (ValueError, "one matrix", lambda o: o.embed(o.prepare([matrix()] * 2), torch.tensor([0]))),
    "cos": (
        *(ValueError, r"cos must be \[3, None\]"),
        lambda o: o.rope(torch.zeros(3, 1, 8), torch.zeros(2, 4), torch.zeros(2, 4), False),
    ),
    "sin": (
        *(ValueError, r"sin must be \[3, 4\]"),
        lambda o: o.rope(torch.zeros(3, 1, 8), torch.zeros(3, 4), torch.zeros(3, 3), False),
    ),
    "wide": (
        *(ValueError, "cos has 5 columns"),
        lambda o: o.rope(torch.zeros(3, 1, 8), torch.zeros(3, 5), torch.zeros(3, 5), False),
    ),
    "odd": (ValueError, "no halves", lambda o: o.gated(torch.zeros(1, 5), "silu")),
    "activation": (ValueError, "'relu' is no activation", lambda o: o.gated(torch.zeros(1, 4), "relu")),
    "slots": (
        *(ValueError, r"key must be \[3, 2, 32\]"),
        lambda o: o.kv_append(view(), 0, torch.zeros(2, 2, 32), torch.zeros(2, 2, 32)),
    ),
    "value": (
        *(ValueError, r"value must be \[3, 2, 32\]"),
        lambda o: o.kv_append(view(), 0, torch.zeros(3, 2, 32), torch.zeros(3, 2, 16)),
    ),
    "heads": (
        *(ValueError, "storage must be contiguous"),
        lambda o: o.kv_append(view(), 0, torch.zeros(3, 4, 32), torch.zeros(3, 4, 32)),
    ),
    "table": (ValueError, "block_table names blocks", lambda o: attend(o, table=2)),
    "length": (ValueError, r"lengths must be in \[0, 5\)", lambda o: attend(o, length=5)),
    "cu_q": (ValueError, "cu_q must rise", lambda o: attend(o, cu_q=(0, 4))),
    "position": (ValueError, "positions must be in", lambda o: attend(o, positions=(-1,))),
    "sharing": (ValueError, "3 query heads cannot share 2", lambda o: attend(o, query=torch.zeros(3, 3, 32))),
    "dim": (ValueError, "storage must be contiguous", lambda o: attend(o, query=torch.zeros(3, 4, 16))),
    "bytes": (ConfigError, "cannot read keys and values", lambda o: attend(o, dtype=torch.int8)),
}


@pytest.mark.parametrize("what", BAD)
def test_what_does_not_fit_never_reaches_the_library(ops: CpuOps, what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    error, says, call = BAD[what]
    monkeypatch.setattr(ops, "_call", lambda name, *_: pytest.fail(f"{name} was called"))
    with pytest.raises(error, match=says):
        call(ops)


def test_slots_out_of_range(ops: CpuOps) -> None:
    full = view()
    full.slots = np.array([0, 1, 8])
    with pytest.raises(ValueError, match=r"slots must be in \[0, 8\)"):
        ops.kv_append(full, 0, torch.zeros(3, 2, 32), torch.zeros(3, 2, 32))


def test_a_setting_asks_for_them() -> None:
    settings = Settings(kernels=["cpu"], plugins={"kernels_cpu": {"decoder": "false"}})
    registry = Registry(settings)
    registry.register(hooks, "kernels_cpu", library.DISTRIBUTION, "0.1.0")
    options = DecoderOptions(device="cpu", threads=1, max_context=tiny.CONTEXT, plugin=registry.options("kernels_cpu"))
    assert registry.load("kernels", "cpu")(options).decoder(tiny.tiny_spec(), {}, options) is None
