"""EWC++: keeping what was learned (Kirkpatrick et al., arXiv 1612.00796; RWalk, Chaudhry et al., arXiv 1801.10112).

What is kept is the product ``ΔW = s·B·A`` and not its factors: (A, B) and (R A, B R⁻¹) are one model, which a penalty
on the factors would judge differently. The Fisher information of ΔW is held per site as ``F_ij = u_i v_j``, and
nothing here is ever as large as ΔW.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from ruvllm_core.errors import LearningError
from ruvllm_core.protocols import LowRank
from ruvllm_sona.sites import Deltas

Array = npt.NDArray[np.floating[Any]]
Vector = npt.NDArray[np.float64]

#: By type: directions of a factor this much shorter than its longest, squared, are rounding and next to nothing of ΔW.
_ROUNDING = {"f": 1e-6, "d": 1e-13}


@dataclass(frozen=True, eq=False)
class Fisher:
    """Diagonal Fisher information of each site's ΔW ``[out, in]``, of rank one.

    Attributes:
        sites: u ``[out]`` and v ``[in]`` of ``F_ij = u_i v_j``, float64, not negative, v adding up to 1: so u is F
            summed over inputs, and v each input's share.
    """

    sites: Mapping[str, tuple[Vector, Vector]]

    @classmethod
    def estimate(cls, samples: Mapping[str, tuple[Array, Array]]) -> Fisher:
        """From the model's own answers: per site, gradients ``[n, out]`` and inputs ``[n, in]`` of n tokens.

        A gradient is that of the answer's log-probability, with labels drawn from the model itself, with respect to
        the site's output at that token, and never weighted by how good the answer was. ``F_ij`` is the mean over tokens
        of ``g_i² x_j²``: the square of each token's gradient and not of their sum. Its sums over rows and over columns
        are exact, what is between them is their product.

        Raises:
            LearningError: no tokens, shapes that do not fit, or numbers that are not finite.
        """
        found = {}
        for site, (gradients, inputs) in samples.items():
            if gradients.ndim != 2 or inputs.ndim != 2 or len(gradients) != len(inputs) or not len(inputs):
                raise LearningError(
                    f"{site}: gradients {gradients.shape} and inputs {inputs.shape} are not of n tokens"
                )
            g, x = gradients.astype(np.float64) ** 2, inputs.astype(np.float64) ** 2
            u, v = x.sum(1) @ g / len(g), g.sum(1) @ x / len(g)
            if not np.isfinite(u.sum() + v.sum()):
                raise LearningError(f"{site}: gradients or inputs are not finite")
            found[site] = u, _shares(v)
        return cls(found)

    def averaged(self, now: Fisher, weight: float) -> Fisher:
        """The moving average ``weight · now + (1 − weight) · self`` of EWC++; its sums stay exact."""
        return self._mixed(now, 1.0 - weight, weight)

    def plus(self, other: Fisher) -> Fisher:
        """The sum, for anchors that hold one task after another."""
        return self._mixed(other, 1.0, 1.0)

    def _mixed(self, other: Fisher, mine: float, theirs: float) -> Fisher:
        if self.sites.keys() != other.sites.keys():
            raise LearningError(f"Fisher information of other sites: {sorted(self.sites.keys() ^ other.sites.keys())}")
        found = {}
        for site, (u, v) in self.sites.items():
            u2, v2 = other.sites[site]
            if u.shape != u2.shape or v.shape != v2.shape:
                raise LearningError(
                    f"{site}: Fisher information of shapes {u.shape}, {v.shape} and {u2.shape}, {v2.shape}"
                )
            columns = mine * u.sum() * v + theirs * u2.sum() * v2
            found[site] = mine * u + theirs * u2, _shares(columns)
        return Fisher(found)


@dataclass(frozen=True, eq=False)
class Side:
    """One factor of what is held, as long rows ``[r, n]``: NumPy is slow on arrays that are two wide.

    Attributes:
        factor: ``[r, n]``.
        most, scaled: the largest number of its half of the Fisher information, and all of them ``[n]`` divided by it.
    """

    factor: Array
    most: float
    scaled: Array

    @classmethod
    def of(cls, factor: Array, weights: Vector) -> Side:
        held, most = np.ascontiguousarray(factor), float(weights.max())
        return cls(held, most, (weights / most if most > 0.0 else weights).astype(held.dtype))


@dataclass(frozen=True, eq=False)
class Anchor:
    """What must not be forgotten: deltas as they were, and how much each of their numbers matters.

    Sites without Fisher information are free. Raises `LearningError` if one with it is not among `deltas`, or has other
    shapes.
    """

    deltas: Deltas
    fisher: Fisher

    def __post_init__(self) -> None:
        for site, (u, v) in self.fisher.sites.items():
            if site not in self.deltas:
                raise LearningError(f"there is Fisher information of {site}, but no delta")
            _check(site, self.deltas[site], u, v)

    @cached_property
    def holds(self) -> dict[str, tuple[Side, Side]]:
        """What `prox_site` needs of each site with Fisher information, worked out once."""
        found = {}
        for site, (u, v) in self.fisher.sites.items():
            target = self.deltas[site]
            # Both scales go into the targets, so that B A is held to B* A*.
            found[site] = Side.of(target.a, v), Side.of(target.b.T * target.b.dtype.type(target.scale), u)
        return found

    def consolidated(self, deltas: Deltas, fisher: Fisher) -> Anchor:
        """The anchor after another task: at where the deltas are now, with all Fisher information so far."""
        return Anchor(deltas, self.fisher.plus(fisher))


def penalty(deltas: Deltas, anchor: Anchor) -> float:
    """``½ Σ F_ij (ΔW_ij − ΔW*_ij)²`` over all sites of the anchor, exactly, through Gram matrices of the factors."""
    total = 0.0
    for site, target, (u, v) in _each(deltas, anchor):
        delta = deltas[site]
        a = np.concatenate([delta.a, target.a]).astype(np.float64)
        b = np.concatenate([delta.b * np.float64(delta.scale), target.b * -np.float64(target.scale)], axis=1)
        total += 0.5 * float((((b.T * u) @ b) * ((a * v) @ a.T)).sum())
    return total


def prox(deltas: Deltas, anchor: Anchor, strength: float, sweeps: int = 1) -> dict[str, LowRank]:
    """The proximal step of the penalty: deltas near the given ones and near the anchor.

    Lowers ``½‖A − A⁰‖² + ½‖B − B⁰‖² + strength · penalty`` by solving exactly for B and then for A, `sweeps` times.
    Neither solution can raise it, so no strength is too large: with an endless one ΔW is the anchor's. Sites that the
    anchor does not hold stay as they are.

    Args:
        strength: learning rate times λ, not negative.
        sweeps: 1 is enough for a step of learning; more come closer to the minimum.
    """
    if not 0.0 <= strength < np.inf:
        raise LearningError(f"the strength of a proximal step is {strength}, but must be finite and not negative")
    found = dict(deltas)
    if strength:
        for site, _, _ in _each(deltas, anchor):
            found[site] = prox_site(deltas[site], anchor.holds[site], strength, sweeps)
    return found


def prox_site(delta: LowRank, hold: tuple[Side, Side], strength: float, sweeps: int = 1) -> LowRank:
    """`prox` of one site, unchecked; `hold` is one of `Anchor.holds`."""
    hold_a, hold_b = hold
    start_a, start_b = delta.a, delta.b.T.copy()
    a, b = start_a, start_b
    for _ in range(sweeps):
        b = _solve(start_b, a, hold_b, hold_a, delta.scale, strength)
        a = _solve(start_a, b, hold_a, hold_b, delta.scale, strength)
    columns = np.empty_like(delta.b, order="C")
    for index, row in enumerate(b):  # far faster than to copy the transpose
        columns[:, index] = row
    return LowRank(a, columns, delta.scale)


def _solve(start: Array, fixed: Array, mine: Side, other: Side, scale: float, strength: float) -> Array:
    """The factor x of the least ``½‖x − x⁰‖² + ½ strength Σ F_ij (s·xᵀ·fixed − mineᵀ·other)_ij²``, all ``[r, n]``.

    The matrices of all columns have the same eigenvectors, so one small decomposition solves them all: along each of
    those, x goes from x⁰ the part ``kσ/(1 + kσ)`` of the way to where the anchor would have it.
    """
    dtype = start.dtype
    weighted = fixed * other.scaled
    values, vectors = _eigen(scale * scale * (weighted @ fixed.T))
    least = _ROUNDING[dtype.char] * values[-1]
    # Beyond 1e30 nothing changes but the danger of an overflow.
    firm = [min(strength * mine.most * other.most * value, 1e30) if value > least else 0.0 for value in values]
    inverse = [scale / value if value > least else 0.0 for value in values]
    turn = np.array(vectors, dtype)
    anchored = np.array(inverse, dtype)[:, None] * (turn @ (weighted @ other.factor.T))  # [r, r*]
    part = np.array(firm, dtype)[:, None] * mine.scaled
    part /= 1 + part
    part *= anchored @ mine.factor - turn @ start
    found: Array = start + turn.T @ part
    return found.astype(dtype, copy=False)


def _eigen(symmetric: Array) -> tuple[list[float], list[list[float]]]:
    """Eigenvalues, rising, and eigenvectors in rows; for two, by hand, as the library takes longer to be called."""
    rows = symmetric.tolist()
    if len(rows) == 1:
        return rows[0], [[1.0]]
    if len(rows) == 2:
        (first, mixed), (_, second) = rows
        mean, half = 0.5 * (first + second), 0.5 * (first - second)
        distance, angle = math.hypot(half, mixed), 0.5 * math.atan2(mixed, half)
        cosine, sine = math.cos(angle), math.sin(angle)
        return [mean - distance, mean + distance], [[-sine, cosine], [cosine, sine]]
    values, vectors = np.linalg.eigh(symmetric)
    return values.tolist(), vectors.T.tolist()


def _each(deltas: Deltas, anchor: Anchor) -> list[tuple[str, LowRank, tuple[Vector, Vector]]]:
    """The sites of an anchor, checked."""
    found = []
    for site, (u, v) in anchor.fisher.sites.items():
        if site not in deltas:
            raise LearningError(f"an anchor holds {site}, where there is no delta")
        _check(site, deltas[site], u, v)
        found.append((site, anchor.deltas[site], (u, v)))
    return found


def _check(site: str, delta: LowRank, u: Vector, v: Vector) -> None:
    if (delta.b.shape[0], delta.a.shape[1]) != (len(u), len(v)):
        raise LearningError(
            f"{site}: a delta {delta.b.shape[0]} by {delta.a.shape[1]}, Fisher information {len(u)} by {len(v)}"
        )


def _shares(columns: Vector) -> Vector:
    total = columns.sum()
    return columns / total if total > 0.0 else np.full(len(columns), 1.0 / len(columns))
