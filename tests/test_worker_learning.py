"""A worker that is never idle still learns, and gives no more than its share of the time to it."""

from __future__ import annotations

import threading
import time

import pytest

from ruvllm_core.generate.worker import Worker

_STEPS, _STEP_S, _TICK_S = 260, 0.005, 0.02


class Busy:
    """A backend with so many steps to do, and nothing to say."""

    def __init__(self) -> None:
        self.left = _STEPS
        self.done = threading.Event()

    @property
    def busy(self) -> bool:
        return self.left > 0

    def step(self) -> list[object]:
        time.sleep(_STEP_S)
        self.left -= 1
        if not self.left:
            self.done.set()
        return []


class Loop:
    """Notes how often it was given time while the backend was busy."""

    def __init__(self, backend: Busy, more: bool) -> None:
        self.backend, self.more, self.ticks = backend, more, 0

    def tick(self, budget_s: float) -> bool:
        if self.backend.busy and self.backend.left < _STEPS:
            self.ticks += 1
            if self.more:
                time.sleep(min(budget_s, _TICK_S))
            return self.more
        return False


@pytest.mark.parametrize("more", [True, False])
def test_a_busy_worker_gives_a_share_to_learning(more: bool) -> None:
    backend = Busy()
    loop = Loop(backend, more)
    worker = Worker(backend, [loop])  # type: ignore[arg-type, list-item]
    began = time.perf_counter()
    try:
        assert backend.done.wait(30.0)
        spent = time.perf_counter() - began
    finally:
        worker.close()
    assert loop.ticks >= 1
    # A 32nd of the time, and one slice more; a loop with nothing to do is not asked after every step.
    assert loop.ticks * _TICK_S <= spent / 32 + _TICK_S
