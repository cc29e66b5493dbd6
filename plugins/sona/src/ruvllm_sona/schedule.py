"""`Schedule`: jobs that are done a slice at a time, so that nobody waits long for the thread they run on."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass, field
from typing import Any

from ruvllm_core.log import get_logger

_PATIENCE_S = 0.002  # for futures, when there is nothing else to do
_log = get_logger("sona")


@dataclass
class _Job:
    name: str
    rank: int
    work: Iterator[object]
    failed: Callable[[Exception], None] | None = None
    waits: Future[Any] | None = None

    @property
    def ready(self) -> bool:
        return self.waits is None or self.waits.done()


@dataclass
class Schedule:
    """Jobs are generators that yield between slices. The lowest rank goes first, and within a rank who came first.

    A job that yields a future waits for it, and others go on meanwhile.

    A slice cannot be cut short, so one is begun only if slices of its kind, as they were lately, fit into what is left
    of the budget; but one is begun in any case, or a small budget would get nothing done.
    """

    _jobs: list[_Job] = field(default_factory=list)
    _lately: dict[str, deque[float]] = field(default_factory=dict)

    def add(
        self, name: str, work: Iterator[object], rank: int = 0, failed: Callable[[Exception], None] | None = None
    ) -> None:
        """Queue a job; `failed` hears of an exception, which ends the job and is logged."""
        self._jobs.append(_Job(name, rank, work, failed))
        self._jobs.sort(key=lambda job: job.rank)  # stable

    def has(self, name: str) -> bool:
        return any(job.name == name for job in self._jobs)

    def __len__(self) -> int:
        return len(self._jobs)

    def run(self, budget_s: float) -> bool:
        """Work for at most `budget_s` seconds; True if jobs are left."""
        ends, begun = time.perf_counter() + budget_s, False
        while self._jobs:
            job = next((job for job in self._jobs if job.ready), None)
            if job is None:
                if begun or budget_s <= 0.0:
                    break
                begun = True
                wait([job.waits for job in self._jobs if job.waits], _PATIENCE_S, FIRST_COMPLETED)
                continue
            lately = self._lately.setdefault(job.name.partition(" ")[0], deque(maxlen=64))
            began = time.perf_counter()
            if begun and began + max(lately, default=0.0) > ends:
                break
            begun = True
            self._slice(job)
            lately.append(time.perf_counter() - began)
        return bool(self._jobs)

    def drop(self, name: str | None = None) -> None:
        """End the jobs of that name, or all."""
        for job in [job for job in self._jobs if name in (None, job.name)]:
            self._jobs.remove(job)
            getattr(job.work, "close", lambda: None)()

    def _slice(self, job: _Job) -> None:
        try:
            found = next(job.work)
            job.waits = found if isinstance(found, Future) else None
        except StopIteration:
            self._remove(job)
        except Exception as error:
            self._remove(job)
            _log.error("a job of learning failed", job=job.name, error=f"{type(error).__name__}: {error}")
            _log.debug("traceback", exc_info=error)
            if job.failed is not None:
                job.failed(error)

    def _remove(self, job: _Job) -> None:
        if job in self._jobs:  # it may have dropped itself
            self._jobs.remove(job)
