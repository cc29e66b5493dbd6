"""`Borrowed`: what was published for users that another process learns for, to be read and not changed."""

from __future__ import annotations

from pathlib import Path

from ruvllm_core.errors import LearningError
from ruvllm_core.protocols import Adapter
from ruvllm_sona.patterns import SHARED
from ruvllm_sona.versions import Versions


class Borrowed:
    """The adapters of the shared pattern; without previews, which are only in the other process's memory."""

    def __init__(self) -> None:
        self._found: dict[Path, tuple[Versions, int, Adapter | None]] = {}

    def adapter(self, folder: Path) -> Adapter | None:
        """Of the version that is in force now; the same object until another one is. None is the base model."""
        try:
            versions, number, adapter = self._found.get(folder, (None, -1, None))
            versions = versions or Versions(folder / "versions" / f"{SHARED:04d}")
            if (now := versions.current) != number:
                adapter = Adapter(f"{folder.name[-32:]}.{SHARED}.{now}", versions.load(now)) if now else None
                self._found[folder] = versions, now, adapter
            return adapter
        except LearningError:  # deleted between two looks, or damaged; its owner says so
            return None
