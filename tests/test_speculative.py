"""Speculative decoding changes nothing: no token of greedy and seeded requests, and no distribution of others."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.stats import chisquare
from speculation import CountingCache, Knowing, TableDecoder, answer, eager

from ruvllm_core.errors import ConfigError
from ruvllm_core.generate import sequence as sequence_module
from ruvllm_core.generate.proposers import DraftModel, NGramProposer
from ruvllm_core.generate.request import GenerateParams, Request
from ruvllm_core.generate.sequence import Sequence as Running
from ruvllm_core.generate.sequence import run_batch
from ruvllm_core.model.loader import ModelFile
from ruvllm_core.protocols import Decoder, Draft, FloatArray, KVCachePolicy
from ruvllm_core.registry import Registry
from ruvllm_core.settings import Settings
from ruvllm_core.testing import tiny

POLICIES = [entry.name for entry in Registry.discover(Settings()).entries("cache_policies")]
TIERS = {"kv_cache": {"tail_length": 8, "migration_batch": 16}}  # so small that tokens of tiny models move, too
REGISTRY = Registry.discover(Settings(plugins=TIERS if "two_tier" in POLICIES else {}))
PROMPTS = [np.random.default_rng(n).integers(0, 256, 3 + n % 7).tolist() * 2 for n in range(52)]
SAMPLED = {
    "plain": {},
    "cold": {"temperature": 0.5},
    "top_k": {"top_k": 3},
    "top_p": {"top_p": 0.7},
    "min_p": {"min_p": 0.2},
    "penalties": {"repetition_penalty": 1.4, "presence_penalty": 0.5, "frequency_penalty": 0.3, "logit_bias": {2: 0.7}},
}


@pytest.fixture(scope="module")
def decoder() -> Decoder:
    return tiny.tiny_decoder(tiny.FLAVOURS["plain"])


def make_cache(policy: str, decoder: Decoder) -> KVCachePolicy:
    from dataclasses import replace

    options = REGISTRY.options(REGISTRY.entry("cache_policies", policy).plugin)
    cache: KVCachePolicy = REGISTRY.load("cache_policies", policy)(
        replace(tiny.cache_context(decoder), options=options)
    )
    return cache


def draft_model(decoder: Decoder, vocab_size: int = 264) -> DraftModel:
    return DraftModel(ModelFile(Path(), decoder.spec, {}, {}, 0), decoder, Settings(prefill_chunk=7), vocab_size)


@pytest.mark.parametrize("policy", POLICIES)
def test_greedy_tokens_are_those_without_drafts(decoder: Decoder, policy: str) -> None:
    cache, length = make_cache(policy, decoder), 12
    requests = [tiny.tiny_request(prompt, max_tokens=length, keep_hidden=True) for prompt in PROMPTS]
    plain = {request.id: answer(decoder, cache, request) for request in requests}
    tokens = {name: [event.token_id or 0 for event in events] for name, events in plain.items()}
    smaller = tiny.tiny_decoder(tiny.tiny_spec(num_layers=1))
    proposers = {
        "ngram": NGramProposer(),
        "right": Knowing(tokens),
        "wrong": Knowing(tokens, lambda position: 0.0),
        "half right": Knowing(tokens, lambda position: 0.5),
        "another model": draft_model(smaller),
        "the same model": draft_model(decoder),
    }
    for kind, proposer in proposers.items():
        speculator, proposed, accepted = eager(proposer, 4), 0, 0
        for request in requests[:8] if "model" in kind else requests:  # models take their time
            events = answer(decoder, cache, request, speculator)
            assert [event.token_id for event in events] == tokens[request.id], kind
            assert [event.finish_reason for event in events] == [event.finish_reason for event in plain[request.id]]
            for event, before in zip(events, plain[request.id], strict=True):  # also after drafts were thrown away
                np.testing.assert_allclose(event.hidden, before.hidden, rtol=1e-3, atol=1e-3)
            stats = events[-1].speculation
            assert stats is not None
            assert stats.tokens_per_step == pytest.approx((length - 1) / (length - 1 - stats.accepted))
            proposed, accepted = proposed + stats.proposed, accepted + stats.accepted
        low, high = {"wrong": (0, 0), "right": (1, 1), "half right": (0.15, 0.35), "the same model": (1, 1)}.get(
            kind, (0, 1)
        )
        assert proposed and low <= accepted / proposed <= high, kind
        assert cache.stats().sequences == 0


@pytest.mark.parametrize("right", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("settings", SAMPLED.values(), ids=SAMPLED)
def test_seeded_answers_are_those_without_drafts(settings: dict[str, Any], right: float) -> None:
    """Tokens, log-probabilities and states, whether the draft is certain or says what it was drawn from."""
    table, cache = random_table(12), CountingCache()
    decoder = TableDecoder(table)
    params = {"temperature": 1.1, "top_p": 1.0, "max_tokens": 60, "logprobs": 3, **settings}
    for seed in range(4):
        request = tiny.tiny_request([1, 2, 3], 100, seed=seed, keep_hidden=True, **params)
        plain = answer(decoder, cache, request)
        knowing = Knowing({request.id: [event.token_id or 0 for event in plain]}, lambda _: right, vocab_size=12)
        for proposer in (knowing, Uncertain(knowing)):
            events = answer(decoder, cache, request, eager(proposer, 5))
            for event, before in zip(events, plain, strict=True):
                assert event.token_id == before.token_id
                assert event.logprob == before.logprob
                assert event.top_logprobs == before.top_logprobs
                assert event.finish_reason == before.finish_reason
                np.testing.assert_array_equal(event.hidden, before.hidden)
            stats = events[-1].speculation
            assert stats is not None
            assert (stats.accepted > 0) == (right > 0)


class Uncertain:
    """The drafts of another proposer, which claims to have drawn them evenly."""

    def __init__(self, proposer: Knowing) -> None:
        self.proposer = proposer

    def propose(self, request: Request, token_ids: Sequence[int], k: int, hidden: FloatArray) -> Draft:
        tokens = self.proposer.propose(request, token_ids, k, hidden).tokens
        return Draft(tokens, np.full((len(tokens), 12), 1 / 12, dtype=np.float32))

    def forget(self, request_id: str) -> None:
        pass


def random_table(size: int) -> FloatArray:
    return (np.random.default_rng(size).standard_normal((size, size)) * 1.5).astype(np.float32)


VOCAB = 5


class Drawing:
    """Draws from a table of distributions ``[V, V]``, and says so."""

    def __init__(self, table: FloatArray) -> None:
        self.table, self.random = table, np.random.default_rng(1)

    def propose(self, request: Request, token_ids: Sequence[int], k: int, hidden: FloatArray) -> Draft:
        tokens, rows, last = [], [], token_ids[-1]
        for _ in range(k):
            rows.append(self.table[last])
            total = np.cumsum(self.table[last].astype(np.float64))
            last = int(np.searchsorted(total, self.random.random() * total[-1], side="right"))
            tokens.append(last)
        return Draft(tokens, np.stack(rows))

    def forget(self, request_id: str) -> None:
        pass


def softmax(logits: FloatArray, temperature: float = 1.0) -> FloatArray:
    weights = np.exp((logits - logits.max(-1, keepdims=True)) / temperature)
    return (weights / weights.sum(-1, keepdims=True)).astype(np.float32)


TABLE = random_table(VOCAB)
DRAFTS = {
    "right": softmax(TABLE),
    "too sharp": softmax(TABLE, 0.1),
    "too flat": softmax(TABLE, 10.0),
    "upside down": softmax(-TABLE),
    "a single token": np.eye(VOCAB, dtype=np.float32)[np.argmin(TABLE, axis=1)],
}


def exact(params: GenerateParams, prompt: list[int], generated: Sequence[int]) -> FloatArray:
    """The distribution of the next token ``[V]``, by the definitions of penalties and filters."""
    logits = TABLE[[*prompt, *generated][-1]].astype(np.float64)
    for token in range(VOCAB):
        if token in (*prompt, *generated):
            logits[token] *= params.repetition_penalty ** (-1 if logits[token] > 0 else 1)
        count = list(generated).count(token)
        logits[token] -= params.frequency_penalty * count + params.presence_penalty * (count > 0)
        logits[token] += params.logit_bias.get(token, 0.0)
    p = np.exp(logits / params.temperature)
    p /= p.sum()
    order = np.argsort(-p)
    keep = np.ones(VOCAB, dtype=bool)
    if params.top_k:
        keep[order[params.top_k :]] = False
        p = np.where(keep, p, 0.0) / p[keep].sum()
    if params.top_p < 1.0:
        before = np.cumsum(p[order]) - p[order]
        keep[order[before >= params.top_p]] = False
    keep &= p >= params.min_p * p.max()
    p = np.where(keep, p, 0.0)
    return p / p.sum()


def surprise(params: GenerateParams, drafts: FloatArray, seed: int, count: int = 3000) -> float:
    """The p-value of a chi-square test of the joint distribution of three tokens."""
    prompt, decoder, cache = [3, 0], TableDecoder(TABLE), CountingCache()
    speculator = eager(Drawing(drafts), 2)
    answer(decoder, cache, tiny.tiny_request([1], 100, max_tokens=12), speculator)  # the steps without drafts
    random = np.random.default_rng(seed)
    found: dict[tuple[int, ...], int] = dict.fromkeys(itertools.product(range(VOCAB), repeat=3), 0)
    for start in range(0, count, 50):
        running = []
        for n in range(start, start + 50):
            request = Request(f"r{n}", tuple(prompt), params, frozenset(), capacity=100)
            running.append(Running(request, cache, decoder.spec))
            running[-1].sampler._random = random
        run_batch(decoder, cache, [(sequence, 2) for sequence in running], speculator)
        while unfinished := [sequence for sequence in running if sequence.generated < 3]:
            run_batch(decoder, cache, [(sequence, 1) for sequence in unfinished], speculator)
        for sequence in running:
            found[tuple(sequence.token_ids[2:5])] += 1
            speculator.forget(sequence.request.id)
    expected = {
        (a, b, c): exact(params, prompt, [])[a]
        * exact(params, prompt, [a])[b]
        * exact(params, prompt, [a, b])[c]
        * count
        for a, b, c in found
    }
    assert all(expected[cell] or not times for cell, times in found.items()), "a token that cannot be"
    large = [cell for cell, times in expected.items() if times >= 5]
    rest = [sum(table.values()) - sum(table[cell] for cell in large) for table in (found, expected)]
    pairs = [(found[cell], expected[cell]) for cell in large] + ([(rest[0], rest[1])] if rest[1] > 1e-6 else [])
    return float(chisquare(*zip(*pairs, strict=True)).pvalue)


@pytest.mark.parametrize("drafts", DRAFTS.values(), ids=DRAFTS)
@pytest.mark.parametrize("settings", SAMPLED.values(), ids=SAMPLED)
def test_sampled_tokens_have_the_exact_distribution(settings: dict[str, Any], drafts: FloatArray) -> None:
    params = GenerateParams(**{"temperature": 1.0, "top_p": 1.0, "max_tokens": 50, **settings})
    assert surprise(params, drafts, seed=11) > 1e-3


@pytest.mark.parametrize("rule", ["accept all", "resample from p"])
def test_the_test_of_distributions_finds_wrong_rules(rule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(target: Any, uniform: Any, drafted: int, drawn_from: FloatArray) -> int:
        p = dict(zip(target.ids.tolist(), target.probabilities.tolist(), strict=True)).get(drafted, 0.0)
        if rule == "accept all" and p:
            return drafted
        return drafted if uniform() * drawn_from[drafted] < p else int(target.draw(uniform()))

    monkeypatch.setattr(sequence_module, "accept_or_resample", wrong)
    assert surprise(GenerateParams(temperature=1.0, top_p=1.0, max_tokens=50), DRAFTS["upside down"], seed=11) < 1e-9


def test_a_draft_model_draws_what_it_says(decoder: Decoder) -> None:
    """Its probabilities are those of the request's parameters, and its tokens follow them."""
    proposer = draft_model(tiny.tiny_decoder(tiny.tiny_spec(num_layers=1)))
    request = tiny.tiny_request(PROMPTS[0], temperature=8.0, top_p=0.6)
    logits = tiny.whole(tiny.tiny_decoder(tiny.tiny_spec(num_layers=1)), PROMPTS[0])[-1]
    p = softmax(logits.astype(np.float64), 8.0).astype(np.float64)
    order = np.argsort(-p)
    kept = order[np.cumsum(p[order]) - p[order] < 0.6]
    counts = np.zeros(264)
    for _ in range(400):
        draft = proposer.propose(request, PROMPTS[0], 1, np.empty(0))
        assert draft.probabilities is not None
        np.testing.assert_allclose(draft.probabilities[0][kept], p[kept] / p[kept].sum(), rtol=1e-3)
        counts[draft.tokens[0]] += 1
    assert counts[kept].sum() == 400
    assert chisquare(counts[kept], 400 * p[kept] / p[kept].sum()).pvalue > 1e-6


