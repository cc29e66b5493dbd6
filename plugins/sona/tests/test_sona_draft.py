"""Learned drafts change no answer, however good or bad the head; and a head computes what its description says."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import chisquare

from ruvllm_core.errors import LearningError
from ruvllm_core.generate.request import GenerateParams, Request
from ruvllm_core.generate.speculative import Speculator
from ruvllm_core.testing import tiny
from ruvllm_sona.draft import DraftHead, DraftNetwork
from ruvllm_sona.draft_ngrams import ORDERS, NGrams, Text
from ruvllm_sona.draft_proposer import DraftHeads, SonaProposer

ROOT = Path(__file__).resolve().parents[3]
VOCAB, WIDTH = 12, 12


def module(path: Path) -> ModuleType:
    """A file of the core's tests."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    found = sys.modules.setdefault(path.stem, importlib.util.module_from_spec(spec))
    if not hasattr(found, "eager"):
        spec.loader.exec_module(found)
    return found


speculation = module(ROOT / "tests" / "speculation.py")


def random_head(seed: int = 0, size: float = 1.0, vocabulary: int = VOCAB, **changes: Any) -> DraftHead:
    random, r, m = np.random.default_rng(seed), 6, 4
    wide = r + 2 * m

    def values(*shape: int) -> Any:
        return (size * random.standard_normal(shape)).astype(np.float32)

    words = np.sort(random.choice(VOCAB, vocabulary, replace=False))
    own = {"vocabulary": words, "state": values(wide, WIDTH), "bias": values(wide), "mix": values(r, m)}
    own |= {"newest": values(vocabulary + 1, wide).astype(np.float16), "again": values(wide, r)}
    own |= {"previous": values(vocabulary + 1, wide).astype(np.float16), "again_bias": values(wide)}
    own |= {"output": values(vocabulary, r), "output_bias": values(vocabulary)}
    return DraftHead(**{**own, **changes})


def table(size: int, sharp: float = 1.5) -> Any:
    return (np.random.default_rng(size).standard_normal((size, size)) * sharp).astype(np.float32)


def proposer(head: DraftHead | None, vocab_size: int = VOCAB, **options: Any) -> SonaProposer:
    return SonaProposer(lambda user: head, vocab_size, vocab_size, **{"least": 0.0, "further": 0.0, **options})


HEADS: dict[str, Callable[[], DraftHead | None]] = {
    "none": lambda: None,
    "random": random_head,
    "sure of itself": lambda: random_head(1, 5.0),
    "few words": lambda: random_head(2, vocabulary=4, sharpness=2.0),
    "with n-grams": lambda: random_head(3, ngrams=NGrams.of([([1, 2, 3, 4, 5, 6, 7] * 3, 0)])),
}


@pytest.mark.parametrize("make", HEADS.values(), ids=HEADS)
@pytest.mark.parametrize("sampling", [{}, {"temperature": 1.0, "top_p": 0.9, "seed": 5}], ids=["greedy", "seeded"])
def test_repeatable_answers_are_those_without_drafts(
    make: Callable[[], DraftHead | None], sampling: dict[str, Any]
) -> None:
    decoder, cache, proposed = speculation.TableDecoder(table(VOCAB)), speculation.CountingCache(), 0
    drafts = proposer(make())
    for n in range(24):
        prompt = np.random.default_rng(n).integers(0, VOCAB, 3 + n % 5).tolist()
        request = tiny.tiny_request(prompt, 100, max_tokens=60, **sampling)
        plain = speculation.answer(decoder, cache, request)
        events = speculation.answer(decoder, cache, request, speculation.eager(drafts, 4))
        assert [event.token_id for event in events] == [event.token_id for event in plain]
        proposed += events[-1].speculation.proposed
    assert proposed > 100
    assert not drafts._texts


