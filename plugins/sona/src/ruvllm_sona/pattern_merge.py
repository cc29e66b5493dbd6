"""The adapters that all patterns of a user run with, merged into one, for programs that know one adapter only."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

from ruvllm_core.errors import LearningError
from ruvllm_sona.merge import Merged, dare, merge, merge_all, ties
from ruvllm_sona.sites import Deltas

if TYPE_CHECKING:
    from ruvllm_sona.command_place import Place

How = Literal["exact", "ties", "dare"]
RANK = 64  # of what is left of TIES and DARE, which have no rank of their own


@dataclass(frozen=True, eq=False)
class MergedPatterns:
    """One adapter for several.

    Attributes:
        versions: that were merged, by pattern; 0 is the base model.
        cut: share of the merged change (Frobenius norm) that its rank has no room for.
    """

    deltas: Deltas
    versions: Mapping[int, int]
    how: How
    cut: float

    def __str__(self) -> str:
        names = ", ".join(f"{pattern} (version {number})" for pattern, number in self.versions.items())
        return f"patterns {names} merged, {self.how}, {self.cut:.1%} cut off"


def merge_patterns(place: Place, how: How, rank: int | None = None) -> MergedPatterns:
    """Merge the versions in force of all patterns, each for its share of the feedback on all of them.

    ``exact`` is Σ s_p ΔW_p with the shares s, ``dare`` the same sum of what it has pruned. ``ties`` is the mean of
    those that agree, where a pattern counts its share times the number of patterns.

    Args:
        rank: of the result at most; None is whatever an exact sum needs, and 64 for the others.

    Raises `LearningError` if there is one pattern only, or none has learned anything.
    """
    counts = {pattern.id: pattern.count for pattern in place.bank().patterns.values() if pattern.id in place.patterns()}
    found = [place.versions(pattern) for pattern in counts]
    versions = {pattern: one.current for pattern, one in zip(counts, found, strict=True)}
    if len(versions) == 1:
        raise LearningError(f"{place.whose} has one pattern only", hint="leave --patterns out")
    if not any(versions.values()):
        raise LearningError(f"no pattern of {place.whose} has learned anything: there is nothing to merge")
    adapters = [one.load(one.current) for one in found]
    total = max(sum(counts.values()), 1)
    shares = [count / total for count in counts.values()]
    merged: dict[str, Merged]
    if how == "exact":
        whole = sum(max((len(one.a) for one in adapter.values()), default=0) for adapter in adapters)
        merged = merge_all(adapters, shares, rank or whole, merge)
    elif how == "ties":
        merged = merge_all(adapters, [share * len(shares) for share in shares], rank or RANK, ties)
    else:
        merged = merge_all(adapters, shares, rank or RANK, dare)
    norm = float(np.linalg.norm([one.norm for one in merged.values()]))
    cut = float(np.linalg.norm([one.error for one in merged.values()])) / norm if norm else 0.0
    return MergedPatterns({site: one.delta for site, one in merged.items()}, versions, how, cut)
