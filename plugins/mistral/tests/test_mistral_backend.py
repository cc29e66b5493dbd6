"""The backend ``mistral``: core's suite, batching, and what it does when the cache is full."""

from __future__ import annotations

from dataclasses import replace

import pytest

from ruvllm_core.decode.contiguous import ContiguousCache
from ruvllm_core.errors import CacheFull
from ruvllm_core.generate.request import Request, TokenEvent
from ruvllm_core.protocols import Backend, BackendContext, CacheContext
from ruvllm_core.testing import BackendSuite, tiny
from ruvllm_mistral.backend import MistralBackend
from ruvllm_mistral.settings import MistralSettings


class TestMistralBackend(BackendSuite):
    def make_backend(self, context: BackendContext) -> Backend:
        return MistralBackend(context)


class TestMistralBackendWithTwoSequences(BackendSuite):
    def make_backend(self, context: BackendContext) -> Backend:
        return MistralBackend(replace(context, options=MistralSettings(max_sequences=2)))


class Pool(ContiguousCache):
    """Has room for so many tokens, all sequences together, and remembers what was computed."""

    def __init__(self, context: CacheContext, tokens: int) -> None:
        super().__init__(context)
        self.tokens, self.steps = tokens, list[list[int]]()

    def extend(self, sequence: str, count: int) -> None:
        if sum(held.length + held.reserved for held in self._held.values()) + count > self.tokens:
            raise CacheFull("the pool is empty")
        super().extend(sequence, count)

    def view(self, sequences: object) -> object:  # type: ignore[override]
        self.steps.append([self._held[name].reserved for name in sequences])  # type: ignore[attr-defined]
        return super().view(sequences)  # type: ignore[arg-type]


def serve(pool_tokens: int, requests: list[Request], chunk: int = 16) -> tuple[dict[str, list[TokenEvent]], Pool]:
    decoder = tiny.tiny_decoder(tiny.tiny_spec())
    pools: list[Pool] = []

    def cache(sequences: int) -> Pool:
        pools.append(Pool(tiny.cache_context(decoder, sequences), pool_tokens))
        return pools[0]

    backend = MistralBackend(BackendContext(decoder.spec, decoder, cache, chunk, MistralSettings(max_sequences=3)))
    events: dict[str, list[TokenEvent]] = {request.id: [] for request in requests}
    for request in requests:
        backend.submit(request)
    for _ in range(500):
        for event in backend.step() if backend.busy else []:
            events[event.request_id].append(event)
    assert not backend.busy
    return events, pools[0]


def wanted() -> list[Request]:
    texts = tiny.TEXTS.values()
    return [
        tiny.tiny_request(text[:12], max_tokens=20, id=f"r{n}", temperature=1.0, seed=n) for n, text in enumerate(texts)
    ]


def test_prompts_ride_along_with_answers() -> None:
    _, pool = serve(1000, wanted())
    assert pool.steps[0] == [12, 4], "a step takes as much of the prompts as it has room for"
    assert pool.steps[1] == [1, 8, 7], "answers first, then what is left of the prompts"
    assert max(map(sum, pool.steps)) == 16
    assert pool.steps.count([1, 1, 1]) > 10


@pytest.mark.parametrize("tokens", [32, 40, 60, 80])
def test_a_full_cache_changes_no_answer(tokens: int) -> None:
    """The newest is put back and computed anew: tokens and random draws are those of an endless cache."""
    expected, _ = serve(1000, wanted())
    found, pool = serve(tokens, wanted())
    for name, events in expected.items():
        assert [e.token_id for e in found[name]] == [e.token_id for e in events]
        assert found[name][-1].finish_reason == "length"
    assert pool.stats().sequences == 0


def test_who_fits_nowhere_fails_alone() -> None:
    long = tiny.tiny_request(tiny.TEXTS["c"], max_tokens=10, id="long")
    found, _ = serve(31, [*wanted()[:1], long, *wanted()[1:2]])
    assert isinstance(found["long"][-1].error, CacheFull)
    alone, _ = serve(1000, wanted())
    for name in ("r0", "r1"):
        assert [e.token_id for e in found[name]] == [e.token_id for e in alone[name]]