@pytest.mark.parametrize("padding", [-8, 8])
def test_a_draft_model_padded_otherwise(decoder: Decoder, padding: int) -> None:
    proposer = draft_model(decoder, 264 + padding)
    request = tiny.tiny_request(PROMPTS[0], temperature=1.0)
    draft = proposer.propose(request, PROMPTS[0], 3, np.empty(0))
    assert draft.probabilities is not None and draft.probabilities.shape == (3, 264 + padding)
    assert proposer.propose(request, [1] * 46, 3, np.empty(0)).tokens == ()  # beyond its context


def test_ngrams_continue_the_latest_match() -> None:
    proposer, request = NGramProposer(), tiny.tiny_request([0])
    text = [1, 2, 3, 4, 5, 6, 7, 8, 9, 1, 2, 3]
    assert list(proposer.propose(request, text, 9, np.empty(0)).tokens) == [4, 5, 6]  # as long as the match
    text += [4]
    assert list(proposer.propose(request, text, 9, np.empty(0)).tokens) == [5, 6, 7, 8]
    assert list(proposer.propose(request, text, 2, np.empty(0)).tokens) == [5, 6]
    text += [11, 2, 3, 4]
    assert list(proposer.propose(request, text, 9, np.empty(0)).tokens) == [11, 2, 3]  # the later one
    assert list(proposer.propose(request, [*text, 12], 9, np.empty(0)).tokens) == []
    other = tiny.tiny_request([0])
    assert list(proposer.propose(other, [7, 7, 7, 7], 9, np.empty(0)).tokens) == [7, 7, 7]  # beyond its own end
    assert list(proposer.propose(other, [7, 7, 7, 7, 7], 9, np.empty(0)).tokens) == [7, 7, 7, 7]
    assert list(proposer.propose(tiny.tiny_request([0]), [4, 4], 9, np.empty(0)).tokens) == []


