"""Backend ``mistral``: continuous batching, for many requests at once."""

from __future__ import annotations

from collections import deque

from ruvllm_core.errors import CacheFull
from ruvllm_core.generate.request import Request, TokenEvent
from ruvllm_core.generate.sequence import Sequence, run_batch
from ruvllm_core.protocols import BackendContext, CacheStats
from ruvllm_mistral.settings import MistralSettings


class MistralBackend:
    """Every step computes a token of each running request and, beside them, pieces of prompts (arXiv 2403.02310).

    Requests join and leave between steps (Orca, OSDI 2022). A step has at most `prefill_chunk` tokens, or one for each
    request and one of a prompt if that is more. When the cache is full the newest request goes back to the head of the
    queue, and is computed anew, as far as its tokens are not cached, when another has ended; its answer stays the same.
    """

    def __init__(self, context: BackendContext) -> None:
        options = context.options or MistralSettings()
        self._spec = context.spec
        self._decoder = context.decoder
        self._step_tokens = context.prefill_chunk
        self._speculator = context.speculator
        self._limit = options.max_sequences
        self._cache = context.cache(self._limit)
        self._queue: deque[Request | Sequence] = deque()
        self._running: list[Sequence] = []
        self._full = False  # since a request was put back, and until one ends

    @property
    def busy(self) -> bool:
        return bool(self._queue or self._running)

    def submit(self, request: Request) -> None:
        self._queue.append(request)

    def cancel(self, request_id: str) -> None:
        self._queue = deque(waiting for waiting in self._queue if _request(waiting).id != request_id)
        for sequence in [s for s in self._running if s.request.id == request_id]:
            self._drop(sequence)

    def step(self) -> list[TokenEvent]:
        """Admit who fits, then compute a token of every answer and as much of the prompts as a step has room for."""
        events = self._admit()
        if self._running:
            events += self._compute()
        return events

    def cache_stats(self) -> CacheStats:
        return self._cache.stats()

    def close(self) -> None:
        self._queue.clear()
        for sequence in list(self._running):
            self._drop(sequence)

    def _compute(self) -> list[TokenEvent]:
        work = [(s, 1) for s in self._running if s.pending == 1 and s.generated]
        room = max(self._step_tokens - len(work), 1)
        for sequence in [s for s in self._running if s.pending > 1 or not s.generated]:
            if count := min(sequence.pending, room):
                work.append((sequence, count))
                room -= count
        events = run_batch(self._decoder, self._cache, work, self._speculator)
        crowded = len(self._running) > 1
        refused = [event for event in events if crowded and isinstance(event.error, CacheFull)]
        events = [event for event in events if event not in refused]
        ended = {event.request_id for event in events if event.finish_reason is not None}
        for sequence in [s for s in self._running if s.request.id in ended]:
            self._drop(sequence)
        if refused and not ended:
            self._put_back(self._running[-1])
        return events

    def _admit(self) -> list[TokenEvent]:
        while self._queue and len(self._running) < self._limit and not (self._full and self._running):
            waiting = self._queue[0]
            try:
                self._running.append(self._open(waiting))
            except CacheFull as error:
                if self._running:
                    break  # somebody will finish and make room
                self._queue.popleft()
                return [TokenEvent(_request(waiting).id, None, "error", error=error)]
            self._queue.popleft()
        return []

    def _open(self, waiting: Request | Sequence) -> Sequence:
        if isinstance(waiting, Request):
            return Sequence(waiting, self._cache, self._spec)
        request = waiting.request
        waiting.computed = self._cache.open(request.id, waiting.token_ids, request.capacity, request.cache_key)
        return waiting

    def _put_back(self, sequence: Sequence) -> None:
        self._drop(sequence)
        self._queue.appendleft(sequence)
        self._full = True

    def _drop(self, sequence: Sequence) -> None:
        self._running.remove(sequence)
        self._cache.close(sequence.request.id)
        self._full = False


def _request(waiting: Request | Sequence) -> Request:
    return waiting if isinstance(waiting, Request) else waiting.request
