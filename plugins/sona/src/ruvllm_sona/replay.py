"""`Replay`: earlier answers that are learned from once more."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable

import numpy as np

from ruvllm_sona.records import Example

KEPT = 256  # answers of a pattern, the latest ones


class Replay:
    """The latest rated answers of one pattern of prompts."""

    def __init__(self, examples: Iterable[Example] = ()) -> None:
        self._kept = deque(examples, maxlen=KEPT)

    def add(self, example: Example) -> None:
        """Has been learned from."""
        self._kept.append(example)

    def other(self, example: Example, baseline: float) -> Example | None:
        """An answer on the other side of the baseline, or None: what is rare is seen as often as what is not.

        Which one depends on `example.sequence` and on what is kept, and on nothing else.
        """
        side = example.quality - baseline
        found = [one for one in self._kept if (one.quality - baseline) * side < 0]
        return found[int(np.random.default_rng(example.sequence).integers(len(found)))] if found else None
