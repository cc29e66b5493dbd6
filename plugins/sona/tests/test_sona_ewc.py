"""EWC++ against dense float64 arithmetic, and what makes its penalty one of the model and not of its factors."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ruvllm_core.errors import LearningError
from ruvllm_core.protocols import LowRank
from ruvllm_sona.ewc import Anchor, Fisher, penalty, prox

ROWS, COLUMNS = 9, 7


def dense(delta: LowRank) -> np.ndarray:
    return delta.scale * delta.b.astype(np.float64) @ delta.a.astype(np.float64)


def random_delta(
    random: np.random.Generator, rank: int, scale: float, shape: tuple[int, int] = (ROWS, COLUMNS)
) -> LowRank:
    return LowRank(random.normal(size=(rank, shape[1])), random.normal(size=(shape[0], rank)), scale)


def random_fisher(random: np.random.Generator, shape: tuple[int, int] = (ROWS, COLUMNS)) -> Fisher:
    return Fisher.estimate({"x": (random.normal(size=(20, shape[0])) ** 3, random.normal(size=(20, shape[1])) ** 3)})


def matrix(fisher: Fisher, site: str = "x") -> np.ndarray:
    return np.outer(*fisher.sites[site])


def case(seed: int, rank: int = 2, held: int = 2) -> tuple[LowRank, LowRank, Fisher, Anchor]:
    random = np.random.default_rng(seed)
    delta, target, fisher = random_delta(random, rank, 0.7), random_delta(random, held, 1.3), random_fisher(random)
    return delta, target, fisher, Anchor({"x": target}, fisher)


def test_fisher_is_that_of_single_tokens() -> None:
    """Rows and columns add up to those of the mean of squares; with one token nothing is lost at all."""
    random = np.random.default_rng(0)
    g, x = random.normal(size=(30, ROWS)), random.normal(size=(30, COLUMNS))
    exact = np.mean([np.outer(each, other) ** 2 for each, other in zip(g, x, strict=True)], axis=0)
    found = matrix(Fisher.estimate({"x": (g, x)}))
    np.testing.assert_allclose(found.sum(0), exact.sum(0), rtol=1e-12)
    np.testing.assert_allclose(found.sum(1), exact.sum(1), rtol=1e-12)
    np.testing.assert_allclose(matrix(Fisher.estimate({"x": (g[:1], x[:1])})), np.outer(g[0], x[0]) ** 2, rtol=1e-12)
    assert np.isfinite(matrix(Fisher.estimate({"x": (0 * g, x)}))).all()


def test_fisher_of_a_softmax_layer() -> None:
    """With labels drawn from the model, the estimate tends to the model's own expectation of squared gradients."""
    random = np.random.default_rng(1)
    weights = torch.tensor(random.normal(size=(5, 4)))
    x = random.normal(size=4)
    p = torch.softmax(weights @ torch.tensor(x), 0).numpy()
    labels = random.choice(5, 200_000, p=p)
    gradients = np.eye(5)[labels] - p
    found = matrix(Fisher.estimate({"x": (gradients, np.tile(x, (len(labels), 1)))}))
    np.testing.assert_allclose(found, np.outer(p * (1 - p), x**2), rtol=0.03)


def test_moving_average_and_sum_keep_the_sums_exact() -> None:
    random = np.random.default_rng(2)
    one, two = random_fisher(random), random_fisher(random)
    for found, exact in (
        (one.averaged(two, 0.3), 0.7 * matrix(one) + 0.3 * matrix(two)),
        (one.plus(two), matrix(one) + matrix(two)),
    ):
        np.testing.assert_allclose(matrix(found).sum(0), exact.sum(0), rtol=1e-12)
        np.testing.assert_allclose(matrix(found).sum(1), exact.sum(1), rtol=1e-12)


