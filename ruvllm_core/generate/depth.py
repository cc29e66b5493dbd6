"""How many tokens to draft: what measured costs and acceptance say is fastest, and none if that is plain decoding."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

_NEWEST = 0.2  # weight of the newest measurement in a running mean
_OUTLIER = 1.5  # a measurement counts as at most so many times what was expected
_SLOPE = 0.15  # what a token adds to a step before any other size was measured, relative to that step
_PRIOR = 0.8  # acceptance to start from
_WEIGHT = 0.1  # of the newest token in the running mean of acceptance
_TRIAL = 2  # tokens drafted to see whether it pays by now
_PAUSES = (8, 64)  # steps to the next trial: after the first, and at most

Array = npt.NDArray[np.float64]


class Costs:
    """Running means of the seconds that work takes, by its size.

    Called with sizes it estimates them, linearly between sizes that are known and beyond; at least one has to be.

    Args:
        seconds: what is known from the start.
    """

    def __init__(self, seconds: Mapping[int, float]) -> None:
        self.seconds = dict(seconds)

    def add(self, size: int, seconds: float) -> None:
        """Work of `size` has taken so long."""
        mean = float(self(np.array([size]))[0]) if self.seconds else seconds
        change = (min(seconds, _OUTLIER * mean) if mean else seconds) - mean
        self.seconds[size] = mean + change * (_NEWEST if size in self.seconds else 1.0)

    def __call__(self, sizes: npt.NDArray[np.int64]) -> Array:
        known = sorted(self.seconds)
        costs, end = [self.seconds[size] for size in known], int(sizes[-1]) + known[-1]
        rise = (costs[-1] - costs[0]) / (known[-1] - known[0]) if len(known) > 1 else _SLOPE * costs[0]
        return np.interp(sizes, [*known, end], [*costs, costs[-1] + max(rise, 0.0) * (end - known[-1])])


class Depth:
    """How many tokens to draft for one request. What does not pay is tried again after pauses that get longer."""

    def __init__(self) -> None:
        self._rate = _PRIOR
        self._pausing, self._wait, self._pause = False, 0, _PAUSES[0]

    @property
    def waiting(self) -> bool:
        """Whether nothing is to be drafted now, whatever it costs."""
        return self._wait > 0

    def choose(self, costs: Array) -> int:
        """The depth with the most tokens a second, or 0; `costs` ``[1 + most]`` are seconds by depth."""
        depths = np.arange(len(costs))
        best = _last_least(costs / np.cumsum(self._rate**depths))
        if best or self._pausing:
            return best or min(_TRIAL, _last_least(costs / (1 + depths)))
        self._pausing, self._wait = True, self._pause
        return 0

    def learn(self, proposed: int, accepted: int) -> None:
        """After a step: of `proposed` tokens so many were right."""
        if not proposed:
            self._wait = max(0, self._wait - 1)
            return
        self._rate = 1 - (1 - self._rate) * (1 - _WEIGHT) ** accepted
        if accepted < proposed:
            self._rate *= 1 - _WEIGHT
        if self._pausing and accepted == proposed:
            self._rate, self._pausing, self._pause = _PRIOR, False, _PAUSES[0]
        elif self._pausing:
            self._wait = self._pause = min(2 * self._pause, _PAUSES[1])


def _last_least(values: Array) -> int:
    return int(len(values) - 1 - np.argmin(values[::-1]))
