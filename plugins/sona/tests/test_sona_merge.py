"""Merged deltas against dense float64 arithmetic and against peft's rules."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ruvllm_core.errors import LearningError
from ruvllm_core.protocols import LowRank
from ruvllm_sona import merge as module
from ruvllm_sona.merge import dare, merge, merge_all, refactor, ties

ROWS, COLUMNS = 14, 11
WEIGHTS = [0.5, 1.5, -0.7]


def dense(delta: LowRank) -> np.ndarray:
    return delta.scale * delta.b.astype(np.float64) @ delta.a.astype(np.float64)


def some(seed: int = 0, ranks: tuple[int, ...] = (1, 2, 3)) -> list[LowRank]:
    random = np.random.default_rng(seed)
    return [
        LowRank(
            random.normal(size=(rank, COLUMNS)).astype(np.float32),
            random.normal(size=(ROWS, rank)).astype(np.float32),
            0.5 + rank,
        )
        for rank in ranks
    ]


def cut(whole: np.ndarray, rank: int) -> np.ndarray:
    u, values, v = np.linalg.svd(whole, full_matrices=False)
    return (u[:, :rank] * values[:rank]) @ v[:rank]


@pytest.mark.parametrize("rank", [1, 2, 5, 6, 40])
@pytest.mark.parametrize("ranks", [(1, 2, 3), (8, 9, 2)])  # the second is of more ranks than the matrix has
def test_merge_is_the_best_of_its_rank(rank: int, ranks: tuple[int, ...]) -> None:
    deltas = some(1, ranks)
    whole = sum(weight * dense(each) for each, weight in zip(deltas, WEIGHTS, strict=True))
    found = merge(deltas, WEIGHTS, rank)
    best = cut(whole, rank)
    np.testing.assert_allclose(dense(found.delta), best, atol=1e-6 * np.linalg.norm(whole))
    assert found.error == pytest.approx(np.linalg.norm(whole - best), rel=1e-9, abs=1e-9)
    assert found.norm == pytest.approx(np.linalg.norm(whole), rel=1e-9)
    assert found.delta.a.dtype == np.float32 and found.delta.scale == 1.0
    if rank >= sum(ranks):
        assert found.error <= 1e-12 * found.norm


def test_averaged_factors_are_something_else() -> None:
    deltas = some(2, (2, 2))
    whole = 0.5 * dense(deltas[0]) + 0.5 * dense(deltas[1])
    averaged = LowRank((deltas[0].a + deltas[1].a) / 2, (deltas[0].b + deltas[1].b) / 2, deltas[0].scale)
    found = merge(deltas, [0.5, 0.5], 2)
    assert np.linalg.norm(dense(averaged) - whole) > 1.5 * found.error


def test_what_has_no_weight_can_still_learn() -> None:
    fresh = LowRank(some(3)[1].a, np.zeros((ROWS, 2), np.float32))
    found = merge([fresh], [1.0], 2)
    assert not found.delta.b.any() and found.norm == found.error == 0.0
    np.testing.assert_allclose(found.delta.a @ found.delta.a.T, np.eye(2), atol=1e-6)


@pytest.mark.parametrize("density", [0.05, 0.3, 0.5])
def test_ties_equals_peft(density: float) -> None:
    theirs = pytest.importorskip("peft.utils.merge_utils")
    deltas = some(4, (4, 5, 6))
    expected = theirs.ties([torch.tensor(dense(each)) for each in deltas], torch.tensor(WEIGHTS).double(), density)
    found = ties(deltas, WEIGHTS, ROWS, density)
    assert expected.abs().max() > 0.1
    np.testing.assert_allclose(dense(found.delta), expected.numpy(), atol=1e-5 * expected.norm().item())
    low = ties(deltas, WEIGHTS, 3, density)
    np.testing.assert_allclose(dense(low.delta), cut(expected.numpy(), 3), atol=1e-5 * expected.norm().item())
    assert low.error > 0.0


def test_ties_at_the_ends() -> None:
    """All kept and all of one sign: a mean. Less than one number kept: nothing."""
    deltas = some(5, (2,))
    np.testing.assert_allclose(dense(ties(deltas, [1.0], 2, 1.0).delta), dense(deltas[0]), atol=1e-5)
    twice = ties([deltas[0], deltas[0]], [1.0, 3.0], 2, 1.0)
    np.testing.assert_allclose(dense(twice.delta), 2.0 * dense(deltas[0]), atol=1e-5)
    assert not ties(deltas, [1.0], 2, 1e-6).delta.b.any()


def test_dare_equals_peft(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the same numbers picked, the same merge."""
    theirs = pytest.importorskip("peft.utils.merge_utils")
    deltas, random = some(6, (4, 5, 6)), np.random.default_rng(7)
    monkeypatch.setattr(torch, "bernoulli", lambda p: torch.tensor(random.random(p.shape) < p.numpy()).double())
    parts = [torch.tensor(dense(each)) for each in deltas]
    expected = theirs.dare_linear(parts, torch.tensor(WEIGHTS).double(), 0.4)
    found = dare(deltas, WEIGHTS, ROWS, 0.4, seed=7)
    np.testing.assert_allclose(dense(found.delta), expected.numpy(), atol=1e-5 * expected.norm().item())


