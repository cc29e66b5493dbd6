"""Whether feedback depends on what a prompt is about: where it is worse, and how sure that is."""

from __future__ import annotations

import math
from collections.abc import Generator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ruvllm_core.protocols import FloatArray
from ruvllm_sona.kmeans import Vectors, parts_of

Flags = npt.NDArray[np.bool_]


@dataclass(frozen=True, eq=False)
class Worse:
    """A part of the prompts with worse feedback.

    Attributes:
        part: which, bool ``[n]``.
        chance: a bound on the probability of such a difference if feedback did not depend on the prompt.
    """

    part: Flags
    chance: float


def find_worse(
    states: Vectors, values: FloatArray, least: int, rng: np.random.Generator
) -> Generator[None, None, Worse | None]:
    """The part of `states` ``[n, C]`` with the lowest `values` ``[n]``, at least `least` on either side.

    Clusters of states are too impure to find it by: whoever dislikes short poems dislikes a few of each. So the
    direction comes from the values: states on its low side are where feedback is worse. It is chosen on one half of
    the data and judged on the other, where it owes nothing to chance; then the halves change places. None if there is
    no such part in either half.
    """
    n = len(states)
    if n < 4 * least:
        return None
    order = rng.permutation(n)
    chances = []
    for fitted, judged in ((order[::2], order[1::2]), (order[1::2], order[::2])):
        scores, threshold = yield from _direction(states, values, fitted, least)
        part = scores[judged] < threshold
        chances.append(chance_of_gap(values[judged], part) if part.any() else 1.0)
    scores, threshold = yield from _direction(states, values, order, least)
    part = scores < threshold
    if min(chances) == 1.0 or not least <= part.sum() <= n - least:
        return None
    return Worse(part, min(2.0 * min(chances), 1.0))


def _direction(
    states: Vectors, values: FloatArray, fitted: npt.NDArray[np.int64], least: int
) -> Generator[None, None, tuple[FloatArray, float]]:
    """A score for each state, and the score below which `values` are worse, both from the rows `fitted`.

    The direction is the covariance of states and values. A fitted row is scored by the others, without its own share.
    """
    centred = np.zeros(len(states), np.float32)
    centred[fitted] = values[fitted] - values[fitted].mean()
    weights = np.zeros(states.shape[1], np.float32)
    chosen = centred != 0
    for part in parts_of(states):
        weights += centred[part] @ np.asarray(states[part], np.float32)
        yield
    scores, own = np.zeros(len(states), np.float32), np.zeros(len(states), np.float32)
    for part in parts_of(states):
        rows = np.asarray(states[part], np.float32)
        scores[part], own[part] = rows @ weights, np.einsum("nc,nc->n", rows, rows)
        yield
    scores -= np.where(chosen, centred * own, 0)
    rank = fitted[np.argsort(scores[fitted], kind="stable")]
    count = np.arange(1, len(rank))
    gaps = -np.cumsum(centred[rank])[:-1] / count  # mean of all, which is 0, less that of the lowest so many
    strength = np.where(gaps > 0, count * np.square(gaps) / (1 - (count - 1) / len(rank)), 0)
    half = max(least // 2, 1)
    strength[: half - 1], strength[len(rank) - half :] = 0, 0
    best = int(strength.argmax())
    if strength[best] <= 0:
        return scores, -math.inf
    return scores, float(scores[rank[best]] + scores[rank[best + 1]]) / 2


def chance_of_gap(values: FloatArray, part: Flags) -> float:
    """The probability that a part, drawn at random, has as many of the `values` below their mean as it has.

    Fisher's exact test, one-sided: the tail of the hypergeometric distribution. It holds for any values, and any number
    of them.
    """
    low = values < values.mean()
    total, bad, count = len(values), int(low.sum()), int(part.sum())
    least, most = max(int(low[part].sum()), count - (total - bad)), min(count, bad)
    every = _log_ways(total, count)
    logs = [_log_ways(bad, hit) + _log_ways(total - bad, count - hit) - every for hit in range(least, most + 1)]
    return min(sum(map(math.exp, logs)), 1.0)


def _log_ways(n: int, k: int) -> float:
    """Logarithm of n choose k; the numbers themselves have hundreds of digits."""
    return math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)
