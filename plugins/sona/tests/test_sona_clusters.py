"""Clusters of prompts, and whether feedback depends on them."""

from __future__ import annotations

import itertools
import math
from collections.abc import Generator
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import pytest

from ruvllm_sona import contradiction
from ruvllm_sona.kmeans import Clusters, kmeans, seeds, unit

Floats = npt.NDArray[np.float32]
T = TypeVar("T")


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


# k-means++


def test_seeds_are_drawn_by_squared_distance() -> None:
    angles = np.array([0.0, 0.2, 0.9, 1.7, 2.5, 3.1])
    points = np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)
    rng, counts = np.random.default_rng(0), np.zeros((6, 6))
    for _ in range(6000):
        first, second = drain(seeds(points, 2, rng))
        counts[first, second] += 1
    distances = np.square(points[:, None] - points[None]).sum(axis=2)
    expected = distances / distances.sum(axis=1, keepdims=True) * 1000
    assert not np.diag(counts).any()
    off = ~np.eye(6, dtype=bool)
    chi_square = (np.square(counts - expected)[off] / expected[off]).sum()
    assert chi_square < 66.7, "30 cells, 29 degrees of freedom: exceeded once in ten thousand times"


def test_kmeans_never_gets_worse_and_says_what_it_did() -> None:
    for seed in range(30):
        points, _ = blobs(seed, 5, 12, spread=1.5)
        found = drain(kmeans(points, 6, np.random.default_rng(seed)))
        assert all(a >= b - 1e-9 * a for a, b in itertools.pairwise(found.inertia))
        for label in range(len(found.sums)):
            np.testing.assert_allclose(found.sums[label], points[found.labels == label].sum(axis=0), atol=1e-4)
        if len(found.inertia) < 12:  # it ended because nothing moved
            np.testing.assert_array_equal((points @ unit(found.sums).T).argmax(axis=1), found.labels)


def test_kmeans_finds_the_best_of_all_partitions() -> None:
    points, _ = blobs(3, 3, 3, size=4, spread=1.2)
    # Squared distances to unit centroids add up to 2n - 2 Σ|sum of a cluster|.
    best = min(
        18 - 2 * sum(np.linalg.norm(points[np.array(labels) == one].sum(axis=0)) for one in range(3))
        for labels in itertools.product(range(3), repeat=9)
    )
    rng = np.random.default_rng(0)
    runs = [drain(kmeans(points, 3, rng)).inertia[-1] for _ in range(20)]
    assert min(runs) == pytest.approx(best, abs=1e-4)
    assert min(runs) >= best - 1e-4


def test_kmeans_recovers_what_is_apart_and_takes_what_is_alike() -> None:
    points, labels = blobs(0, 6, 40, spread=0.3)
    runs: list[Clusters] = [drain(kmeans(points, 6, np.random.default_rng(seed))) for seed in range(5)]
    found = min(runs, key=lambda run: run.inertia[-1]).labels
    assert {len(set(found[labels == one])) for one in range(6)} == {1}
    assert len(set(found)) == 6
    same = np.tile(points[:2], (10, 1))
    assert len(drain(kmeans(same, 5, np.random.default_rng(0))).sums) == 2
    assert len(drain(kmeans(np.zeros((7, 4), np.float32), 3, np.random.default_rng(0))).sums) == 1


# Contradictions


def test_chance_is_the_share_of_all_draws() -> None:
    rng = np.random.default_rng(0)
    for _ in range(20):
        values = rng.random(11).astype(np.float32) * rng.integers(0, 2, 11)
        part = np.zeros(11, bool)
        part[rng.choice(11, 4, replace=False)] = True
        low = values < values.mean()
        draws = [low[list(one)].sum() >= low[part].sum() for one in itertools.combinations(range(11), 4)]
        assert contradiction.chance_of_gap(values, part) == pytest.approx(np.mean(draws), rel=1e-9)
    chance = contradiction.chance_of_gap((np.arange(900) >= 110).astype(np.float32), np.arange(900) < 100)
    assert chance == pytest.approx(math.comb(110, 100) / math.comb(900, 100), rel=1e-9)


def test_a_bound_on_chance_is_a_bound() -> None:
    """Feedback that has nothing to do with prompts seems to, no more often than is said."""
    rng, chances = np.random.default_rng(5), []
    for seed in range(300):
        points, _ = blobs(seed, 4, 16, size=24)
        found = drain(contradiction.find_worse(points, rng.integers(0, 2, 64).astype(np.float32), 8, rng))
        chances.append(1.0 if found is None else found.chance)
    for level in (0.2, 0.05):  # three standard deviations of a share of 300
        assert np.mean(np.array(chances) <= level) <= level + 3 * math.sqrt(level / 300)


def test_worse_feedback_on_one_topic_is_found() -> None:
    rng = np.random.default_rng(6)
    points, labels = blobs(1, 6, 30)
    values = (rng.random(180) < np.where(labels == 2, 0.1, 0.85)).astype(np.float32)
    found = drain(contradiction.find_worse(points, values, 8, rng))
    assert found is not None and found.chance < 1e-6
    assert (found.part == (labels == 2)).mean() > 0.97
    constant = np.full(180, 0.4, np.float32)
    assert drain(contradiction.find_worse(points, constant, 8, rng)) is None
    assert drain(contradiction.find_worse(points[:31], values[:31], 8, rng)) is None
