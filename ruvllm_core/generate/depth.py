"""How many tokens to draft: what measured costs and acceptance say is fastest, and none if that is plain decoding."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

_NEWEST = 0.2  # weight of the newest measurement in a running mean
_OUTLIER = 1.5  # a measurement counts as at most so many times what was expected
_SLOPE = 0.15  # what a token adds to a step before any other size was measured, relative to that step
_PRIOR = 0.7, 4  # acceptance to start from, as if so many tokens had been judged
_GAIN = 1.05  # how many times as fast drafts must be expected to be
_MEMORY = 20  # judged tokens that acceptance is a running mean of
_TRIAL = 2  # tokens drafted to see whether it pays by now
_PAUSES = (8, 64)  # steps to the next trial: after the first, and at most
# Steps that a draft is taken to save at first, and the weight of the newest measurement of it; the weight of the newest
# judgement in what is thought of a proposer that says how likely its tokens are.
_SAVED, _SLOW, _TRUST = 0.15, 0.02, 0.05

Array = npt.NDArray[np.float64]


def mean(old: float, new: float) -> float:
    """A running mean, which a single slow measurement hardly moves; an `old` of 0 is none."""
    return old + _NEWEST * (min(new, _OUTLIER * old) - old) if old else new


class Costs:
    """Running means of the seconds that steps take, by their tokens.

    Called with numbers of tokens it estimates them, linearly between those that were measured and beyond.
    """

    def __init__(self) -> None:
        self.seconds: dict[int, float] = {}

    def add(self, tokens: int, seconds: float) -> None:
        """A step of `tokens` has taken so long."""
        if tokens not in self.seconds and self.seconds:
            seconds = min(seconds, _OUTLIER * float(self(np.array([tokens]))[0]) or seconds)
        self.seconds[tokens] = mean(self.seconds.get(tokens, 0.0), seconds)

    def __call__(self, tokens: npt.NDArray[np.int64]) -> Array:
        known = sorted(self.seconds)
        costs, end = [self.seconds[size] for size in known], int(tokens[-1]) + known[-1]
        rise = (costs[-1] - costs[0]) / (known[-1] - known[0]) if len(known) > 1 else _SLOPE * costs[0]
        return np.interp(tokens, [*known, end], [*costs, costs[-1] + max(rise, 0.0) * (end - known[-1])])


class Depth:
    """How many tokens to draft for one request. What does not pay is tried again after pauses that get longer.

    Attributes:
        best: what was chosen last; None if there is something to choose by that was not known then.
    """

    def __init__(self) -> None:
        self.best: int | None = None
        self._rate, self._judged = _PRIOR
        self._wait, self._pause, self._trust, self._saved = 0, 0, 1.0, _SAVED

    def choose(self, costs: Array) -> int:
        """The depth with the most tokens a second, or 0; `costs` ``[1 + most]`` are seconds by depth."""
        depths = np.arange(len(costs))
        self.best = _worthwhile(costs / np.cumsum(self._rate**depths))
        if not self.best and self._pause:
            self.best = min(_TRIAL, _worthwhile(costs / (1 + depths)))
        elif not self.best:
            self._wait = self._pause = _PAUSES[0]
        return self.best

    def learn(self, proposed: int, accepted: int) -> None:
        """After a step: of `proposed` tokens so many were right."""
        if not proposed:
            self._wait -= 1
            self.best = None if self._wait == 0 else self.best
            return
        judged = accepted + (accepted < proposed)
        self._judged = min(self._judged + judged, max(_MEMORY, judged))
        self._rate += (accepted - judged * self._rate) / self._judged
        self.best = None
        if self._pause and accepted == proposed:
            (self._rate, self._judged), self._pause = _PRIOR, 0
        elif self._pause:
            self._wait = self._pause = min(2 * self._pause, _PAUSES[1])
            self.best = 0

    def cut(self, likely: Sequence[float], costs: Sequence[float]) -> int:
        """How many drafted tokens to compute: one more as long as that is expected to take less seconds a token.

        Whether one is computed depends on none that comes after it, as what is drawn would otherwise depend on it.
        """
        tokens = chance = 1.0
        for n, p in enumerate(likely):
            chance *= min(self._trust * p, 1.0)
            if costs[n + 1] * tokens > costs[n] * (tokens + chance):
                return n
            tokens += chance
        return len(likely)

    def judge(self, likely: Sequence[float], accepted: int, costs: Sequence[float], proposing: float) -> None:
        """After a step with a draft, maybe an empty one, of a proposer that knows how likely its tokens are."""
        self.best = None
        for n, p in enumerate(likely[: accepted + 1]):
            self._trust += _TRUST * ((n < accepted) - min(self._trust * p, 1.0))
        saved = accepted - (costs[len(likely)] - costs[0] + proposing) / (costs[0] or 1.0)
        self._saved += _SLOW * (max(saved, -1.0) - self._saved)
        if self._saved < 0.0:
            self._wait = self._pause = min(2 * self._pause or _PAUSES[0], _PAUSES[1])
            self.best, self._saved = 0, _SAVED / 4


def _worthwhile(seconds: Array) -> int:
    """The depth with the least seconds a token, the last of several; 0 if that is hardly less than without drafts."""
    best = int(len(seconds) - 1 - np.argmin(seconds[::-1]))
    return best if seconds[best] * _GAIN <= seconds[0] else 0
