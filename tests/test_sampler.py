"""The sampler against the logits processors of transformers, and its distribution against its draws."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from ruvllm_core.errors import GenerationError, RequestError
from ruvllm_core.generate.request import GenerateParams
from ruvllm_core.generate.sampler import Sampler

PROMPT = (3, 3, 7, 11)


def logits_of(size: int, seed: int) -> np.ndarray:
    return (np.random.default_rng(seed).standard_normal(size) * 3).astype(np.float32)


@pytest.mark.parametrize("size", [50, 5000])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"top_k": 5},
        {"top_p": 0.5},
        {"min_p": 0.1},
        {"top_k": 40, "top_p": 0.8},
        {"top_k": 17, "top_p": 0.95, "min_p": 0.02, "repetition_penalty": 1.3},
        {"top_p": 0.999},
        {"temperature": 3.0, "min_p": 0.3, "top_p": 0.9},
        {"temperature": 50.0, "top_p": 0.99},
    ],
)
def test_distribution_equals_transformers(settings: dict[str, float], size: int) -> None:
    params = GenerateParams(**{"temperature": 0.8, "top_p": 1.0, **settings})
    processors = LogitsProcessorList()
    if params.repetition_penalty != 1.0:
        processors.append(RepetitionPenaltyLogitsProcessor(params.repetition_penalty))
    processors.append(TemperatureLogitsWarper(params.temperature))
    if params.top_k:
        processors.append(TopKLogitsWarper(params.top_k))
    if params.top_p < 1.0:
        processors.append(TopPLogitsWarper(params.top_p))
    if params.min_p:
        processors.append(MinPLogitsWarper(params.min_p))
    for seed in range(5):
        logits = logits_of(size, seed)
        expected = processors(torch.tensor([PROMPT]), torch.from_numpy(logits.copy())[None].double()).softmax(-1)[0]
        sampler = Sampler(params, PROMPT, size)
        found = sampler.distribution(sampler.adjust(logits))
        dense = np.zeros(size)
        dense[found.ids] = found.probabilities
        np.testing.assert_allclose(dense, expected.numpy(), atol=1e-7)
        assert np.all(np.diff(found.probabilities) <= 0)


@pytest.mark.parametrize("spread", [0.0, 0.1, 1.0, 4.0, 12.0])
@pytest.mark.parametrize("size", [7, 1500, 49152])
def test_a_nucleus_is_to_the_last_bit_that_of_everything_sorted(spread: float, size: int) -> None:
    """Equal logits stand by id, wherever the nucleus ends; the shortcuts through a vocabulary must not show."""
    random = np.random.default_rng(size)
    for settings in ({"top_p": 0.9}, {"top_p": 0.999}, {"top_p": 0.02}, {"top_p": 0.8, "min_p": 1e-3}, {"min_p": 0.2}):
        params = GenerateParams(**{"temperature": 0.7, "top_p": 1.0, **settings})
        logits = (random.standard_normal(size) * spread).astype(np.float32)
        logits[::3] = np.round(logits[::3])
        logits[random.integers(1, size)] = -np.inf
        weights = np.exp((logits.astype(np.float64) - logits.max()) / params.temperature)
        order = np.lexsort((np.arange(size), -weights))
        falling = weights[order]
        keep = (np.cumsum(falling) - falling < params.top_p * weights.sum()) & (falling >= params.min_p)
        found = Sampler(params, PROMPT, size).distribution(logits)
        np.testing.assert_array_equal(found.ids, order[: keep.sum()])
        np.testing.assert_array_equal(found.probabilities, falling[keep] / falling[keep].sum())


def test_draws_follow_the_distribution() -> None:
    from scipy.stats import chisquare

    params = GenerateParams(temperature=1.2, top_k=12, top_p=0.95, seed=5)
    sampler, logits = Sampler(params, PROMPT, 40), logits_of(40, 1)
    target = sampler.distribution(logits)
    draws = np.array([sampler.sample(logits).token for _ in range(20_000)])
    observed = np.array([(draws == token).sum() for token in target.ids])
    assert observed.sum() == len(draws)
    assert chisquare(observed, target.probabilities * len(draws)).pvalue > 1e-4


def test_seed_repeats_and_differs() -> None:
    def draw(seed: int | None) -> list[int]:
        sampler = Sampler(GenerateParams(temperature=1.0, top_p=1.0, seed=seed), PROMPT, 300)
        return [sampler.sample(logits_of(300, step)).token for step in range(40)]

    assert draw(7) == draw(7)
    assert draw(7) != draw(8)
    assert draw(None) != draw(None)


def test_greedy_takes_the_first_of_equals() -> None:
    sampler = Sampler(GenerateParams(temperature=0.0), PROMPT, 5)
    assert sampler.sample(np.array([0, 2, 1, 2, 2], dtype=np.float32)).token == 1


def test_penalties_follow_their_formulas() -> None:
    logits = np.array([1.0, -2.0, 3.0, 0.5], dtype=np.float32)
    params = GenerateParams(repetition_penalty=2.0, frequency_penalty=0.5, presence_penalty=0.25, logit_bias={3: 4.0})
    sampler = Sampler(params, (0,), 4)
    for token in (1, 1, 2):
        sampler.count(token)
    expected = [1.0 / 2, -2.0 * 2 - 0.5 * 2 - 0.25, 3.0 / 2 - 0.5 - 0.25, 0.5 + 4.0]
    np.testing.assert_allclose(sampler.adjust(logits), expected, rtol=1e-6)
    np.testing.assert_array_equal(logits, np.array([1.0, -2.0, 3.0, 0.5], dtype=np.float32))


def test_bias_forbids_and_forces() -> None:
    logits = logits_of(10, 0)
    best = int(logits.argmax())
    sampler = Sampler(GenerateParams(temperature=0.0, logit_bias={best: -np.inf}), PROMPT, 10)
    assert sampler.sample(logits).token == int(np.argsort(logits)[-2])
    sampler = Sampler(GenerateParams(temperature=1.0, logit_bias={4: 1000.0}), PROMPT, 10)
    assert {sampler.sample(logits).token for _ in range(20)} == {4}


def test_logprobs_are_the_models_own() -> None:
    logits = logits_of(30, 3)
    expected = torch.from_numpy(logits).double().log_softmax(-1).numpy()
    sampled = Sampler(GenerateParams(temperature=0.5, logprobs=4), PROMPT, 30).sample(logits)
    assert sampled.logprob == pytest.approx(expected[sampled.token], abs=1e-6)
    assert sampled.top_logprobs is not None
    assert list(sampled.top_logprobs) == list(np.argsort(-logits)[:4])
    few = GenerateParams(temperature=0.0, logprobs=4, logit_bias=dict.fromkeys(range(2, 30), -np.inf))
    assert set(Sampler(few, PROMPT, 30).sample(logits).top_logprobs or {}) == {0, 1}  # nothing that JSON cannot say
    assert list(sampled.top_logprobs.values()) == pytest.approx(np.sort(expected)[::-1][:4], abs=1e-6)


def test_the_smallest_temperature_is_greedy() -> None:
    logits = logits_of(2000, 2)
    for top_p in (0.9, 1.0):
        sampler = Sampler(GenerateParams(temperature=5e-324, top_p=top_p), PROMPT, 2000)
        assert sampler.sample(logits).token == int(logits.argmax())


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("bad", [np.nan, "all forbidden"])
def test_impossible_logits_are_an_error(temperature: float, bad: object) -> None:
    logits = logits_of(6, 0)
    if bad == "all forbidden":
        logits[:] = -np.inf
    else:
        logits[2] = np.nan
    with pytest.raises(GenerationError, match="leave no token"):
        Sampler(GenerateParams(temperature=temperature), (1,), 6).sample(logits)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"temperature": float("inf")}, "temperature"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_p": 1.5}, "top_p"),
        ({"top_k": -1}, "top_k"),
        ({"min_p": 1.0}, "min_p"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"seed": -1}, "seed"),
        ({"stop": ("a", "")}, "stop"),
        ({"logit_bias": {1: float("nan")}}, "logit_bias"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"repetition_penalty": 1e-300}, "repetition_penalty"),
        ({"logit_bias": {1: 1e308}}, "logit_bias"),
        ({"temprature": 1.0}, "temperature"),
    ],
)
def test_nonsense_is_refused(values: dict[str, object], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        GenerateParams(**values)