@pytest.mark.parametrize(("rank", "held"), [(1, 1), (2, 1), (2, 3)])
def test_penalty_equals_the_dense_one(rank: int, held: int) -> None:
    delta, target, fisher, anchor = case(3, rank, held)
    expected = 0.5 * (matrix(fisher) * (dense(delta) - dense(target)) ** 2).sum()
    assert penalty({"x": delta}, anchor) == pytest.approx(expected, rel=1e-12)
    assert penalty({"x": target}, anchor) == pytest.approx(0.0, abs=1e-9)


def test_the_penalty_is_of_the_model_and_not_of_its_factors() -> None:
    """(A, B) and (R A, B R⁻¹) are one model. A penalty on factors tells them apart, and even calls one forgetful that
    is the anchor itself."""
    delta, target, _, anchor = case(4)
    turn = np.array([[3.0, 1.0], [0.5, 0.4]])
    turned = LowRank(turn @ delta.a, delta.b @ np.linalg.inv(turn), delta.scale)
    np.testing.assert_allclose(dense(turned), dense(delta), rtol=1e-12)
    assert penalty({"x": turned}, anchor) == pytest.approx(penalty({"x": delta}, anchor), rel=1e-12)

    def naive(found: LowRank) -> float:
        return float(((found.a - target.a) ** 2).sum() + ((found.b - target.b) ** 2).sum())

    assert naive(turned) > 1.5 * naive(delta)
    same = LowRank(turn @ target.a, target.b @ np.linalg.inv(turn), target.scale)
    assert naive(same) > 1.0 and penalty({"x": same}, anchor) == pytest.approx(0.0, abs=1e-9)


def objective(
    a: torch.Tensor, b: torch.Tensor, start: LowRank, target: LowRank, fisher: Fisher, k: float
) -> torch.Tensor:
    near = ((a - torch.tensor(start.a)) ** 2).sum() + ((b - torch.tensor(start.b)) ** 2).sum()
    off = start.scale * b @ a - torch.tensor(dense(target))
    return 0.5 * near + 0.5 * k * (torch.tensor(matrix(fisher)) * off**2).sum()


@pytest.mark.parametrize(("rank", "held"), [(1, 1), (1, 2), (2, 1), (3, 2)])
@pytest.mark.parametrize("strength", [1e-3, 1e-2, 1.0, 300.0])
def test_proximal_step_against_a_dense_minimiser(rank: int, held: int, strength: float) -> None:
    """One half step is the least-squares solution, and more sweeps go down to where the objective has no slope."""
    delta, target, fisher, anchor = case(5, rank, held)
    one = prox({"x": delta}, anchor, strength)["x"]
    f = matrix(fisher)
    b, a = np.empty_like(delta.b), np.empty_like(delta.a)
    for i in range(ROWS):
        root = np.sqrt(strength * f[i])
        left = np.concatenate([np.eye(rank), root[:, None] * delta.scale * delta.a.T])
        b[i] = np.linalg.lstsq(left, np.concatenate([delta.b[i], root * dense(target)[i]]), rcond=None)[0]
    for j in range(COLUMNS):
        root = np.sqrt(strength * f[:, j])
        left = np.concatenate([np.eye(rank), root[:, None] * delta.scale * b])
        a[:, j] = np.linalg.lstsq(left, np.concatenate([delta.a[:, j], root * dense(target)[:, j]]), rcond=None)[0]
    np.testing.assert_allclose(one.b, b, rtol=1e-7, atol=1e-8)
    np.testing.assert_allclose(one.a, a, rtol=1e-7, atol=1e-8)

    values = []
    for sweeps in (0, 1, 2, 3, 5000):
        found = prox({"x": delta}, anchor, strength, sweeps)["x"]
        ta, tb = (torch.tensor(factor, requires_grad=True) for factor in (found.a, found.b))
        value = objective(ta, tb, delta, target, fisher, strength)
        values.append(value.item())
    value.backward()
    assert np.all(np.diff(values) <= 1e-9)
    if strength <= 1e-2:  # the stronger, the narrower the valley, and the slower is the way along it
        assert max(float(ta.grad.abs().max()), float(tb.grad.abs().max())) <= 1e-7


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_no_strength_is_too_large(rank: int) -> None:
    delta, target, _, anchor = case(6, rank, rank)
    for strength in (1e4, 1e12, 1e30, 1e300):
        found = prox({"x": delta}, anchor, strength)["x"]
        assert np.isfinite(found.a).all() and np.isfinite(found.b).all()
        if strength >= 1e12:
            np.testing.assert_allclose(dense(found), dense(target), atol=1e-4)
    assert prox({"x": delta}, anchor, 0.0)["x"] is delta


