"""An answer in the making: what the worker keeps of a request until it is finished."""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np

from ruvllm_core.errors import GenerationError, RuvLLMError
from ruvllm_core.generate.request import (
    FinishReason,
    Generation,
    Request,
    StreamEvent,
    Timings,
    TokenEvent,
    Trajectory,
    Usage,
)
from ruvllm_core.generate.stopping import StopStrings
from ruvllm_core.model.tokenizer import Tokenizer

#: What a consumer's queue gets: pieces, then the finished answer or what went wrong.
Item = StreamEvent | Generation | Exception
Sink = Callable[[Item], None]


class Answer:
    """Turns a request's token events into text, and hands each piece to its consumer.

    Attributes:
        request: what was asked.
        sink: takes every item, the last one a `Generation` or an exception; called on the worker's thread.
    """

    def __init__(self, request: Request, tokenizer: Tokenizer, sink: Sink) -> None:
        self.request = request
        self.sink = sink
        self._detokenizer = tokenizer.detokenizer(request.prompt_ids)
        self._stops = StopStrings(request.params.stop)
        self._text: list[str] = []
        self._events: list[TokenEvent] = []
        self._submitted = self._first = self._last = time.perf_counter()
        self.finish_reason: FinishReason | None = None
        self._done: Generation | None = None

    def push(self, event: TokenEvent) -> None:
        """Take a token; afterwards `finish_reason` is set if it was the last one."""
        if event.error is not None:
            return self.fail(event.error)
        self._last = time.perf_counter()
        if not self._events:
            self._first = self._last
        self._events.append(event)
        assert event.token_id is not None
        text = self._stops.push(self._detokenizer.push(event.token_id))
        reason = event.finish_reason
        if reason is not None:
            text += self._end()
        if self._stops.found:
            reason = "stop"
        self._emit(StreamEvent(self.request.id, text, event.token_id, reason, event.logprob, event.top_logprobs))
        if reason is not None:
            self._finish(reason)
        return None

    def cancel(self) -> None:
        """End here, with what there is."""
        self._emit(StreamEvent(self.request.id, self._end(), None, "cancelled"))
        self._finish("cancelled")

    def fail(self, error: Exception) -> None:
        """End with an error, which the consumer will see raised."""
        self.finish_reason = "error"
        if not isinstance(error, RuvLLMError):
            cause, what = error, f"{type(error).__name__}: {error}"
            error = GenerationError(f"request {self.request.id} failed: {what}")
            error.__cause__ = cause
        self.sink(error)

    def trajectory(self) -> Trajectory:
        """What learning gets to see. Call it when finished."""
        done, adapter = self._done, self.request.adapter
        assert done is not None
        hidden = [event.hidden for event in self._events if event.hidden is not None]
        return Trajectory(
            request_id=self.request.id,
            prompt_ids=self.request.prompt_ids,
            output_ids=done.token_ids,
            text=done.text,
            finish_reason=done.finish_reason,
            params=self.request.params,
            adapter_version=adapter.version if adapter is not None else None,
            logprobs=None if done.logprobs is None else np.array(done.logprobs, dtype=np.float32),
            hidden=np.stack(hidden) if hidden else None,
            drawn_from=tuple(event.drawn_from for event in self._events if event.drawn_from is not None),
            speculation=done.speculation,
        )

    def _end(self) -> str:
        text = self._stops.push(self._detokenizer.flush())
        return text + self._stops.flush()

    def _emit(self, piece: StreamEvent) -> None:
        self._text.append(piece.text)
        self.sink(piece)

    def _finish(self, reason: FinishReason) -> None:
        self.finish_reason = reason
        tops = tuple(event.top_logprobs for event in self._events if event.top_logprobs is not None)
        logprobs = tuple(event.logprob for event in self._events if event.logprob is not None)
        wanted = self.request.params.logprobs
        cached = self._events[0].cached_tokens if self._events else 0
        self._done = Generation(
            request_id=self.request.id,
            text="".join(self._text),
            token_ids=tuple(event.token_id for event in self._events if event.token_id is not None),
            finish_reason=reason,
            usage=Usage(len(self.request.prompt_ids), len(self._events), cached),
            timings=self._timings(),
            logprobs=logprobs if wanted is not None else None,
            top_logprobs=tops if wanted else None,
            speculation=self._events[-1].speculation if self._events else None,
        )
        self.sink(self._done)

    def _timings(self) -> Timings:
        if not self._events:
            waited = time.perf_counter() - self._submitted
            return Timings(queue_s=waited, ttft_s=0.0, prefill_tok_s=0.0, decode_tok_s=0.0, total_s=waited)
        ttft, decode = self._first - self._submitted, self._last - self._first
        prefill, computed = self._events[0].prefill_s, len(self.request.prompt_ids) - self._events[0].cached_tokens
        return Timings(
            queue_s=max(0.0, ttft - prefill),
            ttft_s=ttft,
            prefill_tok_s=computed / prefill if prefill > 0 else 0.0,
            decode_tok_s=(len(self._events) - 1) / decode if decode > 0 else 0.0,
            total_s=self._last - self._submitted,
        )