def test_no_room_for_drafts() -> None:
    """A cache that has room for a token but not for a draft; and an answer that is as long as it may be."""
    decoder = TableDecoder(random_table(12))
    request = tiny.tiny_request([1, 2, 3], 40, max_tokens=30)
    plain = [event.token_id or 0 for event in answer(decoder, CountingCache(), request)]
    events = answer(decoder, CountingCache(most=3), request, eager(Knowing({request.id: plain}, vocab_size=12), 8))
    assert [event.token_id for event in events] == plain
    assert events[-1].speculation is not None and events[-1].speculation.accepted < 8
    for stop in range(6, 30):
        short = tiny.tiny_request([1, 2, 3], 40, max_tokens=stop, stop_ids=frozenset({plain[20]}))
        cache, expected = CountingCache(), answer(decoder, CountingCache(), short)
        events = answer(decoder, cache, short, eager(Knowing({short.id: plain}, vocab_size=12), 8))
        assert [(e.token_id, e.finish_reason) for e in events] == [(e.token_id, e.finish_reason) for e in expected]


@pytest.mark.parametrize("bad", ["raises", "too many", "no such token", "shape", "chances"])
def test_a_bad_proposer_is_left_alone(bad: str, capsys: pytest.CaptureFixture[str]) -> None:
    class Bad:
        asked = 0

        def propose(self, request: Request, token_ids: Sequence[int], k: int, hidden: FloatArray) -> Draft:
            self.asked += 1
            if bad == "raises":
                raise ZeroDivisionError("nobody is perfect")
            tokens = {"too many": [1] * (k + 1), "no such token": [12], "shape": [1], "chances": [1]}[bad]
            chances = [0.5, 0.5] if bad == "chances" else None
            return Draft(tokens, np.ones((1, 3), dtype=np.float32) if bad == "shape" else None, chances)

        def forget(self, request_id: str) -> None:
            pass

    decoder, proposer = TableDecoder(random_table(12)), Bad()
    request = tiny.tiny_request([1, 2, 3], 60, max_tokens=50)
    events = answer(decoder, CountingCache(), request, eager(proposer, 4))
    assert [event.token_id for event in events] == [e.token_id for e in answer(decoder, CountingCache(), request)]
    assert proposer.asked == 1
    assert events[-1].speculation is not None and events[-1].speculation.proposed == 0
    assert "drafting failed" in capsys.readouterr().err


