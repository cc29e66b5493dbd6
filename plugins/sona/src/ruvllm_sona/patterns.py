"""`PatternBank`: which of a user's adapters a prompt gets, and when one wish has to become two.

A bank begins with one pattern, ``shared``, that covers everything: a wish such as "short answers" holds for topics
never seen before, and an adapter that is used for what it has seen only would keep it from them. A part of the prompts
gets a pattern of its own when its feedback is worse than the rest's by more than chance allows. The price is that a
topic which is merely hard may get one, too: that takes feedback from the shared pattern, but changes no answer, since
the new pattern starts as a copy. With `BankConfig.abstain_below` prompts unlike all that there was feedback on get
the base model, which is safe and forgoes that a wish carries over; it is off unless it is asked for.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from ruvllm_core.errors import ConfigError, LearningError
from ruvllm_core.protocols import FloatArray
from ruvllm_sona.contradiction import find_worse
from ruvllm_sona.kmeans import kmeans, unit
from ruvllm_sona.recent import Recent, Snapshot

SHARED = 0  # id of the pattern that covers everything
_EXEMPLARS = 4
_LOOK_AGAIN = 1.25  # times as much feedback: each look takes from the error rate
_PRIOR = 0.5  # baseline before any feedback, worth one feedback


@dataclass(frozen=True)
class BankConfig:
    """How a bank tells prompts apart. Cosines are those of `Pooler` states to centroids of topics.

    Attributes:
        max_patterns: adapters of one user, the shared one among them.
        max_topics: centroids per pattern.
        capacity: feedbacks that are remembered, the latest ones.
        specialise: ``contradiction`` gives a part of the prompts a pattern of its own when its feedback contradicts the
            rest's, ``always`` as soon as there is enough of it, until there are `max_patterns`, ``never`` not at all.
        min_feedback: least feedbacks on either side of a split.
        min_gap: least difference of mean quality that counts as a contradiction.
        error_rate: probability that a bank ever splits although feedback does not depend on the prompt.
        specialise_above: least cosine at which a prompt belongs to a pattern other than the shared one.
        abstain_below: greatest cosine to all topics at which a prompt gets the base model; None is never.
        merge_above: patterns with nearer centroids become one, if their baselines agree.
        maintain_every: feedbacks from one `PatternBank.maintain` to the next.
        baseline_horizon: feedbacks that the running mean of quality looks back.
    """

    max_patterns: int = 8
    max_topics: int = 16
    capacity: int = 2048
    specialise: Literal["contradiction", "always", "never"] = "contradiction"
    min_feedback: int = 8
    min_gap: float = 0.25
    error_rate: float = 0.05
    specialise_above: float = 0.25
    abstain_below: float | None = None
    merge_above: float = 0.85
    maintain_every: int = 16
    baseline_horizon: int = 50
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("max_patterns", "max_topics", "capacity", "min_feedback", "maintain_every", "baseline_horizon"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} of the patterns is {getattr(self, name)}", hint="it has to be at least 1")
        for name in ("specialise_above", "abstain_below", "merge_above"):
            value = getattr(self, name)
            if value is not None and not -1.0 <= value <= 1.0:
                raise ConfigError(f"{name} is {value}, and no cosine is that", hint="set it between -1 and 1")
        if not 0.0 < self.error_rate < 1.0 or not 0.0 <= self.min_gap <= 1.0:
            what = f"error_rate {self.error_rate} and min_gap {self.min_gap} have to be shares of 1"
            raise ConfigError(what, hint="as in 0.05 and 0.25")


@dataclass
class Pattern:
    """Prompts that are answered with one adapter.

    Attributes:
        parent: it was split from this one; None is the shared pattern.
        version: of its adapter; empty is the base model. Whoever publishes sets it.
        fisher: where its Fisher information is kept; empty is nowhere.
        count: feedbacks so far.
        baseline: running mean of their quality; `surprise` is measured from it.
        looks, looked_at: how often its feedback was searched for a contradiction, and its count at the last time.
        exemplars: the latest request ids and their prompts' tokens.
    """

    id: int
    parent: int | None = None
    version: str = ""
    fisher: str = ""
    count: int = 0
    baseline: float = _PRIOR
    looks: int = 0
    looked_at: int = 0
    exemplars: list[tuple[str, tuple[int, ...]]] = field(default_factory=list)


@dataclass(frozen=True)
class Change:
    """What `PatternBank.maintain` did.

    Attributes:
        kind: ``split``: `pattern` is new and starts with the adapter of `other`. ``merge``: `other` is gone, and its
            adapter is to be merged into that of `pattern`.
        share: of a merge, how much of the feedback on both was that on `other`.
    """

    kind: Literal["split", "merge"]
    pattern: int
    other: int
    reason: str
    share: float = 0.0


class PatternBank:
    """The patterns of one user. All calls come from one thread; those between two slices of `maintain` are safe.

    Args:
        size: of a state, C.
    """

    def __init__(self, size: int, config: BankConfig | None = None) -> None:
        self.config = config or BankConfig()
        self.patterns: dict[int, Pattern] = {SHARED: Pattern(SHARED)}
        self._recent = Recent(size, self.config.capacity)
        self._sums, self._owners = np.zeros((0, size), np.float32), np.zeros(0, np.int64)
        self._centroids = self._sums
        self._merged: dict[int, int] = {}
        self._next, self._epoch, self._since = 1, 0, 0
        self._life = object()  # another one after `restore`

    @property
    def due(self) -> bool:
        """Whether there was enough feedback since the last `maintain`."""
        return self._since >= self.config.maintain_every

    def find(self, pattern: int) -> Pattern:
        """The pattern of this id, or the one it was merged into. Raises `LearningError`."""
        while pattern in self._merged:
            pattern = self._merged[pattern]
        if pattern not in self.patterns:
            known = ", ".join(map(str, self.patterns))
            raise LearningError(f"there is no pattern {pattern}", hint=f"known: {known}")
        return self.patterns[pattern]

    def nearest(self, state: FloatArray) -> tuple[float, int]:
        """Cosine of the nearest topic and the id of its pattern; -1 and the shared one before any feedback."""
        if not len(self._owners):
            return -1.0, SHARED
        cosines = self._centroids @ state
        best = int(cosines.argmax())
        return float(cosines[best]), int(self._owners[best])

    def route(self, state: FloatArray) -> Pattern | None:
        """The pattern that answers a prompt with this state, float32 ``[C]`` of norm 1 or 0; None is the base model."""
        cosine, owner = self.nearest(state)
        if self.config.abstain_below is not None and cosine < self.config.abstain_below:
            return None
        return self.patterns[owner if cosine >= self.config.specialise_above else SHARED]

    def learn(
        self, request_id: str, state: FloatArray, quality: float, pattern: int, prompt: tuple[int, ...] = ()
    ) -> float:
        """Feedback in ``[0, 1]`` on an answer that was given with `pattern`; returns how far it is from the baseline.

        Raises `LearningError` for a pattern that never was, a state of another size, and what is not finite.
        """
        found = self.find(pattern)
        if state.shape != (self._sums.shape[1],) or not np.isfinite(state).all():
            raise LearningError(f"the state of {request_id} is not {self._sums.shape[1]} finite numbers")
        if not 0.0 <= quality <= 1.0:
            raise LearningError(f"the quality of {request_id} is {quality}", hint="it goes from 0 to 1")
        surprise = quality - found.baseline
        found.count += 1
        found.baseline += surprise / min(found.count + 1, self.config.baseline_horizon)
        found.exemplars = [*found.exemplars, (request_id, prompt)][-_EXEMPLARS:]
        if state.any():  # nothing was written: nothing to tell prompts apart by
            self._recent.add(state, quality, surprise, found.id)
            self._join_topic(state, found.id)
        self._since += 1
        return surprise

    def maintain(self) -> Generator[None, None, list[Change]]:
        """Find contradictions and new topics among the latest feedback; yields every few milliseconds.

        Whoever closes it half-way loses what the rest would have done; the next one starts over.
        """
        self._epoch, self._since = self._epoch + 1, 0
        rng, life = np.random.default_rng([self.config.seed, self._epoch]), self._life
        changes: list[Change] = []
        for pattern in list(self.patterns.values()):
            seen = yield from self._recent.snapshot(pattern.id)
            part = yield from self._contradiction(pattern, seen, rng)
            if life is not self._life:
                return []
            if part is not None:
                changes.append(self._split(pattern, seen, *part))
        for pattern in list(self.patterns.values()):
            seen = yield from self._recent.snapshot(pattern.id)
            if not len(seen.states):
                continue
            found = yield from kmeans(seen.states, self._topics(len(seen.states)), rng)
            if life is not self._life:
                return []
            others = self._owners != pattern.id
            owners = np.r_[self._owners[others], np.full(len(found.sums), pattern.id)]
            self._set_topics(np.r_[self._sums[others], found.sums], owners)
        return changes + self._merge()

    def _topics(self, count: int) -> int:
        """How many topics so many feedbacks are put into."""
        return min(self.config.max_topics, math.ceil(math.sqrt(count / 2)))

    def _join_topic(self, state: FloatArray, owner: int) -> None:
        """Until the next `maintain`: a new topic while there is room and the state is unlike all, else the nearest."""
        own = np.flatnonzero(self._owners == owner)
        cosines = self._centroids[own] @ state
        alike = len(own) and cosines.max() >= self.config.specialise_above
        if len(own) and (alike or len(own) >= self._topics(self._recent.count(owner))):
            nearest = own[cosines.argmax()]
            sums = self._sums.copy()
            sums[nearest] += state
            self._set_topics(sums, self._owners)
        else:
            self._set_topics(np.r_[self._sums, state[None]], np.r_[self._owners, owner])

    def _set_topics(self, sums: FloatArray, owners: npt.NDArray[np.int64]) -> None:
        self._sums, self._owners, self._centroids = sums, owners, unit(sums)

    def _contradiction(
        self, pattern: Pattern, seen: Snapshot, rng: np.random.Generator
    ) -> Generator[None, None, tuple[npt.NDArray[np.bool_], str] | None]:
        """Which of the rows seen are to have a pattern of their own, and why."""
        config, n = self.config, len(seen.states)
        if config.specialise == "never" or len(self.patterns) >= config.max_patterns or n < 2 * config.min_feedback:
            return None
        if config.specialise == "always":
            found = yield from kmeans(seen.states, config.max_patterns - len(self.patterns) + 1, rng)
            parts = [found.labels == one for one in range(len(found.sums))]
            parts = [part for part in parts if config.min_feedback <= part.sum() <= n - config.min_feedback]
            largest = max(parts, key=lambda part: int(part.sum()), default=None)
            return None if largest is None else (largest, f"{largest.sum()} feedbacks on one topic")
        if pattern.count < _LOOK_AGAIN * pattern.looked_at:
            return None
        pattern.looks, pattern.looked_at = pattern.looks + 1, pattern.count
        # All looks together err with a probability of error_rate at most: the shares 1 / (j (j + 1)) add up to 1.
        allowed = config.error_rate / (pattern.looks * (pattern.looks + 1))
        worse = yield from find_worse(seen.states, seen.surprise, config.min_feedback, rng)
        if worse is None or worse.chance > allowed:
            return None
        gap = float(seen.quality[~worse.part].mean() - seen.quality[worse.part].mean())
        if gap < config.min_gap:
            return None
        count, chance = int(worse.part.sum()), worse.chance
        return worse.part, f"{count} of {n} feedbacks are worse than the rest by {gap:.2f}, by chance p ≤ {chance:.1e}"

    def _split(self, pattern: Pattern, seen: Snapshot, part: npt.NDArray[np.bool_], reason: str) -> Change:
        child = Pattern(self._next, pattern.id, pattern.version, pattern.fisher, int(part.sum()))
        child.baseline, self._next = float(seen.quality[part].mean()), self._next + 1
        self.patterns[child.id] = child
        self._recent.give(seen, part, child.id)
        return Change("split", child.id, pattern.id, reason)

    def _merge(self) -> list[Change]:
        """Join the patterns that have grown into one, the smaller into the larger."""
        changes = []
        special = sorted((p for p in self.patterns.values() if p.id != SHARED), key=lambda p: -p.count)
        centroids = {p.id: unit(self._sums[self._owners == p.id].sum(axis=0)[None])[0] for p in special}
        for i, large in enumerate(special):
            for small in special[i + 1 :]:
                cosine = float(centroids[large.id] @ centroids[small.id])
                apart = abs(large.baseline - small.baseline)
                both = large.id in self.patterns and small.id in self.patterns
                if both and cosine >= self.config.merge_above and apart < self.config.min_gap:
                    self._owners = np.where(self._owners == small.id, large.id, self._owners)
                    self._recent.rename(small.id, large.id)
                    total = large.count + small.count
                    large.baseline += (small.baseline - large.baseline) * small.count / max(total, 1)
                    large.count, self._merged[small.id] = total, large.id
                    del self.patterns[small.id]
                    alike, share = f"their prompts are alike: cosine {cosine:.2f}", small.count / max(total, 1)
                    changes.append(Change("merge", large.id, small.id, alike, share))
        return changes

    def state(self) -> tuple[dict[str, npt.NDArray[Any]], dict[str, Any]]:
        """All of it: arrays, and what JSON can hold. `restore` makes the same bank of it, bit for bit."""
        arrays = self._recent.state() | {"topic_sums": self._sums.copy(), "topic_owners": self._owners.copy()}
        numbers = {"next": self._next, "epoch": self._epoch, "since": self._since}
        merged = [[gone, kept] for gone, kept in self._merged.items()]
        return arrays, {"patterns": [asdict(p) for p in self.patterns.values()], "merged": merged, **numbers}

    def restore(self, arrays: Mapping[str, npt.NDArray[Any]], meta: Mapping[str, Any]) -> None:
        """Become what `state` was taken of; a `maintain` that is under way ends. Raises `LearningError`."""
        try:
            patterns = {}
            for values in meta["patterns"]:
                exemplars = [(name, tuple(tokens)) for name, tokens in values["exemplars"]]
                patterns[values["id"]] = Pattern(**{**values, "exemplars": exemplars})
            merged = dict(meta["merged"])
            next_id, epoch, since = meta["next"], meta["epoch"], meta["since"]
            sums, owners = np.array(arrays["topic_sums"]), np.array(arrays["topic_owners"])
            recent = Recent.restored(arrays, self._sums.shape[1], self.config.capacity)
        except (KeyError, TypeError, ValueError) as error:
            what = f"the saved patterns cannot be read: {type(error).__name__} {error}"
            raise LearningError(what, hint="roll back to an older state") from None
        if SHARED not in patterns or sums.shape != (len(owners), self._sums.shape[1]) or set(owners) - set(patterns):
            raise LearningError("the saved patterns contradict themselves", hint="roll back to an older state")
        self.patterns, self._merged, self._recent, self._life = patterns, merged, recent, object()
        self._next, self._epoch, self._since = next_id, epoch, since
        self._set_topics(sums, owners)
