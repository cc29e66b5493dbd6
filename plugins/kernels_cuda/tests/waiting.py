"""What a kernel does in Triton's interpreter, program by program: whether it waits, and what it asks for before."""

from __future__ import annotations

from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from triton.runtime import interpreter

from ruvllm_kernels_cuda import launch

_ACCESSES = (
    "create_load", "create_store", "create_masked_load", "create_masked_store",
    "create_atomic_rmw", "create_atomic_cas",
)  # fmt: skip


@dataclass
class Program:
    """One program of a launch.

    Attributes:
        waits: how often it waited.
        accesses_before: what it did to memory before.
        asked: addresses it asked for ahead of use, and whether before it waited.
        loaded: addresses it loaded.
    """

    waits: int = 0
    accesses_before: list[str] = field(default_factory=list)
    asked: list[int] = field(default_factory=list)
    late: bool = False
    loaded: set[int] = field(default_factory=set)


class Watcher:
    """Lets kernels be launched as if they could overlap, and checks each program. `programs` are the last launch's.

    Raises `AssertionError` at a launch of which a program does not wait just once, touches memory before, or that is
    not told to overlap.
    """

    def __init__(self, patch: pytest.MonkeyPatch, mode: int, addresses: bool = False) -> None:
        self.programs: list[Program] = []
        self.launched: set[str] = set()
        builder = interpreter.InterpreterBuilder
        patch.setattr(launch, "can_overlap", lambda device: True)
        patch.setattr(launch, "gdc_wait", self._wait)
        patch.setattr(launch, "gdc_launch_dependents", lambda: None)
        patch.setattr(launch, "_mode", launch.ContextVar("overlap", default=mode))
        patch.setattr(builder, "create_inline_asm", lambda _, *given: self._ask(*given))
        for name in _ACCESSES:
            patch.setattr(builder, name, self._accessing(name, getattr(builder, name), addresses))
        place, call = builder.set_grid_idx, interpreter.GridExecutor.__call__

        def begin(builder: Any, *index: int) -> None:
            self.programs.append(Program())
            place(builder, *index)

        def run(executor: Any, *args: Any, **given: Any) -> None:
            self.programs = []
            call(executor, *args, **given)
            name = executor.fn.__name__
            self.launched.add(name)
            mode = given.get("PDL")
            assert mode is not None and given.get("launch_pdl", False) == (mode != launch.OFF), f"{name}: {given}"
            for n, one in enumerate(self.programs if mode else ()):
                assert one.waits == 1, f"program {n} of {name} waits {one.waits} times"
                assert not one.accesses_before, f"program {n} of {name} does not wait before {one.accesses_before}"
                assert not one.late, f"program {n} of {name} asks for weights after it has waited"

        patch.setattr(builder, "set_grid_idx", begin)
        patch.setattr(interpreter.GridExecutor, "__call__", run)

    def _wait(self) -> None:
        self.programs[-1].waits += 1

    def _ask(self, assembly: str, constraints: str, values: list[Any], *_: Any) -> Any:
        assert "prefetch.global.L2" in assembly
        here = self.programs[-1]
        here.asked += np.asarray(values[0].data)[np.asarray(values[1].data) != 0].ravel().tolist()
        here.late = here.waits > 0
        return SimpleNamespace(get_result=lambda _: values[1])

    def _accessing(self, name: str, original: Any, addresses: bool) -> Any:
        def access(builder: Any, *given: Any) -> Any:
            here = self.programs[-1]
            if not here.waits:
                here.accesses_before.append(name)
            if addresses and name == "create_masked_load":
                pointers, mask = (np.asarray(one.data) for one in given[:2])
                here.loaded.update(pointers[mask].ravel().tolist())
            return original(builder, *given)

        return access