def test_factors_that_depend_on_each_other_do_not_blow_up() -> None:
    """Of a rank that is there by name only, rounding is left; no strength may make anything of it."""
    delta, _, _, anchor = case(7)
    twin = LowRank(np.concatenate([delta.a[:1], delta.a[:1]]), delta.b, delta.scale)
    before = penalty({"x": twin}, anchor)
    for strength in (1e6, 1e12, 1e20):
        found = prox({"x": twin}, anchor, strength, 3)["x"]
        assert np.abs(dense(found)).max() < 1e3
        assert penalty({"x": found}, anchor) <= before * (1 + 1e-9)


def test_the_anchor_of_the_base_model_pulls_towards_it() -> None:
    delta, _, fisher, _ = case(8)
    anchor = Anchor({"x": LowRank(delta.a, 0 * delta.b, delta.scale)}, fisher)
    sizes = [np.abs(dense(prox({"x": delta}, anchor, strength)["x"])).max() for strength in (0.0, 1.0, 1e3, 1e12)]
    assert sizes[0] > sizes[1] > sizes[2] > sizes[3] and sizes[3] < 1e-9


def test_float32_stays_float32_and_free_sites_stay() -> None:
    delta, _, _, anchor = case(9)
    small = LowRank(delta.a.astype(np.float32), delta.b.astype(np.float32), delta.scale)
    found = prox({"x": small, "free": small}, anchor, 2.0)
    assert found["x"].a.dtype == found["x"].b.dtype == np.float32
    assert found["x"].a.flags.c_contiguous and found["x"].b.flags.c_contiguous
    assert found["free"] is small and found["x"] is not small
    np.testing.assert_allclose(found["x"].b, prox({"x": delta}, anchor, 2.0)["x"].b, atol=1e-5)


def test_consolidation() -> None:
    delta, target, fisher, anchor = case(10)
    other = random_fisher(np.random.default_rng(11))
    found = anchor.consolidated({"x": delta}, other)
    assert found.deltas["x"] is delta
    np.testing.assert_allclose(found.fisher.sites["x"][0], fisher.plus(other).sites["x"][0])
    assert penalty({"x": delta}, found) == pytest.approx(0.0, abs=1e-9) and penalty({"x": target}, found) > 0.1


def test_what_does_not_fit_is_named() -> None:
    delta, _, fisher, anchor = case(12)
    with pytest.raises(LearningError, match="where there is no delta"):
        prox({}, anchor, 1.0)
    with pytest.raises(LearningError, match="no delta"):
        Anchor({}, fisher)
    with pytest.raises(LearningError, match="9 by 8"):
        penalty({"x": LowRank(np.zeros((1, 8)), np.zeros((9, 1)))}, anchor)
    with pytest.raises(LearningError, match="other sites"):
        fisher.plus(Fisher({}))
    with pytest.raises(LearningError, match="not of n tokens"):
        Fisher.estimate({"x": (np.zeros((3, 2)), np.zeros((4, 2)))})
    with pytest.raises(LearningError, match="not finite"):
        Fisher.estimate({"x": (np.full((3, 2), np.nan), np.zeros((3, 2)))})
    for strength in (-1.0, np.nan, np.inf):
        with pytest.raises(LearningError, match="strength"):
            prox({"x": delta}, anchor, strength)
