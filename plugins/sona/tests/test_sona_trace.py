"""Eligibility traces against finite differences in float64, and on what a real sampler recorded."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from ruvllm_candle_like.backend import CandleBackend
from ruvllm_core import GenerateParams
from ruvllm_core.decode.contiguous import ContiguousCache
from ruvllm_core.errors import LearningError
from ruvllm_core.generate.sampler import Distribution, Sampler
from ruvllm_core.model.quant import QuantTensor
from ruvllm_core.protocols import Adapter, BackendContext, LowRank
from ruvllm_core.testing.tiny import cache_context, tiny_adapter, tiny_decoder, tiny_request, tiny_spec, tiny_weights
from ruvllm_sona import trace as module
from ruvllm_sona.trace import Head, Trace, eligibility, gradients, why_untraceable

VOCABULARY, WIDTH, TOKENS = 37, 12, 9
PROMPT = (3, 30, 8)


class Answer:
    """A random final site in float64, an answer drawn from it by the real sampler, and its log-probability."""

    def __init__(self, seed: int, rank: int = 2, softcap: float | None = None, **sampling: Any) -> None:
        random = np.random.default_rng(seed)
        self.params = GenerateParams(**{"temperature": 0.8, "top_p": 1.0, "seed": seed, **sampling})
        weights = random.normal(0.0, 0.7, (VOCABULARY, WIDTH)).astype(np.float32)
        self.head = Head(QuantTensor.from_float(weights), softcap)
        self.weights = weights.astype(np.float64)
        self.a, self.b = random.normal(size=(rank, WIDTH)), random.normal(0.0, 0.3, (WIDTH, rank))
        self.scale = 0.6
        self.hidden = random.normal(size=(TOKENS, WIDTH))
        sampler = Sampler(self.params, PROMPT, VOCABULARY)
        self.ids: list[int] = []
        self.drawn_from: list[Distribution] = []
        for logits in self.logits(self.a, self.b):
            drawn = sampler.sample(logits)
            assert drawn.drawn_from is not None
            self.ids.append(drawn.token)
            self.drawn_from.append(drawn.drawn_from)

    def logits(self, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        found = (self.hidden + self.scale * self.hidden @ a.T @ b.T) @ self.weights.T
        return found if self.head.softcap is None else self.head.softcap * np.tanh(found / self.head.softcap)

    def logprobs(self, a: np.ndarray, b: np.ndarray) -> list[np.ndarray]:
        """Of all that each token could be, with the support held fixed; penalties as the sampler applies them."""
        sampler = Sampler(self.params, PROMPT, VOCABULARY)
        found = []
        for logits, token, drawn in zip(self.logits(a, b), self.ids, self.drawn_from, strict=True):
            scores = sampler.adjust(logits)[drawn.ids] / self.params.temperature
            found.append(scores - np.log(np.exp(scores - scores.max()).sum()) - scores.max())
            sampler.count(token)
        return found

    def logprob(self, a: np.ndarray, b: np.ndarray) -> float:
        each = zip(self.logprobs(a, b), self.ids, self.drawn_from, strict=True)
        return float(sum(logs[list(drawn.ids).index(token)] for logs, token, drawn in each))

    def divergence(self, a: np.ndarray, b: np.ndarray) -> float:
        """KL, summed over tokens, from what was drawn from to what it would be with other factors."""
        each = zip(self.logprobs(a, b), self.drawn_from, strict=True)
        return float(sum(p.probabilities @ (np.log(p.probabilities) - logs) for logs, p in each))

    def trace(self, dtype: Any = np.float64, **changes: Any) -> Trace:
        found = eligibility(
            **{
                "hidden": self.hidden.astype(dtype),
                "output_ids": self.ids,
                "drawn_from": self.drawn_from,
                "temperature": self.params.temperature,
                "delta": LowRank(self.a, self.b, self.scale),
                "head": self.head,
                "repetition_penalty": self.params.repetition_penalty,
                "prompt_ids": PROMPT,
                **changes,
            }
        )
        assert found is not None
        return found


def finite_difference(function: Any, at: np.ndarray, step: float = 3e-4) -> np.ndarray:
    """The gradient by differences of sixth order; steps so short that no logit crosses the penalty's kink at 0."""
    found = np.empty_like(at)
    for place in np.ndindex(at.shape):
        total = 0.0
        for distance, weight in ((1, 45.0), (2, -9.0), (3, 1.0)):
            for sign in (1.0, -1.0):
                moved = at.copy()
                moved[place] += sign * distance * step
                total += sign * weight * function(moved)
        found[place] = total / (60.0 * step)
    return found


