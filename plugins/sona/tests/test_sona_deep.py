"""Deep training: it learns what it is told, stops, comes back, and says what it lacks."""

from __future__ import annotations

from collections import deque
from itertools import islice

import numpy as np
import pytest
import torch

from ruvllm_core.errors import LearningError
from ruvllm_core.generate.request import GenerateParams
from ruvllm_core.protocols import Adapter
from ruvllm_core.testing import tiny
from ruvllm_sona.deep import DeepConfig, DeepProgress, deep
from ruvllm_sona.drawing import draw_answers
from ruvllm_sona.learner import LearnerConfig
from ruvllm_sona.measure import NetworkMeasure
from ruvllm_sona.network import Network
from ruvllm_sona.objective import ObjectiveConfig
from ruvllm_sona.records import Example
from ruvllm_sona.score import answer_logprobs
from ruvllm_sona.sites import linear_sites

SPEC = tiny.tiny_spec()
WEIGHTS = tiny.tiny_weights(SPEC)
SHAPES = linear_sites(SPEC)
CONFIG = DeepConfig(LearnerConfig(2, 3e-3, ObjectiveConfig(0.1, 0.1)), epochs=3, batch=2, held_out=0.25)


def returned(work):
    """What a generator returns at its end."""
    while True:
        try:
            next(work)
        except StopIteration as end:
            return end.value


def network() -> Network:
    return Network(SPEC, WEIGHTS, dtype=torch.float32, resident=True)


def rated(count: int = 16) -> list[Example]:
    """Answers of which those with a certain token are good."""
    rng, found = np.random.default_rng(0), []
    for n in range(count):
        answer = rng.integers(0, 200, 8)
        if n % 2:
            answer[:] = 7 + 3 * (n % 4)
        found.append(Example(str(n), tuple(rng.integers(0, 256, 6).tolist()), tuple(answer.tolist()), float(n % 2)))
    return found


def test_good_answers_become_likelier_than_bad_ones_also_unseen() -> None:
    rounds = [found for found in deep(network(), SHAPES, rated(), [tiny.TEXTS["a"]], CONFIG) if found is not None]
    assert [one.epoch for one in rounds] == [1, 2, 3]
    assert rounds[-1].best > 0.05
    assert rounds[-1].deltas is not None
    assert set(rounds[-1].deltas) == set(SHAPES)


def test_training_that_stopped_goes_on_where_it_was() -> None:
    straight = [found for found in deep(network(), SHAPES, rated(), [], CONFIG) if found is not None]
    first = next(found for found in deep(network(), SHAPES, rated(), [], CONFIG) if found is not None)
    rest = [found for found in deep(network(), SHAPES, rated(), [], CONFIG, resume=first) if found is not None]
    assert [one.margin for one in rest] == [one.margin for one in straight[1:]]
    last = straight[-1].deltas
    assert last is not None and rest[-1].deltas is not None
    for site, delta in last.items():
        np.testing.assert_array_equal(delta.b, rest[-1].deltas[site].b)


def test_what_suits_held_out_answers_no_better_is_not_kept() -> None:
    """Ratings drawn by lot: no round is kept only because it is the last one."""
    rng = np.random.default_rng(5)
    lots = [Example(e.request_id, e.prompt_ids, e.output_ids, float(rng.integers(2))) for e in rated(24)]
    rounds = [found for found in deep(network(), SHAPES, lots, [], CONFIG) if found is not None]
    assert rounds[-1].best == max(0.0, *(one.margin for one in rounds))
    if rounds[-1].best == 0.0:
        assert rounds[-1].deltas is None


def test_there_must_be_good_and_bad() -> None:
    with pytest.raises(LearningError, match="16 good of 16"):
        next(deep(network(), SHAPES, [Example("", (1,), (2,), 1.0)] * 16, [], CONFIG))


def test_scores_are_those_of_the_decoder() -> None:
    decoder, adapter = tiny.tiny_decoder(SPEC, WEIGHTS), tiny.tiny_adapter(SPEC)
    text = tiny.TEXTS["b"]

    def expected(with_adapter: Adapter | None):
        logits = tiny.whole(decoder, text, len(text), with_adapter).astype(np.float64)
        return logits - np.log(np.exp(logits).sum(-1, keepdims=True))

    adapted, base = expected(adapter), expected(None)
    at = np.arange(len(text) - 1)
    found = deque(answer_logprobs(network(), adapter.sites, text[:9], text[9:]), maxlen=1)[0]
    np.testing.assert_allclose(found, adapted[at, text[1:]][8:], atol=2e-4)
    measure = NetworkMeasure(network())
    for one, wanted in ((adapter.sites, adapted), (None, base)):
        (seen,) = returned(measure(one, [text]))
        np.testing.assert_allclose(seen.logprobs, wanted[at, text[1:]], atol=2e-4)
        far = (np.exp(wanted) * (wanted - base)).sum(-1)[:-1]
        np.testing.assert_allclose(seen.kl, far, rtol=1e-3, atol=1e-5)


def test_drawing_is_what_the_engine_would_say() -> None:
    decoder, adapter = tiny.tiny_decoder(SPEC, WEIGHTS), tiny.tiny_adapter(SPEC)
    prompts = [tiny.TEXTS["a"][:5], tiny.TEXTS["b"][:40], tiny.TEXTS["c"][:1]]
    params = [GenerateParams(max_tokens=length, temperature=0.0) for length in (6, 3, 9)]
    found = deque(draw_answers(decoder, adapter, prompts, params, frozenset()), maxlen=1)[0]
    for prompt, answer, length in zip(prompts, found, (6, 3, 9), strict=True):
        text = list(prompt)
        for token in answer:
            assert token == int(np.argmax(tiny.whole(decoder, text, len(prompt) + length, adapter)[-1]))
            text.append(token)
        assert len(answer) == length


def test_it_is_done_in_slices() -> None:
    slices = list(islice(deep(network(), SHAPES, rated(), [], CONFIG), 40))
    assert sum(one is None for one in slices) > 30
    assert all(one is None or isinstance(one, DeepProgress) for one in slices)
