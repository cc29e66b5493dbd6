"""`BackendSuite`: how a backend executes requests."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest

from ruvllm_core.decode.contiguous import ContiguousCache
from ruvllm_core.errors import CacheFull, PromptTooLong
from ruvllm_core.generate.request import GenerateParams, Request, TokenEvent
from ruvllm_core.generate.sampler import Sampler
from ruvllm_core.generate.speculative import Speculator
from ruvllm_core.protocols import Backend, BackendContext, Decoder, Draft, FloatArray
from ruvllm_core.testing import tiny


class SmallCache(ContiguousCache):
    """Has room for 24 tokens of whoever is called poor."""

    def extend(self, sequence: str, count: int) -> None:
        if sequence == "poor" and self._held[sequence].length > 24:
            raise CacheFull("no more for the poor")
        super().extend(sequence, count)


class Knowing:
    """Drafts what is to come; with probability ``1 - right``, something else."""

    def __init__(self, answers: dict[str, list[int]], right: float) -> None:
        self.answers, self.right, self.random = answers, right, np.random.default_rng(0)

    def propose(self, request: Request, token_ids: Sequence[int], k: int, hidden: FloatArray) -> Draft:
        done = len(token_ids) - len(request.prompt_ids)
        wrong = self.random.random(k) >= self.right
        coming = self.answers[request.id][done : done + k]
        return Draft([token ^ int(off) for token, off in zip(coming, wrong, strict=False)])

    def forget(self, request_id: str) -> None:
        pass

    def close(self) -> None:
        pass


class BackendSuite:
    """Define `make_backend`. Each answer has to be the one computed from scratch for each of its tokens."""

    decoder: Decoder
    context: BackendContext

    def make_backend(self, context: BackendContext) -> Backend:
        raise NotImplementedError

    @pytest.fixture(params=[1, 5, 512], autouse=True)
    def backend(self, request: pytest.FixtureRequest) -> Backend:
        """A backend that computes at most so many prompt tokens at once."""
        self.decoder = decoder = tiny.tiny_decoder(tiny.FLAVOURS["longrope"])
        context = tiny.cache_context
        self.context = BackendContext(decoder.spec, decoder, lambda n: SmallCache(context(decoder, n)), request.param)
        return self.make_backend(self.context)

    def test_answers(self, backend: Backend) -> None:
        mix = self.requests()
        events = self.serve(backend, mix)
        said = {request.id: [event.token_id for event in events[request.id]] for request in mix}
        assert said["drawn"] == said["drawn again"] != said["drawn elsewise"]
        assert all(event.hidden is not None for event in events["greedy"])

    def test_cancel(self, backend: Backend) -> None:
        first, second, *others, last = self.requests()
        for request in (first, second, last):
            backend.submit(request)
        backend.step()
        for request in (first, second, last, first):
            backend.cancel(request.id)
        events = self.serve(backend, others)
        assert not {first.id, second.id, last.id} & events.keys(), "cancelled, but going on"

    def test_a_full_cache_hits_nobody_else(self, backend: Backend) -> None:
        a, b, c = map(tiny.tiny_request, tiny.TEXTS.values())
        poor, long = (tiny.tiny_request(b.prompt_ids, n, id=name) for name, n in (("poor", 48), ("long", 49)))
        events = self.serve(backend, [a, poor, b, long, c])
        for name in ("poor", "long"):
            assert isinstance(events[name][-1].error, (CacheFull, PromptTooLong))
            assert events[name][-1].finish_reason == "error"

    @pytest.mark.parametrize("right", [0.0, 0.5, 1.0])
    def test_drafts_change_no_answer(self, right: float) -> None:
        mix = self.requests()
        speculator = Speculator(Knowing({request.id: self.expected(request) for request in mix}, right), 3, lambda: 0.0)
        events = self.serve(self.make_backend(replace(self.context, speculator=speculator)), mix)
        found = [said[-1].speculation for said in events.values()]
        assert any(stats is not None and stats.proposed for stats in found), "`run_batch` was given no speculator"
        assert (right > 0) == any(stats is not None and stats.accepted > 0 for stats in found)

    def test_close(self, backend: Backend) -> None:
        assert backend.step() == []
        for request in self.requests():
            backend.submit(request)
        backend.step()
        assert backend.busy
        backend.close()
        assert (backend.busy, backend.cache_stats().sequences, backend.cache_stats().tokens) == (False, 0, 0)

    def test_streaming_equals_not_streaming(self) -> None:
        params = GenerateParams(temperature=1.0, seed=3, max_tokens=20, ignore_eos=True)
        with tiny.tiny_engine(self.make_backend, self.decoder) as engine:
            for prompt, answer in zip(prompts := ["a", "Zwölf"], engine.generate_batch(prompts, params), strict=True):
                events = list(engine.stream(prompt, params))
                assert "".join(event.text for event in events) == answer.text
                assert tuple(event.token_id for event in events) == answer.token_ids
                short = params.model_copy(update={"stop": (answer.text[4:6],)})
                assert engine.generate(prompt, short).text == answer.text[: answer.text.index(answer.text[4:6])]
            assert engine.cache_stats().sequences == 0

    def requests(self) -> list[Request]:
        """One of every kind: greedy, drawn, penalized, limited, stopped, with an adapter."""
        (a, b, c), make = tiny.TEXTS.values(), tiny.tiny_request
        stop = frozenset(self.expected(make(a))[2:3])
        names = ("drawn", "drawn again", "drawn elsewise")
        return [
            make(a, id="greedy", keep_hidden=True),
            *(make(b, id=name, temperature=1.0, seed=len(name) % 2) for name in names),
            make(c, repetition_penalty=1.5, presence_penalty=1.0),
            make(a, adapter=tiny.tiny_adapter(self.decoder.spec), cache_key="tiny"),
            make(c[:1], max_tokens=1),
            make(a, capacity=21),
            make(a, stop_ids=stop),
            make(a, stop_ids=stop, ignore_eos=True),
        ]

    def expected(self, request: Request) -> list[int]:
        """What has to come out: every token drawn from a computation of the whole text so far."""
        tokens, start = list(request.prompt_ids), len(request.prompt_ids)
        sampler = Sampler(request.params, tokens, self.decoder.spec.vocab_size)
        while len(tokens) < min(request.capacity, start + request.params.max_tokens):
            logits = tiny.whole(self.decoder, tokens, request.capacity, request.adapter)
            tokens.append(sampler.sample(logits[-1]).token)
            if tokens[-1] in request.stop_ids and not request.params.ignore_eos:
                break
        return tokens[start:]

    def serve(self, backend: Backend, requests: list[Request]) -> dict[str, list[TokenEvent]]:
        """All events by request. Whoever ends without an error must have given the right answer."""
        events: dict[str, list[TokenEvent]] = defaultdict(list)
        for request in requests:
            try:
                backend.submit(request)
            except (CacheFull, PromptTooLong) as error:
                events[request.id].append(TokenEvent(request.id, None, "error", error=error))
        for _ in range(5000):
            for event in backend.step() if backend.busy else []:
                events[event.request_id].append(event)
        assert (backend.busy, backend.cache_stats().sequences) == (False, 0), "not done, or not tidied up"
        for request in requests:
            if request.id not in ("poor", "long"):
                tokens = self.expected(request)
                assert [event.token_id for event in events[request.id]] == tokens, request
                stopped = tokens[-1] in request.stop_ids and not request.params.ignore_eos
                reasons = [None] * (len(tokens) - 1) + ["stop" if stopped else "length"]
                assert [event.finish_reason for event in events[request.id]] == reasons, request
        return events
