"""The one thread that owns a backend. Everybody else talks to it through a queue."""

from __future__ import annotations

import atexit
import queue
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import replace
from typing import TypeVar

from ruvllm_core.decode.lora import combine
from ruvllm_core.errors import GenerationError
from ruvllm_core.generate.answer import Answer
from ruvllm_core.generate.request import Request
from ruvllm_core.generate.speculative import Speculator
from ruvllm_core.log import get_logger
from ruvllm_core.protocols import Backend, LearningLoop

T = TypeVar("T")
_IDLE_BUDGET_S = 0.05
_BUSY_BUDGET_S, _BUSY_SHARE = 0.02, 1 / 48  # so that whoever asks without a pause is learned from, too
_log = get_logger("worker")


class Worker:
    """Steps a backend while there is work, learns while there is none.

    Args:
        backend: called from this thread only, and so are the loops.
        loops: observe every finished request.
        speculator: forgets every request that has ended.
    """

    def __init__(self, backend: Backend, loops: Sequence[LearningLoop], speculator: Speculator | None = None) -> None:
        self._backend = backend
        self._loops = loops
        self._speculator = speculator
        self._answers: dict[str, Answer] = {}
        self._commands: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._closed = False
        self._broken: Exception | None = None
        self._lock = threading.RLock()  # a `Stream` collected while its thread is in here cancels itself
        self._thread = threading.Thread(target=self._run, name="ruvllm-worker", daemon=True)
        self._thread.start()
        # A thread still inside native code when the interpreter ends would take the process down with it.
        atexit.register(self.close)

    def post(self, command: Callable[[], None]) -> None:
        """Run `command` on the worker's thread, some time soon. Raises `GenerationError` once closed."""
        with self._lock:
            if self._closed:
                raise GenerationError("the engine is closed", hint="load it again")
            self._commands.put(command)

    def call(self, function: Callable[[], T]) -> T:
        """Run `function` on the worker's thread and return, or raise, what it does."""
        future: Future[T] = Future()

        def command() -> None:
            try:
                future.set_result(function())
            except BaseException as error:
                future.set_exception(error)

        self.post(command)
        return future.result()

    def submit(self, answer: Answer) -> None:
        """Start a request; its sink hears of everything else, errors included."""
        self.post(lambda: self._submit(answer))

    def cancel(self, request_id: str) -> None:
        """End a request early; one that is finished already is ignored, and so is a closed worker."""
        with self._lock:
            if not self._closed:
                self._commands.put(lambda: self._cancel(request_id))

    def close(self) -> bool:
        """Cancel everything and end the thread; False if that has been done before."""
        with self._lock:
            if self._closed:
                return False
            self._closed = True
            self._commands.put(None)
        atexit.unregister(self.close)
        if threading.current_thread() is not self._thread:  # the garbage collector may run anywhere
            self._thread.join()
        return True

    def _run(self) -> None:
        try:
            self._serve()
        except Exception as error:  # a backend that broke its promises must leave nobody waiting
            _failed("the backend", error)
            with self._lock:
                self._closed, self._broken = True, error
                self._commands.put(None)
            for answer in self._answers.values():
                answer.fail(error)
            for command in iter(self._commands.get, None):
                command()

    def _serve(self) -> None:
        saved = 0.0
        while True:
            for command in self._waiting():
                if command is None:
                    for request_id in list(self._answers):
                        self._cancel(request_id)
                    return
                command()
            if self._backend.busy:
                began = time.perf_counter()
                self._step()
                saved = min(saved + (time.perf_counter() - began) * _BUSY_SHARE, _BUSY_BUDGET_S)
                if saved == _BUSY_BUDGET_S:
                    began = time.perf_counter()
                    more = self._learn(_BUSY_BUDGET_S)
                    saved = saved - (time.perf_counter() - began) if more else 0.0

    def _waiting(self) -> list[Callable[[], None] | None]:
        """Commands that have come in; with nothing else to do, waits for one."""
        commands: list[Callable[[], None] | None] = []
        while True:
            try:
                commands.append(self._commands.get_nowait())
            except queue.Empty:
                if commands or self._backend.busy or self._learn(_IDLE_BUDGET_S):
                    return commands
                return [self._commands.get()]

    def _step(self) -> None:
        try:
            events = self._backend.step()
        except Exception as error:  # whatever a backend raises must reach those who wait for it
            _failed("a step", error, requests=len(self._answers))
            for request_id, waiting in list(self._answers.items()):
                self._backend.cancel(request_id)
                waiting.fail(error)
                self._finish(waiting)
            return
        for event in events:
            if (answer := self._answers.get(event.request_id)) is None:
                continue
            self._guard(answer, answer.push, event)
            if answer.finish_reason is not None:
                # The backend goes on unless the reason was its own: a stop string is found here.
                if event.finish_reason is None:
                    self._backend.cancel(event.request_id)
                self._finish(answer)

    def _submit(self, answer: Answer) -> None:
        if self._broken is not None:
            return answer.fail(self._broken)
        self._answers[answer.request.id] = answer
        try:
            answer.request = self._adapted(answer.request)
            self._backend.submit(answer.request)
        except Exception as error:
            del self._answers[answer.request.id]
            answer.fail(error)

    def _adapted(self, request: Request) -> Request:
        """The request with the adapters that the loops have for it, and what its cached prefixes depend on."""
        found = [adapter for loop in self._loops if (adapter := loop.adapter(request)) is not None]
        adapter, salt = combine(found) if found else None, request.params.cache_salt
        version = adapter.version if adapter is not None and adapter.changes_cache else ""
        # With the length, so that no salt can make one version look like another.
        return replace(request, adapter=adapter, cache_key=f"{len(version)}:{version}{salt}" if version or salt else "")

    def _cancel(self, request_id: str) -> None:
        if (answer := self._answers.get(request_id)) is not None:
            self._backend.cancel(request_id)
            self._guard(answer, answer.cancel)
            self._finish(answer)

    def _guard(self, answer: Answer, action: Callable[..., None], *arguments: object) -> None:
        try:
            action(*arguments)
        except Exception as error:
            _failed("an answer", error, request=answer.request.id)
            answer.fail(error)

    def _finish(self, answer: Answer) -> None:
        del self._answers[answer.request.id]
        if self._speculator is not None:
            self._speculator.forget(answer.request.id)
        if answer.finish_reason == "error":
            return
        for loop in self._loops:
            try:
                loop.observe(answer.trajectory())
            except Exception as error:  # the answer is out already; learning must not take the engine down
                _failed("a learning loop's observe", error, loop=type(loop).__name__)

    def _learn(self, budget_s: float) -> bool:
        """Give time to the loops; True if one has more to do."""
        more = False
        for loop in self._loops:
            try:
                more = loop.tick(budget_s) or more
            except Exception as error:
                _failed("a learning loop's tick", error, loop=type(loop).__name__)
        return more


def _failed(what: str, error: Exception, **context: object) -> None:
    """Log a failure in one line; its traceback is for those who debug."""
    _log.error(f"{what} failed", error=f"{type(error).__name__}: {error}", **context)
    _log.debug("traceback", exc_info=error)
