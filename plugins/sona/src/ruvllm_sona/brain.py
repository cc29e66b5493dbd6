"""`Brain`: what one pattern of one user has learned, and the adapter that its requests run with."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ruvllm_core.decode.lora import FINAL_SITE, combine
from ruvllm_core.errors import LearningError
from ruvllm_core.protocols import Adapter, FloatArray, LowRank
from ruvllm_sona.gate import Backoff
from ruvllm_sona.micro import MicroLoRA
from ruvllm_sona.micro_config import MicroLoRAConfig
from ruvllm_sona.records import Example
from ruvllm_sona.settings import SonaSettings
from ruvllm_sona.sites import Deltas, linear_sites
from ruvllm_sona.versions import Versions

if TYPE_CHECKING:
    from ruvllm_core.model.spec import ModelSpec
    from ruvllm_sona.learner import Learner


class Brain:
    """The published version, the final-site preview on top of it, and the learner that makes the next version.

    Attributes:
        versions: what was published.
        micro: the preview; it forgets when a version that has learned the same is published.
        pending: rated answers to learn from, with how much better each was than expected.
        covers: sequence of the last feedback in the log that the published version has learned from.
        backoff: smaller steps after rejections.
    """

    def __init__(self, folder: Path, name: str, spec: ModelSpec, settings: SonaSettings) -> None:
        self.name = name
        self._spec, self._settings = spec, settings
        self.versions = Versions(folder, settings.keep_versions)
        self.micro = self._new_micro()
        self.pending: deque[tuple[Example, float]] = deque()
        self.covers = 0
        self.backoff = Backoff()
        self._published = self.versions.load(self.number)
        self._below: Deltas = self._published
        self._learner: Learner | None = None
        self._saved: Mapping[str, FloatArray] | None = None
        self._adapter: Adapter | None = None

    @property
    def number(self) -> int:
        """The version in force; 0 is the base model."""
        return self.versions.current

    @property
    def version(self) -> str:
        """Of `adapter`; empty while it is the base model."""
        return adapter.version if (adapter := self.adapter()) is not None else ""

    def adapter(self) -> Adapter | None:
        """What a request runs with, None for the base model; the same object until something changes."""
        preview = self.micro.current
        version = f"{self.name}.{self.number}"
        sites = dict(self._published)
        if np.any(preview.b):
            version += f"+{self.micro.version}"
            sites[FINAL_SITE] = preview
        if not sites:
            return None
        if self._adapter is None or self._adapter.version != version:
            self._adapter = Adapter(version, sites)
        return self._adapter

    @property
    def learner(self) -> Learner:
        """Made when first needed: it brings PyTorch."""
        if self._learner is None:
            from ruvllm_sona.learner import Learner, LearnerConfig
            from ruvllm_sona.objective import ObjectiveConfig

            own = self._settings
            objective = ObjectiveConfig(own.leash, own.saturation, own.budget)
            config = LearnerConfig(own.rank, own.learning_rate, objective)
            self._learner = Learner(linear_sites(self._spec), config, below=self._below or None)
            if self._saved is not None:
                self._learner.restore(self._saved)
        return self._learner

    def candidate(self) -> Deltas:
        """What would be published now: the learner's deltas on top of what lies below."""
        own = self.learner.deltas()
        return combine([Adapter("", self._below), Adapter("", own)]).sites if self._below else own

    def publish(self, deltas: Deltas, metadata: Mapping[str, Any], covers: int) -> int:
        """Store and count a new version; `adopt` puts it in force. May run on another thread."""
        return self.versions.publish(deltas, {**metadata, "covers": covers})

    def adopt(self, deltas: Deltas, covers: int) -> None:
        """Requests from now on run with the version just published, and the preview of what it has learned is gone."""
        self._published, self.covers = dict(deltas), covers
        self.forget_preview()

    def rebase(self, deltas: Deltas) -> None:
        """Learn on top of `deltas` from now on, from the beginning; they are the published version."""
        self._published = self._below = dict(deltas)
        self._learner, self._saved = None, None
        self.forget_preview()

    def rollback(self, number: int) -> None:
        """Put a kept version back in force, bit for bit. Raises `LearningError` if there is none."""
        self.versions.rollback(number)
        self.pending.clear()
        self.rebase(self.versions.load(number))

    def forget_preview(self) -> None:
        """Set the final site back to nothing."""
        first = self.micro.versions[0]
        if first.endswith(".0"):
            self.micro.rollback(first)
        else:
            self.micro = self._new_micro()

    def state(self) -> tuple[dict[str, FloatArray], dict[str, Any]]:
        """The learner's factors and moments, what lies below, and numbers; `restore` takes them."""
        arrays: dict[str, FloatArray] = {}
        own = self._learner.state() if self._learner is not None else self._saved
        for name, values in (own or {}).items():
            arrays[f"learner.{name}"] = values
        for site, delta in self._below.items():
            arrays[f"below.{site}.a"], arrays[f"below.{site}.b"] = delta.a, delta.b * np.float32(delta.scale)
        preview, meta = self.micro.state()
        arrays |= {f"preview.{name}": values for name, values in preview.items()}
        return arrays, {"number": self.number, "covers": self.covers, "learner": own is not None, "preview": meta}

    def restore(self, arrays: Mapping[str, FloatArray], meta: Mapping[str, Any]) -> None:
        """Go on where `state` was taken, if that is the version in force; else on top of that version."""
        if meta["number"] != self.number:
            published = {one.number: one.metadata for one in self.versions.kept()}
            self.covers = max(int(meta["covers"]), int(published.get(self.number, {}).get("covers", 0)))
            return
        below = {
            name[6:-2]: LowRank(values, arrays[f"{name[:-2]}.b"])
            for name, values in arrays.items()
            if name.startswith("below.") and name.endswith(".a")
        }
        if set(below) - set(linear_sites(self._spec)):
            raise LearningError("what was learned is of another model", hint="use another data directory")
        self._below, self.covers = below, int(meta["covers"])
        preview = {name[8:]: values for name, values in arrays.items() if name.startswith("preview.")}
        self.micro = MicroLoRA.restore(preview, meta["preview"], meta["preview"]["current"].rpartition(".")[0])
        if meta["learner"]:
            self._saved = {name[8:]: values for name, values in arrays.items() if name.startswith("learner.")}

    def _new_micro(self) -> MicroLoRA:
        own = self._settings
        return MicroLoRA(
            MicroLoRAConfig(
                self._spec.hidden_size,
                own.instant_rank,
                learning_rate=own.instant_rate,
                trust_nats=own.trust_nats,
            )
        )
