"""How often a user's drafts were right: a file that only grows, a line of JSON for so many answers."""

from __future__ import annotations

import contextlib
import json
import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from ruvllm_core.generate.request import SpeculationStats
from ruvllm_sona.files import append_whole, read_bytes, refused

_EVERY = 25  # answers to a line


@dataclass(frozen=True)
class Tally:
    """Some answers in a row.

    Attributes:
        time: of the last of them, seconds since 1970.
        answers: that had drafts.
        proposed, accepted: tokens drafted, and those of them that were right.
    """

    time: float
    answers: int
    proposed: int
    accepted: int


class Acceptance:
    """Counts what came of one user's drafts, and writes it down every 25 answers, or when told to."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._answers = self._proposed = self._accepted = 0

    def add(self, stats: SpeculationStats | None) -> None:
        """Count an answer, if anything was drafted for it. Raises `LearningError` if the disk refuses."""
        if stats is None or not stats.proposed:
            return
        self._answers += 1
        self._proposed += stats.proposed
        self._accepted += stats.accepted
        if self._answers >= _EVERY:
            self.write()

    def write(self) -> None:
        """Put what was counted since the last line into one. Raises `LearningError` if the disk refuses."""
        if not self._answers:
            return
        tally = Tally(time.time(), self._answers, self._proposed, self._accepted)
        self._answers = self._proposed = self._accepted = 0
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            fd = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        except OSError as error:
            raise refused("open", self._path, error) from error
        try:
            # The newline comes first: what a killed process left unfinished ends there.
            append_whole(fd, b"\n" + json.dumps(asdict(tally)).encode(), os.fstat(fd).st_size, self._path)
        finally:
            os.close(fd)


def read_acceptance(path: Path) -> list[Tally]:
    """All lines that are whole, oldest first; none without a file. Raises `LearningError` if it cannot be read."""
    found = []
    for line in read_bytes(path).split(b"\n") if path.exists() else ():
        with contextlib.suppress(ValueError, TypeError):
            found.append(Tally(**json.loads(line)))
    return found