@pytest.mark.parametrize("options", [{}, {"least": 0.3, "further": 0.5}], ids=["always", "if likely"])
@pytest.mark.parametrize("make", list(HEADS.values())[1:], ids=list(HEADS)[1:])
def test_sampled_answers_have_the_exact_distribution(
    make: Callable[[], DraftHead | None], options: dict[str, float]
) -> None:
    """Chi-square of pairs of tokens that follow each other, against the table that they are drawn from."""
    logits = table(VOCAB, 1.0)
    decoder = speculation.TableDecoder(logits)
    speculator = Speculator(proposer(make(), **options), 3, speculation.Clock())
    cache, counts = speculation.CountingCache(), np.zeros((VOCAB, VOCAB))
    for _ in range(40):
        request = tiny.tiny_request([1, 2, 3], 600, max_tokens=500, temperature=1.0, top_p=1.0)
        events = speculation.answer(decoder, cache, request, speculator)
        tokens = [3] + [event.token_id for event in events]
        np.add.at(counts, (tokens[:-1], tokens[1:]), 1)
    stats = events[-1].speculation
    assert stats.proposed > 20 and 0 < stats.accepted < stats.proposed
    p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    expected = p * counts.sum(1, keepdims=True)
    large = expected >= 5
    assert chisquare(counts[large], expected[large] * counts[large].sum() / expected[large].sum()).pvalue > 1e-4


def test_the_draft_says_what_it_was_drawn_from() -> None:
    """Drawn tokens follow the rows that come with them, with a head of few words and with n-grams beyond them."""
    head = random_head(
        4, 0.5, vocabulary=7, sharpness=1.4, ngrams=NGrams.of([([1, 2, token], 0) for token in range(12)])
    )
    drafts, hidden = proposer(head), np.ones(WIDTH, np.float32)
    request = tiny.tiny_request([1], temperature=1.0)
    counts, row = np.zeros(VOCAB), np.zeros(VOCAB)
    for _ in range(6000):
        draft = drafts.propose(request, [0, 1, 2], 1, hidden)
        assert draft.probabilities is not None and draft.probabilities.shape == (1, VOCAB)
        row = draft.probabilities[0].astype(np.float64)
        assert draft.likely is None, "a drawn token is right less often than the likeliest"
        counts[draft.tokens[0]] += 1
    assert row.sum() == pytest.approx(1.0, abs=1e-5) and (row > 0).all()
    assert chisquare(counts, 6000 * row / row.sum()).pvalue > 1e-4
    certain = drafts.propose(tiny.tiny_request([1]), [0, 1, 2], 1, hidden)
    assert certain.probabilities is None and len(certain.tokens) == len(certain.likely or ()) == 1
    assert 0.0 < certain.likely[0] <= 1.0


def test_a_head_against_torch() -> None:
    """The formula of its description in float64, for the first token and for the next one."""
    head, hidden = random_head(5, vocabulary=9), np.random.default_rng(1).standard_normal(WIDTH).astype(np.float32)
    arrays = {
        f.name: torch.tensor(getattr(head, f.name)).double()
        for f in fields(head)
        if f.name not in ("sharpness", "ngrams")
    }
    outside = next(token for token in range(VOCAB) if token not in head.vocabulary)

    def combine(a: Any, newest: int, previous: int) -> Any:
        for name, token in (("newest", newest), ("previous", previous)):
            found = (head.vocabulary == token).nonzero()[0]
            a = a + arrays[name][int(found[0]) if len(found) else 9]
        first, second, third = a.split([6, 4, 4])
        return first + arrays["mix"] @ (second * torch.nn.functional.silu(third))

    network, known = DraftNetwork(head), int(head.vocabulary[3])
    s = combine(arrays["state"] @ torch.tensor(hidden).double() + arrays["bias"], known, outside)
    np.testing.assert_allclose(network.first(hidden, known, outside), s, rtol=1e-4, atol=1e-4)
    later = combine(arrays["again"] @ s + arrays["again_bias"], outside, known)
    np.testing.assert_allclose(network.next(s.float().numpy(), outside, known), later, rtol=1e-4, atol=1e-4)
    logits = arrays["output"] @ later + arrays["output_bias"]
    np.testing.assert_allclose(network.logits(later.float().numpy()), logits, rtol=1e-4, atol=1e-4)


def test_a_head_that_computes_no_numbers_is_left_alone(capsys: pytest.CaptureFixture[str]) -> None:
    huge = random_head(6, state=np.full((14, WIDTH), 3e38, np.float32), bias=np.full(14, 3e38, np.float32))
    decoder, cache, drafts = speculation.TableDecoder(table(VOCAB)), speculation.CountingCache(), proposer(huge)
    for _ in range(2):
        request = tiny.tiny_request([1, 2, 3], 100, max_tokens=60)
        events = speculation.answer(decoder, cache, request, speculation.eager(drafts, 4))
        plain = speculation.answer(decoder, cache, request)
        assert [event.token_id for event in events] == [event.token_id for event in plain]
    assert capsys.readouterr().err.count("no numbers") == 1


