"""Backend ``candle``: first come, first served, at the lowest latency for whoever is being served."""

from __future__ import annotations

from collections import deque

from ruvllm_candle_like.settings import CandleSettings
from ruvllm_core.errors import CacheFull
from ruvllm_core.generate.request import Request, TokenEvent
from ruvllm_core.generate.sequence import Sequence, run_batch
from ruvllm_core.protocols import BackendContext, CacheStats


class CandleBackend:
    """Runs up to `max_sequences` requests at a time, one by default, in the order in which they came.

    With one, a request's tokens never depend on what else is asked of the engine, not even in rounding. With more,
    prompts are computed one by one and the tokens of all running requests in one batch.
    """

    def __init__(self, context: BackendContext) -> None:
        options = context.options or CandleSettings()
        self._spec = context.spec
        self._decoder = context.decoder
        self._chunk = context.prefill_chunk
        self._speculator = context.speculator
        self._limit = options.max_sequences
        self._cache = context.cache(self._limit)
        self._queue: deque[Request] = deque()
        self._running: list[Sequence] = []

    @property
    def busy(self) -> bool:
        return bool(self._queue or self._running)

    def submit(self, request: Request) -> None:
        self._queue.append(request)

    def cancel(self, request_id: str) -> None:
        self._queue = deque(request for request in self._queue if request.id != request_id)
        for sequence in [s for s in self._running if s.request.id == request_id]:
            self._drop(sequence)

    def step(self) -> list[TokenEvent]:
        """Admit who fits, then compute a chunk of the oldest unfinished prompt, or one token of every request."""
        events = self._admit()
        prefilling = next((s for s in self._running if s.pending > 1 or not s.generated), None)
        if prefilling is not None:
            work = [(prefilling, min(prefilling.pending, self._chunk))]
        else:
            work = [(sequence, 1) for sequence in self._running]
        if work:
            events += run_batch(self._decoder, self._cache, work, self._speculator)
        ended = {event.request_id for event in events if event.finish_reason is not None}
        for sequence in [s for s in self._running if s.request.id in ended]:
            self._drop(sequence)
        return events

    def cache_stats(self) -> CacheStats:
        return self._cache.stats()

    def close(self) -> None:
        self._queue.clear()
        for sequence in list(self._running):
            self._drop(sequence)

    def _admit(self) -> list[TokenEvent]:
        while self._queue and len(self._running) < self._limit:
            request = self._queue[0]
            try:
                sequence = Sequence(request, self._cache, self._spec)
            except CacheFull as error:
                if self._running:
                    break  # somebody will finish and make room
                self._queue.popleft()
                return [TokenEvent(request.id, None, "error", error=error)]
            self._queue.popleft()
            self._running.append(sequence)
        return []

    def _drop(self, sequence: Sequence) -> None:
        self._running.remove(sequence)
        self._cache.close(sequence.request.id)
