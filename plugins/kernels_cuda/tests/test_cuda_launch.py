"""Launches that overlap: what is asked for ahead, and that a kernel which does not wait is found out.

That every kernel waits is checked in all tests of this folder (`conftest.py`), and of compiled code in
`test_cuda_compile.py`.
"""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest
import torch

pytest.importorskip("triton", reason="needs Triton, which there is for Linux on x86-64")

import triton
import triton.language as tl

from ruvllm_core.model.quant import QuantTensor
from ruvllm_kernels_cuda.gemv import Config, gemv
from ruvllm_kernels_cuda.launch import EARLY, LATE, OFF, await_previous, can_overlap, launch_options, overlapping
from ruvllm_kernels_cuda.packing import pack
from ruvllm_kernels_cuda.scratch import Scratch

interpreted = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="looks into the interpreter")


@triton.jit
def _double(x, out, PDL: tl.constexpr, WAITS: tl.constexpr, BEFORE: tl.constexpr):  # noqa: N803
    if BEFORE:
        tl.store(out + 1, 0.0)
    if WAITS or tl.program_id(0) == 0:
        await_previous(PDL)
    tl.store(out, 2 * tl.load(x))


@interpreted
@pytest.mark.parametrize(
    ("waits", "before", "message"),
    [(True, False, None), (False, False, "program 1 of _double waits 0 times"), (True, True, "does not wait before")],
)
def test_kernels_that_do_not_wait_are_found(waits: bool, before: bool, message: str | None) -> None:
    x, out = torch.ones(1), torch.zeros(2)

    def run() -> None:
        _double[(2,)](x, out, WAITS=waits, BEFORE=before, **launch_options(x.device))

    if message is None:
        run()
        assert out[0] == 2
    else:
        with pytest.raises(AssertionError, match=message):
            run()


@interpreted
def test_launches_without_the_option_are_found() -> None:
    with pytest.raises(AssertionError, match="_double"):
        _double[(1,)](torch.ones(1), torch.zeros(2), WAITS=True, BEFORE=False, PDL=LATE)


def test_modes(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    where = torch.device(device)
    able = device == "cuda" and torch.cuda.get_device_capability() >= (9, 0)
    assert can_overlap(where) == able
    assert launch_options(where) == {"PDL": OFF}
    with overlapping(EARLY):
        with overlapping(OFF):
            assert launch_options(where) == {"PDL": OFF}
        assert launch_options(where) == ({"PDL": EARLY, "launch_pdl": True} if able else {"PDL": OFF})
    assert launch_options(where) == {"PDL": OFF}


@interpreted
@pytest.mark.parametrize("gate", [None, "silu"])
@pytest.mark.parametrize("rows", [128, 144])
@pytest.mark.parametrize(("scheme", "kib"), [("q4_k", 2), ("q4_k", 999), ("q6_k", 16), ("q8_0", 5), ("bf16", 3)])
def test_weights_asked_for_are_the_first_ones_of_a_program(
    scheme: str, kib: int, gate: str | None, rows: int, random_tensor: Callable[..., QuantTensor],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Each line once, of those that the program loads, as many as were wanted or as there are."""
    from waiting import Watcher

    columns, config = 768, Config(2, 2, 2, prefetch=kib)
    part = pack([random_tensor(scheme, rows, columns)], "cpu").parts[0]
    x, out = torch.randn(1, columns), torch.empty(1, rows if gate is None else rows // 2)
    monkeypatch.undo()
    watcher = Watcher(monkeypatch, LATE, addresses=True)
    gemv(x, part, out, Scratch.on("cpu"), config, gate=gate)
    start, size = part.data.data_ptr(), part.data.numel() * part.data.element_size()
    line = {"bf16": 64 * 2}.get(scheme, 8 * 16)
    assert len(watcher.programs) > 1
    for one in watcher.programs:
        mine = {address for address in one.loaded if start <= address < start + size}
        assert len(set(one.asked)) == len(one.asked)
        assert set(one.asked) <= mine
        covered = {asked + at for asked in one.asked for at in range(0, line, 2 if scheme == "bf16" else 4)}
        assert covered <= mine
        there = len(mine) // (64 if scheme == "bf16" else 32)
        assert 0 < len(one.asked) <= kib * 8
        assert rows == 144 or len(one.asked) == min(kib * 8, there)  # the last program has fewer rows than others


@interpreted
def test_nothing_is_asked_for_where_nothing_overlaps(
    random_tensor: Callable[..., QuantTensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    from waiting import Watcher

    part = pack([random_tensor("q4_k", 64, 256)], "cpu").parts[0]
    monkeypatch.undo()
    watcher = Watcher(monkeypatch, OFF)
    gemv(torch.randn(1, 256), part, torch.empty(1, 64), Scratch.on("cpu"), Config(2, 2, 1, prefetch=8))
    assert watcher.programs and not any(one.asked or one.waits for one in watcher.programs)
    assert launch_options(torch.device("cpu")) == {"PDL": OFF}