@pytest.mark.parametrize(("value", "near"), [("ngrm", "ngram"), ("draft:", "draft:MODEL"), ("Learned", "learned")])
def test_misspelt_proposers(value: str, near: str) -> None:
    from ruvllm_core import ModelConfig

    with pytest.raises(ConfigError, match=f"did you mean.*{near}"):
        ModelConfig(speculative=value)
    for most in (0, 65):
        with pytest.raises(ConfigError, match="draft_tokens"):
            ModelConfig(draft_tokens=most)


def test_salt_and_adapter_keep_prefixes_apart() -> None:
    from ruvllm_candle_like.backend import CandleBackend

    keys: list[str] = []

    class Backend(CandleBackend):
        def submit(self, request: Request) -> None:
            keys.append(request.cache_key)
            super().submit(request)

    with tiny.tiny_engine(Backend, tiny.tiny_decoder(tiny.tiny_spec())) as engine:
        for salt in ("", "mine", "theirs"):
            engine.generate("a", GenerateParams(max_tokens=1, cache_salt=salt))
        adapter = tiny.tiny_adapter(engine.spec)
        engine._worker._loops = (type("Loop", (), {"adapter": lambda s, r: adapter, "observe": lambda s, t: None})(),)
        for salt in ("", "mine"):
            engine.generate("a", GenerateParams(max_tokens=1, cache_salt=salt))
        engine._worker._loops = ()
        engine.generate("a", GenerateParams(max_tokens=1, cache_salt=f"{adapter.version}mine"))
    assert keys[0] == ""
    assert len(set(keys)) == len(keys) == 6