def test_a_new_head_counts_at_the_next_draft() -> None:
    heads, hidden = DraftHeads(), np.zeros(WIDTH, np.float32)
    drafts = SonaProposer(heads, WIDTH, VOCAB, least=0.0)
    ask = {user: tiny.tiny_request([0], user=user) for user in ("a", "b")}

    def says(token: int) -> DraftHead:
        bias = np.zeros(VOCAB, np.float32)
        bias[token] = 100.0
        return random_head(0, 0.01, output_bias=bias)

    assert list(drafts.propose(ask["a"], [1, 2], 1, hidden).tokens) == []
    for token in (3, 7):
        heads.publish("a", says(token))
        assert list(drafts.propose(ask["a"], [1, 2], 1, hidden).tokens) == [token]
    assert list(drafts.propose(ask["b"], [1, 2], 1, hidden).tokens) == []
    heads.publish("a", None)
    assert list(drafts.propose(ask["a"], [1, 2], 1, hidden).tokens) == []


def test_another_models_head_is_not_used(capsys: pytest.CaptureFixture[str]) -> None:
    drafts = SonaProposer(lambda user: random_head(), 64, VOCAB)
    assert list(drafts.propose(tiny.tiny_request([0]), [1, 2], 2, np.zeros(64, np.float32)).tokens) == []
    assert "another model" in capsys.readouterr().err


def test_files(tmp_path: Path) -> None:
    head = random_head(8, vocabulary=7, sharpness=1.7, ngrams=NGrams.of([([1, 2, 3, 4, 5] * 4, 2)]))
    path = tmp_path / "user" / "head.safetensors"
    head.save(path)
    again = DraftHead.load(path)
    assert again.sharpness == 1.7 and [p.name for p in path.parent.iterdir()] == [path.name]
    for name in [f.name for f in fields(head) if f.name not in ("sharpness", "ngrams")]:
        np.testing.assert_array_equal(getattr(head, name), getattr(again, name))
    assert again.ngrams.after([3, 4, 5, 1]) == head.ngrams.after([3, 4, 5, 1]) == [2, 2, 2]
    data = path.read_bytes()
    for bad in (data[:-50], b"", b"{}", data[: len(data) // 2]):
        path.write_bytes(bad)
        with pytest.raises(LearningError, match="cannot be read"):
            DraftHead.load(path)


@pytest.mark.parametrize(
    "changes",
    [
        {"bias": np.zeros(3, np.float32)},
        {"mix": np.full((6, 4), np.nan, np.float32)},
        {"newest": np.zeros((VOCAB + 1, 14), np.float32)},
        {"vocabulary": np.arange(VOCAB)[::-1]},
        {"sharpness": float("nan")},
    ],
)
def test_heads_that_make_no_sense(changes: dict[str, Any]) -> None:
    with pytest.raises(LearningError, match="draft head"):
        replace(random_head(), **changes)


def followers(tokens: list[int], run: list[int], start: int = 0) -> Iterator[int]:
    """By definition."""
    for end in range(max(start, len(run)), len(tokens)):
        if tokens[end - len(run) : end] == run:
            yield tokens[end]


def test_ngrams_are_what_followed() -> None:
    random = np.random.default_rng(0)
    texts = [(random.integers(0, 4, int(n)).tolist(), int(n) // 3) for n in random.integers(0, 40, 12)]
    grams = NGrams.of(texts)
    for order in ORDERS:
        for _ in range(60):
            run = random.integers(0, 4, order).tolist()
            expected = [token for tokens, start in texts for token in followers(tokens, run, start)]
            assert grams.after(run) == expected[-32:]
    text, tokens = Text(), random.integers(0, 3, 70).tolist()
    for length in (0, 1, 5, 6, 30, 70):
        text.update(tokens[:length])
    for order in ORDERS:
        assert text.after(tokens[-order:]) == list(followers(tokens, tokens[-order:]))[-32:]


def test_request_type() -> None:
    """A prompt of a single token has nothing before it."""
    request = Request("one", (3,), GenerateParams(temperature=0.0), frozenset(), 10)
    assert len(proposer(random_head()).propose(request, [3], 3, np.zeros(WIDTH, np.float32)).tokens) == 3
