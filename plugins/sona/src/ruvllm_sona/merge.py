"""Merging low-rank deltas into one: exactly, or by TIES and DARE.

A weighted sum of products is the product of the factors side by side, so its best approximation of lower rank costs
two thin QR decompositions and one small SVD (Eckart and Young 1936). Averaging A and B each for itself is another,
wrong, thing. TIES (arXiv 2306.01708) and DARE (arXiv 2311.03099) judge single numbers of ΔW and have to form it; they
are meant for the many ranks of deep adapters. At rank 1 or 2 what they drop is no noise in ΔW but most of it, and
cutting back to that rank adds an error far larger than what they mend.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ruvllm_core.errors import LearningError
from ruvllm_core.protocols import LowRank
from ruvllm_sona.sites import Deltas

Dense = npt.NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Merged:
    """One delta for several.

    Attributes:
        delta: of scale 1; the rows of A have length 1, so that what has no weight yet can still get some.
        error: Frobenius norm of what was cut off.
        norm: that of the whole before the cut.
    """

    delta: LowRank
    error: float
    norm: float


def merge(deltas: Sequence[LowRank], weights: Sequence[float], rank: int) -> Merged:
    """The best delta of at most `rank` for ``Σ w_i s_i B_i A_i``; computed in float64, ΔW is never formed.

    Raises:
        LearningError: nothing to merge, other shapes, or weights that are not finite.
    """
    _check(deltas, weights, rank)
    scaled = [float(w) * each.scale * each.b.astype(np.float64) for each, w in zip(deltas, weights, strict=True)]
    left, inner_left = np.linalg.qr(np.concatenate(scaled, axis=1))
    right, inner_right = np.linalg.qr(np.concatenate([each.a for each in deltas]).astype(np.float64).T)
    u, values, v = np.linalg.svd(inner_left @ inner_right.T)
    return _cut(left @ u[:, : len(values)], values, v[: len(values)] @ right.T, rank)


def ties(deltas: Sequence[LowRank], weights: Sequence[float], rank: int, density: float = 0.2) -> Merged:
    """TIES: trim each ΔW, elect each number's sign, and take the mean of those that have it.

    Args:
        weights: multiply what has been trimmed; signs are elected without them, by the sum.
        density: share of the largest numbers that is kept, in ``(0, 1]``.
    """

    def trimmed(values: Dense) -> Dense:
        kept: Dense = values.copy()
        cut = values.size - int(density * values.size)
        if cut:
            kept.reshape(-1)[np.argpartition(np.abs(values), cut - 1, axis=None)[:cut]] = 0.0
        return kept

    parts = _dense(deltas, weights, rank, density, trimmed)
    elected = np.where(np.sum(parts, axis=0) >= 0.0, 1.0, -1.0)
    total, count = np.zeros_like(parts[0]), np.zeros_like(parts[0])
    for part, weight in zip(parts, weights, strict=True):
        agrees = np.sign(part) == elected
        total += weight * part * agrees
        count += agrees
    return refactor(total / np.maximum(count, 1.0), rank)


def dare(deltas: Sequence[LowRank], weights: Sequence[float], rank: int, density: float = 0.5, seed: int = 0) -> Merged:
    """DARE: of each ΔW a random share `density`, divided by it so that the mean stays; then the weighted sum."""
    random = np.random.default_rng(seed)
    parts = _dense(
        deltas, weights, rank, density, lambda whole: whole * (random.random(whole.shape) < density) / density
    )
    return refactor(np.tensordot(np.asarray(weights), np.stack(parts), 1), rank)


def refactor(dense: Dense, rank: int) -> Merged:
    """The best delta of at most `rank` for a ΔW ``[out, in]``; a full SVD, seconds for 1,000 by 1,000."""
    u, values, v = np.linalg.svd(dense, full_matrices=False)
    return _cut(u, values, v, rank)


def merge_all(
    adapters: Sequence[Deltas], weights: Sequence[float], rank: int, how: Callable[..., Merged] = merge, **options: Any
) -> dict[str, Merged]:
    """`how` at every site that any of them has; who lacks a site adds nothing there."""
    if len(adapters) != len(weights):
        raise LearningError(f"{len(adapters)} adapters, but {len(weights)} weights")
    found = {}
    for site in dict.fromkeys(site for adapter in adapters for site in adapter):
        having = [(adapter[site], weight) for adapter, weight in zip(adapters, weights, strict=True) if site in adapter]
        found[site] = how([delta for delta, _ in having], [weight for _, weight in having], rank, **options)
    return found


def _cut(left: Dense, values: Dense, right: Dense, rank: int) -> Merged:
    """From ``left · diag(values) · right``, orthonormal on both sides."""
    rank = min(rank, len(values))
    a, b = right[:rank].astype(np.float32, order="C"), (left[:, :rank] * values[:rank]).astype(np.float32, order="C")
    return Merged(LowRank(a, b), float(np.linalg.norm(values[rank:])), float(np.linalg.norm(values)))


def _dense(
    deltas: Sequence[LowRank], weights: Sequence[float], rank: int, density: float, prune: Callable[[Dense], Dense]
) -> list[Dense]:
    _check(deltas, weights, rank)
    if not 0.0 < density <= 1.0:
        raise LearningError(f"a density of {density}", hint="it is the share to keep, above 0 and at most 1")
    wholes = (each.scale * (each.b.astype(np.float64) @ each.a.astype(np.float64)) for each in deltas)
    return [prune(whole) for whole in wholes]


def _check(deltas: Sequence[LowRank], weights: Sequence[float], rank: int) -> None:
    if not deltas or len(deltas) != len(weights) or rank < 1:
        raise LearningError(f"{len(deltas)} deltas with {len(weights)} weights cannot become one of rank {rank}")
    shapes = {(each.b.shape[0], each.a.shape[1]) for each in deltas}
    if len(shapes) > 1:
        raise LearningError(f"deltas of different shapes cannot be merged: {sorted(shapes)}")
    if not all(np.isfinite(weight) for weight in weights):
        raise LearningError(f"weights that are not finite: {list(weights)}")
    if not all(np.isfinite(each.a).all() and np.isfinite(each.b).all() for each in deltas):
        raise LearningError("a delta that is not finite cannot be merged")