def test_dare_is_right_in_the_mean_and_repeatable() -> None:
    deltas = some(8)
    whole = sum(weight * dense(each) for each, weight in zip(deltas, WEIGHTS, strict=True))
    drawn = [dense(dare(deltas, WEIGHTS, ROWS, 0.5, seed).delta) for seed in range(400)]
    assert np.linalg.norm(drawn[0] - whole) > 0.3 * np.linalg.norm(whole)
    assert np.linalg.norm(np.mean(drawn, 0) - whole) < 0.08 * np.linalg.norm(whole)
    np.testing.assert_array_equal(dense(dare(deltas, WEIGHTS, ROWS, 0.5, 3).delta), drawn[3])


def test_sites_are_merged_each_for_itself() -> None:
    first, second, third = some(9)
    found = merge_all([{"x": first, "y": second}, {"x": third}], [0.5, 2.0], 6)
    np.testing.assert_allclose(dense(found["x"].delta), 0.5 * dense(first) + 2.0 * dense(third), atol=1e-4)
    np.testing.assert_allclose(dense(found["y"].delta), 0.5 * dense(second), atol=1e-4)
    kept = merge_all([{"x": third}], [1.0], 2, how=ties, density=0.5)["x"]
    np.testing.assert_array_equal(kept.delta.b, ties([third], [1.0], 2, 0.5).delta.b)


def test_refactor() -> None:
    whole = np.random.default_rng(10).normal(size=(ROWS, COLUMNS))
    found = refactor(whole, 4)
    np.testing.assert_allclose(dense(found.delta), cut(whole, 4), atol=1e-5)
    assert found.error == pytest.approx(np.linalg.norm(whole - cut(whole, 4)))


def test_what_cannot_be_merged() -> None:
    delta = some()[0]
    other = LowRank(np.zeros((1, 5), np.float32), np.zeros((ROWS, 1), np.float32))
    broken = LowRank(delta.a * np.float32(np.nan), delta.b)
    for deltas, weights, rank, match in (
        ([], [], 1, "0 deltas"),
        ([delta], [1.0, 2.0], 1, "2 weights"),
        ([delta], [1.0], 0, "rank 0"),
        ([delta, other], [1.0, 1.0], 1, "different shapes"),
        ([delta], [np.inf], 1, "not finite"),
        ([broken], [1.0], 1, "not finite"),
    ):
        with pytest.raises(LearningError, match=match):
            merge(deltas, weights, rank)
    for how in (ties, dare):
        with pytest.raises(LearningError, match="density"):
            how([delta], [1.0], 1, density=0.0)
    with pytest.raises(LearningError, match="1 adapters, but 2"):
        merge_all([{}], [1.0, 2.0], 1)
    assert module.merge_all([{}], [1.0], 1) == {}
