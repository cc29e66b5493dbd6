"""A consumer's end of a running request."""

from __future__ import annotations

import queue
from collections.abc import Iterator

from ruvllm_core.generate.answer import Item
from ruvllm_core.generate.request import Generation, StreamEvent
from ruvllm_core.generate.worker import Worker


class Stream(Iterator[StreamEvent]):
    """Iterates over the pieces of one answer as they come. Dropping it before the end cancels the request.

    Attributes:
        request_id: for `Engine.feedback`.
    """

    def __init__(self, request_id: str, items: queue.SimpleQueue[Item], worker: Worker, engine: object) -> None:
        self.request_id = request_id
        self._engine = engine  # which would close if nobody held it
        self._items = items
        self._worker = worker
        self._end: Generation | Exception | None = None

    def __next__(self) -> StreamEvent:
        """The next piece. Raises what made the request fail, if anything did."""
        if self._end is not None:
            raise StopIteration
        item = self._items.get()
        if isinstance(item, StreamEvent):
            return item
        self._end = item
        raise item if isinstance(item, Exception) else StopIteration

    def result(self) -> Generation:
        """Wait for the end. Raises what made the request fail, if anything did."""
        for _ in self:
            pass
        if isinstance(self._end, Exception):
            raise self._end
        assert self._end is not None
        return self._end

    def cancel(self) -> None:
        """Stop generating; pieces on their way still come, and `result` holds what there is."""
        self._worker.cancel(self.request_id)

    def __del__(self) -> None:
        if self._end is None:
            self.cancel()