SETTINGS: list[dict[str, Any]] = [
    {},
    {"top_k": 6, "top_p": 0.9},
    {"temperature": 1.7, "min_p": 0.2, "rank": 1},
    {"softcap": 2.5, "top_p": 0.95},
    {"frequency_penalty": 0.7, "presence_penalty": 0.3, "logit_bias": {4: 2.0, 9: -1.0}},
    {"repetition_penalty": 1.5, "top_p": 0.97, "temperature": 1.5},
    {"repetition_penalty": 1.25, "softcap": 3.0},
]


@pytest.mark.parametrize("settings", SETTINGS)
def test_equals_finite_differences(settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    answer = Answer(5, **settings)
    expected_a = finite_difference(lambda a: answer.logprob(a, answer.b), answer.a)
    expected_b = finite_difference(lambda b: answer.logprob(answer.a, b), answer.b)
    for held, products in ((1 << 23, 1 << 18), (1 << 23, 1), (0, 1)):  # one block of W, many, many that are not kept
        monkeypatch.setattr(module, "_HELD_VALUES", held)
        monkeypatch.setattr(module, "_BLOCK_PRODUCTS", products)
        found = answer.trace()
        assert found.exact and found.tokens == TOKENS and found.a.dtype == np.float64
        assert np.linalg.norm(found.a - expected_a) <= 1e-8 * np.linalg.norm(expected_a)
        assert np.linalg.norm(found.b - expected_b) <= 1e-8 * np.linalg.norm(expected_b)


@pytest.mark.parametrize("settings", SETTINGS)
def test_curvature_is_that_of_the_divergence(settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    answer = Answer(4, **settings)
    for held, products in ((1 << 23, 1 << 18), (1 << 23, 1), (0, 1)):
        monkeypatch.setattr(module, "_HELD_VALUES", held)
        monkeypatch.setattr(module, "_BLOCK_PRODUCTS", products)
        found = answer.trace()
        step = 1e-3 / found.curvature**0.5
        there = answer.divergence(answer.a + step * found.a, answer.b + step * found.b)
        back = answer.divergence(answer.a - step * found.a, answer.b - step * found.b)
        assert (there + back) / step**2 == pytest.approx(found.curvature, rel=1e-3)


def test_gradients_of_tokens_add_up_to_the_trace() -> None:
    answer = Answer(5, softcap=4.0, repetition_penalty=1.2)
    delta = LowRank(answer.a, answer.b, answer.scale)
    each = gradients(
        answer.hidden, answer.ids, answer.drawn_from, 0.8, delta, answer.head, repetition_penalty=1.2, prompt_ids=PROMPT
    )
    found = answer.trace()
    np.testing.assert_allclose(answer.scale * each.T @ (answer.hidden @ answer.a.T), found.b, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(answer.scale * (each @ answer.b).T @ answer.hidden, found.a, rtol=1e-12, atol=1e-12)


def test_float32_is_close_and_stays_float32() -> None:
    answer = Answer(6)
    exact, found = answer.trace(), answer.trace(np.float32)
    assert found.a.dtype == found.b.dtype == np.float32
    assert np.linalg.norm(found.a - exact.a) <= 1e-5 * np.linalg.norm(exact.a)
    assert np.linalg.norm(found.b - exact.b) <= 1e-5 * np.linalg.norm(exact.b)


def test_quantized_head() -> None:
    """Rows picked out of a quantized matrix are the rows of the whole."""
    spec = tiny_spec(tied_embeddings=True, logit_softcap=3.0)
    weights = tiny_weights(spec, ["q4_1"])
    head = Head.of(spec, weights)
    assert head.weight is weights["embed"] and head.softcap == 3.0
    ids = np.array([3, 250, 3, 0])
    np.testing.assert_array_equal(head.rows(ids), weights["embed"].dequantize()[ids])
    untied = tiny_spec()
    assert Head.of(untied, found := tiny_weights(untied)).weight is found["lm_head"]
    with pytest.raises(LearningError, match="vocabulary of 264"):
        head.rows(np.array([264]))


def test_cut_support() -> None:
    """Of a head of what was recorded the rest counts as absent, and a drawn token beyond it as improbable."""
    answer = Answer(7, temperature=2.0)
    cut = [each.head(3) for each in answer.drawn_from]
    assert any(token not in each.ids for token, each in zip(answer.ids, cut, strict=True))
    found = answer.trace(drawn_from=cut)
    assert not found.exact
    whole = []
    for token, each in zip(answer.ids, cut, strict=True):
        ids, shares = each.ids, each.probabilities / each.probabilities.sum()
        if token not in ids:
            ids, shares = np.append(ids, token), np.append(shares, 0.0)
        whole.append(Distribution(ids, shares))
    expected = answer.trace(drawn_from=whole)
    np.testing.assert_allclose(found.b, expected.b, rtol=1e-12)
    # All but the tail recorded: nothing is lost.
    assert answer.trace(drawn_from=[each.head(VOCABULARY) for each in answer.drawn_from]).exact


def test_what_has_no_trace_says_why() -> None:
    answer = Answer(8)
    delta = LowRank(answer.a, answer.b)
    for changes, reason in (
        ({"temperature": 0.0, "drawn_from": ()}, "greedy"),
        ({"drawn_from": ()}, "not recorded"),
        ({"hidden": None}, "hidden states"),
        ({"output_ids": ()}, "empty"),
    ):
        case = {"hidden": answer.hidden, "output_ids": answer.ids, "drawn_from": answer.drawn_from, "temperature": 1.0}
        case |= changes
        assert reason in why_untraceable(**case)
        assert eligibility(**case, delta=delta, head=answer.head) is None
    assert why_untraceable(answer.hidden, answer.ids, answer.drawn_from, 1.0) == ""


def test_what_does_not_fit_is_named() -> None:
    answer = Answer(9)
    with pytest.raises(LearningError, match="9 tokens of a model 12 wide"):
        answer.trace(hidden=answer.hidden[1:])
    with pytest.raises(LearningError, match="8 distributions"):
        answer.trace(drawn_from=answer.drawn_from[1:])
    with pytest.raises(LearningError, match="do not fit a width of 12"):
        answer.trace(delta=LowRank(np.zeros((2, 11)), np.zeros((11, 2))))


@pytest.mark.parametrize("scheme", ["f32", "q8_0"])
def test_of_an_answer_that_a_backend_drew(scheme: str) -> None:
    """What the engine records is enough: the same gradient as autograd's, through all logits of the whole model."""
    spec = tiny_spec(logit_softcap=6.0)
    weights = tiny_weights(spec, [scheme])
    decoder = tiny_decoder(spec, weights)
    delta = tiny_adapter(spec).sites["final"]
    fields = {"temperature": 0.9, "top_k": 30, "top_p": 0.95, "seed": 1, "max_tokens": 20, "repetition_penalty": 1.2}
    request = tiny_request([5, 6, 7], adapter=Adapter("v1", {"final": delta}), keep_hidden=True, **fields)
    context = BackendContext(spec, decoder, lambda n: ContiguousCache(cache_context(decoder, n)), 8)
    backend = CandleBackend(context)
    backend.submit(request)
    events = []
    while backend.busy:
        events += backend.step()
    hidden = np.stack([event.hidden for event in events])
    ids = [event.token_id for event in events]
    drawn_from = [event.drawn_from for event in events]
    assert len(ids) == 20 and min(len(each.ids) for each in drawn_from) < 30
    penalty = {"repetition_penalty": 1.2, "prompt_ids": request.prompt_ids}
    found = eligibility(hidden, ids, drawn_from, 0.9, delta, Head.of(spec, weights), version="v1", **penalty)
    assert found is not None and found.exact and found.version == "v1"

    a, b = (torch.tensor(factor, dtype=torch.float64, requires_grad=True) for factor in (delta.a, delta.b))
    states = torch.tensor(hidden, dtype=torch.float64)
    logits = (states + delta.scale * states @ a.T @ b.T) @ torch.tensor(weights["lm_head"].dequantize()).double().T
    logits = 6.0 * torch.tanh(logits / 6.0)
    total = torch.zeros((), dtype=torch.float64)
    for t, (token, drawn) in enumerate(zip(ids, drawn_from, strict=True)):
        seen = torch.zeros(spec.vocab_size, dtype=torch.bool)
        seen[[*request.prompt_ids, *ids[:t]]] = True
        scores = torch.where(seen, torch.where(logits[t] > 0, logits[t] / 1.2, logits[t] * 1.2), logits[t])
        share = torch.log_softmax(scores[torch.tensor(drawn.ids)] / 0.9, 0)
        np.testing.assert_allclose(share.exp().detach().numpy(), drawn.probabilities, atol=1e-5)
        total = total + share[list(drawn.ids).index(token)]
    total.backward()
    assert np.linalg.norm(found.a - a.grad.numpy()) <= 1e-4 * np.linalg.norm(a.grad.numpy())
    assert np.linalg.norm(found.b - b.grad.numpy()) <= 1e-4 * np.linalg.norm(b.grad.numpy())
