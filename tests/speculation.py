"""Decoders, caches and proposers of a few lines, for the tests of speculative decoding."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from ruvllm_core.decode.batch import Batch
from ruvllm_core.decode.kv import KVView
from ruvllm_core.generate.request import Request, TokenEvent
from ruvllm_core.generate.sequence import Sequence as Running
from ruvllm_core.generate.sequence import run_batch
from ruvllm_core.generate.speculative import Speculator
from ruvllm_core.protocols import Draft, FloatArray
from ruvllm_core.testing import tiny


class Clock:
    """Stands still unless somebody lets time pass."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class TableDecoder:
    """The logits after a token are its row in a table ``[V, V]``; a step of n tokens takes ``cost(n)``."""

    kv_schemes = ("f32",)

    def __init__(self, table: FloatArray, clock: Clock | None = None, cost: Callable[[int], float] = float) -> None:
        self.table, self.clock, self.cost = table, clock or Clock(), cost
        self.spec = tiny.tiny_spec(vocab_size=len(table), hidden_size=len(table))
        self.steps: list[int] = []

    def forward(self, batch: Batch) -> FloatArray:
        self.steps.append(len(batch.tokens))
        self.clock.now += self.cost(len(batch.tokens))
        return np.eye(len(self.table), dtype=np.float32)[batch.tokens[batch.rows]]

    def logits(self, hidden: FloatArray, batch: Batch | None = None) -> FloatArray:
        return hidden @ self.table


class CountingCache:
    """Knows how many tokens each sequence has, and holds none of them; refuses more than `most` at a time."""

    def __init__(self, most: int = 10**9) -> None:
        self.lengths: dict[str, int] = {}
        self.reserved: dict[str, int] = {}
        self.most = most

    def open(self, sequence: str, token_ids: Sequence[int], capacity: int, key: str = "") -> int:
        self.lengths[sequence] = 0
        return 0

    def extend(self, sequence: str, count: int) -> None:
        from ruvllm_core.errors import CacheFull

        if count > self.most:
            raise CacheFull("that many are too many")
        self.reserved[sequence] = count

    def view(self, sequences: Sequence[str]) -> KVView:
        return KVView([], np.empty(0, np.int64))

    def commit(self, sequence: str, token_ids: Sequence[int] = ()) -> None:
        self.lengths[sequence] += self.reserved.pop(sequence)

    def truncate(self, sequence: str, length: int) -> None:
        assert 0 <= length <= self.lengths[sequence]
        self.lengths[sequence] = length

    def close(self, sequence: str) -> None:
        del self.lengths[sequence]


class Knowing:
    """Drafts what is to come, each token with probability `right`, else the one after it.

    Args:
        answers: what comes out, by request id.
        seconds: what a drafted token takes.
    """

    def __init__(
        self,
        answers: dict[str, list[int]],
        right: Callable[[int], float] = lambda position: 1.0,
        clock: Clock | None = None,
        seconds: float = 0.0,
        vocab_size: int = 264,
    ) -> None:
        self.answers, self.right, self.clock, self.seconds = answers, right, clock or Clock(), seconds
        self.random, self.vocab_size = np.random.default_rng(0), vocab_size
        self.forgotten: list[str] = []

    def propose(self, request: Request, token_ids: Sequence[int], k: int, hidden: FloatArray) -> Draft:
        done = len(token_ids) - len(request.prompt_ids)
        coming = self.answers[request.id][done : done + k]
        self.clock.now += self.seconds * k
        return Draft(
            [
                token if self.random.random() < self.right(done + n) else (token + 1) % self.vocab_size
                for n, token in enumerate(coming)
            ]
        )

    def forget(self, request_id: str) -> None:
        self.forgotten.append(request_id)

    def close(self) -> None:
        pass


def eager(proposer: Any, most: int) -> Speculator:
    """Drafts as much as it may, since no time passes."""
    return Speculator(proposer, most, clock=Clock())


def answer(decoder: Any, cache: Any, request: Request, speculator: Speculator | None = None) -> list[TokenEvent]:
    """All events of a request that runs alone."""
    sequence = Running(request, cache, decoder.spec)
    events: list[TokenEvent] = []
    while not events or events[-1].finish_reason is None:
        events += run_batch(decoder, cache, [(sequence, min(5, sequence.pending))], speculator)
    cache.close(request.id)
    if speculator is not None:
        speculator.forget(request.id)
    return events
