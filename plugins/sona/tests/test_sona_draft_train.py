"""A draft head learns what can be learned, and is handed out only where it is better."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ruvllm_core.errors import LearningError
from ruvllm_core.generate.request import GenerateParams, Trajectory
from ruvllm_core.generate.sampler import Distribution
from ruvllm_core.model.quant import QuantTensor
from ruvllm_sona.draft import DraftHead, Embeddings
from ruvllm_sona.draft_start import leading, solve
from ruvllm_sona.draft_store import Answer, DraftStore, from_trajectory
from ruvllm_sona.draft_train import Progress, TrainConfig, frequent, measure, train

VOCAB, WIDTH = 60, 16
CONFIG = TrainConfig(width=12, gates=8, vocabulary=50, epochs=4, rate=5e-3, dropout=0.0)
RULE = np.random.default_rng(7).integers(5, 45, (VOCAB, VOCAB))  # the token after two others


def embeddings() -> Embeddings:
    values = np.random.default_rng(3).standard_normal((VOCAB, WIDTH)).astype(np.float32)
    return Embeddings({"embed": QuantTensor.from_float(values)})


def trajectory(name: str, tokens: list[int], random: np.random.Generator, **changes: Any) -> Trajectory:
    """An answer after the prompt ``[0, 1]``, whose states are the embeddings of what was drawn from them, and noise."""
    hidden = embeddings().embed(tokens) + 0.3 * random.standard_normal((len(tokens), WIDTH)).astype(np.float32)
    fields = {"hidden": hidden, "params": GenerateParams(), **changes}
    return Trajectory(name, (0, 1), tuple(tokens), "", "length", **fields)


def answers(count: int, learnable: bool = True, seed: int = 0) -> list[Answer]:
    """Texts in which a token follows from the one before it, or from nothing."""
    random, found = np.random.default_rng(seed), []
    for number in range(count):
        tokens = [int(random.integers(5, 45))]
        while len(tokens) < 40:
            tokens.append(int(RULE[0, tokens[-1]] if learnable and random.random() < 0.9 else random.integers(5, 45)))
        answer = from_trajectory(trajectory(str(number), tokens, random))
        assert answer is not None
        found.append(answer)
    return found


def last(*args: Any, **options: Any) -> Progress:
    *_, progress = train(*args, **options)
    return progress


def score(head: DraftHead, of: list[Answer]) -> float:
    slices = measure(head, of)
    while True:
        try:
            next(slices)
        except StopIteration as end:
            return float(end.value.tokens)


def test_learns_what_can_be_known() -> None:
    """A rule that holds nine times of ten: right first tokens come near .9, and so do second ones."""
    done = last(None, answers(60), embeddings(), CONFIG)
    assert done.phase == "done" and done.head is not None and done.score is not None
    assert done.score.first > 0.7 and done.score.second > 0.6
    assert score(done.head, answers(10, seed=9)) > 0.7 * 1.6


def test_noise_teaches_nothing_new() -> None:
    """A head that knows the rule is not given up for one trained on noise, nor for one that is not better."""
    good = last(None, answers(60), embeddings(), CONFIG).head
    assert good is not None
    mixed = [
        noise if n % 10 != 9 else rule
        for n, (noise, rule) in enumerate(zip(answers(60, False), answers(60), strict=True))
    ]
    worse = last(good, mixed, embeddings(), CONFIG)
    assert worse.head is None
    assert worse.score is not None and worse.before is not None and worse.score.tokens < worse.before.tokens
    again = last(good, answers(60), embeddings(), replace(CONFIG, epochs=1, rate=1e-9))
    assert again.head is None


def test_goes_on_where_it_was_interrupted() -> None:
    texts, config = answers(30), replace(CONFIG, dropout=0.3)
    whole = list(train(None, texts, embeddings(), config))
    saved = next(p.checkpoint for p in whole if p.checkpoint is not None and p.epoch == 2)
    resumed = last(None, texts, embeddings(), config, resume=saved)
    first, second = whole[-1].head, resumed.head
    assert first is not None and second is not None
    for name in ("state", "newest", "again", "mix", "output", "output_bias"):
        np.testing.assert_array_equal(getattr(first, name), getattr(second, name))
    with pytest.raises(LearningError, match="other answers"):
        last(None, answers(31), embeddings(), config, resume=saved)


def test_leaves_torch_as_it_was() -> None:
    threads, state = torch.get_num_threads(), torch.random.get_rng_state()
    for _, progress in zip(range(60), train(None, answers(30), embeddings(), CONFIG), strict=False):
        assert torch.get_num_threads() == threads, progress
    assert torch.equal(torch.random.get_rng_state(), state)


def test_too_little_or_of_another_model() -> None:
    with pytest.raises(LearningError, match="needs 20 answers"):
        last(None, answers(19), embeddings(), CONFIG)
    other = Embeddings({"embed": QuantTensor.from_float(np.ones((VOCAB, 32), np.float32))})
    with pytest.raises(LearningError, match="width 32"):
        last(None, answers(30), other, CONFIG)
    with pytest.raises(LearningError, match="without weights"):
        Embeddings({})


def test_linear_algebra_in_slices() -> None:
    """Against LAPACK in float64."""
    random = np.random.default_rng(0)
    root = random.standard_normal((250, 250))
    matrix, right = root @ root.T + 50 * np.eye(250), random.standard_normal((250, 7))

    def run(slices: Any) -> torch.Tensor:
        while True:
            try:
                next(slices)
            except StopIteration as end:
                found: torch.Tensor = end.value
                return found

    found = run(solve(torch.tensor(matrix, dtype=torch.float32), torch.tensor(right, dtype=torch.float32)))
    np.testing.assert_allclose(found.numpy(), np.linalg.solve(matrix, right), rtol=1e-3, atol=1e-5)
    basis = random.standard_normal((250, 5))
    low = basis @ basis.T + 1e-3 * matrix / np.linalg.norm(matrix, 2)
    top = np.linalg.eigh(low)[1][:, -5:]
    found = run(leading(torch.tensor(low, dtype=torch.float32), 5, seed=1))
    np.testing.assert_allclose(found.numpy() @ found.numpy().T, top @ top.T, atol=1e-3)


def test_store_keeps_the_newest_within_its_bound(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    one = from_trajectory(trajectory("x", [5] * 10, random))
    assert one is not None
    store = DraftStore(max_bytes=3 * one.nbytes)
    for number in range(5):
        assert store.add(trajectory(f"r/{number}", [5 + number] * 10, random))
        assert store.nbytes <= 3 * one.nbytes
    assert [int(answer.tokens[1]) for answer in store.answers()] == [7, 8, 9]
    assert not store.add(trajectory("long", [5] * 100, random)) and len(store) == 3
    assert not store.add(trajectory("no states", [5] * 10, random, hidden=None))
    assert not store.add(trajectory("NaN", [5] * 10, random, hidden=np.full((10, WIDTH), np.nan, np.float32)))
    store.save(tmp_path / "answers.safetensors")
    again = DraftStore()
    again.load(tmp_path / "answers.safetensors")
    for before, after in zip(store.answers(), again.answers(), strict=True):
        for name in ("tokens", "hidden", "ids", "probabilities"):
            np.testing.assert_array_equal(getattr(before, name), getattr(after, name))
    assert again.forget("r/3") and not again.forget("r/3")
    assert len(again) == 2 and again.nbytes == 2 * one.nbytes
    (tmp_path / "torn").write_bytes((tmp_path / "answers.safetensors").read_bytes()[:-100])
    with pytest.raises(LearningError, match="cannot be read"):
        again.load(tmp_path / "torn")


def test_what_is_kept_of_a_distribution() -> None:
    ids = np.arange(30)[::-1].copy()
    p = np.linspace(0.06, 0.001, 30)
    given = tuple(Distribution(ids, p / p.sum()) for _ in range(5))
    answer = from_trajectory(trajectory("x", [5, 6, 7, 8, 9], np.random.default_rng(0), drawn_from=given))
    assert answer is not None
    np.testing.assert_array_equal(answer.tokens, [1, 5, 6, 7, 8, 9])
    np.testing.assert_array_equal(answer.ids[2], ids[:16])
    np.testing.assert_allclose(answer.probabilities[2], (p / p.sum())[:16], rtol=1e-3)
    assert frequent([answer], VOCAB, 4).tolist() == [26, 27, 28, 29]
