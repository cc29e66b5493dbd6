"""`Brain`: what one pattern of one user has learned, and the adapter that its requests run with."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from ruvllm_core.decode.lora import FINAL_SITE, combine
from ruvllm_core.errors import LearningError
from ruvllm_core.protocols import Adapter, FloatArray, LowRank
from ruvllm_sona.gate import Backoff
from ruvllm_sona.holding import Holding, resting
from ruvllm_sona.micro import MicroLoRA
from ruvllm_sona.micro_config import MicroLoRAConfig
from ruvllm_sona.records import Example
from ruvllm_sona.settings import SonaSettings
from ruvllm_sona.sites import Deltas, linear_sites
from ruvllm_sona.versions import Versions

if TYPE_CHECKING:
    from ruvllm_core.model.spec import ModelSpec
    from ruvllm_sona.holding import Kept
    from ruvllm_sona.learner import Learner

HELD = "held"  # folder of a user, where what must not be forgotten is


class Brain:
    """The published version, the final-site preview on top of it, and the learner that makes the next version.

    Attributes:
        versions: what was published.
        micro: the preview; it forgets when a version that has learned the same is published.
        pending: rated answers to learn from, with how much better each was than expected.
        hand: those of them that are being learned from and are in no version yet.
        covers: sequence of the last feedback in the log that the published version has learned from.
        backoff: smaller steps after rejections.
        number: the version in force; 0 is the base model.
        holding: what it must not forget; None if `ewc` is 0.
        accepted: version of the preview that the gate has let pass last; empty is none.
        begun: another object whenever the preview begins anew.
        away: nats a token from the base model to what is published, on anchor texts; None before it was measured.
        life: another object after `rollback` and `clear`; work begun in an earlier life must change nothing.
    """

    def __init__(self, folder: Path, name: str, spec: ModelSpec, settings: SonaSettings) -> None:
        self.name = name
        self._spec, self._settings = spec, settings
        self.versions = Versions(folder, settings.keep_versions)
        self._held = folder.parents[1] / HELD / f"{folder.name}.safetensors"
        self.holding = Holding(self._held, settings.consolidate_every) if settings.ewc > 0.0 else None
        self.accepted, self.begun = "", object()
        self.micro = self._new_micro()
        self.pending: deque[tuple[Example, float]] = deque()
        self.hand: list[tuple[Example, float]] = []
        self.due: dict[int, float] = {}
        self.covers = next((int(one.metadata.get("covers", 0)) for one in self.versions.kept() if one.current), 0)
        self.backoff = Backoff()
        self.life = object()
        self._changing = threading.Lock()  # of what is in force on the disk
        self._good: dict[str, FloatArray] | None = None
        self._adapter: Adapter | None = None
        self._learner: Learner | None = None
        self._saved: Mapping[str, FloatArray] | None = None
        self.away: float | None = None
        self.number = self.versions.current
        self._set_base(self.versions.load(self.number))

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
            objective = ObjectiveConfig(own.leash, own.saturation, own.budget, own.text_leash)
            config = LearnerConfig(own.rank, own.learning_rate, objective, average=own.average, ewc=own.ewc)
            self._learner = Learner(linear_sites(self._spec), config, below=self._below or None)
            if self._saved is not None:
                self._learner.restore(self._saved)
        return self._learner

    @property
    def waiting(self) -> bool:
        """Whether there is something to learn from, or to consolidate."""
        return bool(self.pending) or (self.holding is not None and self.holding.due)

    @property
    def below(self) -> Deltas:
        """What the learner's own factors are on top of."""
        return self._below

    @property
    def published(self) -> Deltas:
        """What is in force without the preview."""
        return self._published

    def candidate(self) -> Deltas:
        """What would be published now: the learner's deltas on top of what lies below."""
        own = self.learner.deltas()
        return combine([Adapter("", self._below), Adapter("", own)]).sites if self._below else own

    def take(self) -> tuple[Example, float]:
        """The next rated answer, in hand from now on until `settle` or `put_back`."""
        if self._good is None:
            self._good = self.learner.state()
        self.hand.append(self.pending.popleft())
        return self.hand[-1]

    def settle(self, covers: int) -> None:
        """What is in hand has been learned, or never will be."""
        self.hand, self._good, self.covers = [], None, max(covers, self.covers)

    def undo(self) -> None:
        """Make the learner what it was before it learned from what is in hand."""
        if self._good is not None:
            self.learner.restore(self._good)

    def put_back(self) -> None:
        """What is in hand waits again, as if it had never been taken."""
        self.undo()
        self.pending.extendleft(reversed(self.hand))
        self.hand, self._good = [], None

    def publish(self, deltas: Deltas, metadata: Mapping[str, Any], covers: int, life: object) -> int:
        """Store and count a new version; `adopt` puts it in force. May run on another thread.

        Raises `LearningError` if it was begun in another `life`: what it has learned may be what was forgotten since.
        """
        with self._changing:
            if life is not self.life:
                raise LearningError("it was rolled back or forgotten meanwhile", hint="what is left is learned anew")
            return self.versions.publish(deltas, {**metadata, "covers": covers})

    def adopt(self, number: int, deltas: Deltas, covers: int) -> None:
        """Requests from now on run with the version just published, and the preview of what it has learned is gone."""
        self.number, self._published, self.away = number, dict(deltas), None
        self.settle(covers)
        self.forget_preview()

    def rebase(self, deltas: Deltas, held: Literal["no more", "still", "anew"] = "no more") -> None:
        """Learn from `deltas` on from now on, with Adam at its beginning; they are the published version.

        `held` says what is held then: nothing any more, the same as before, or `deltas` as soon as there is time, which
        it also is if what was held is not about what lies below now.
        """
        before = self._below
        self._set_base(deltas)
        if held == "no more" or self.holding is None:
            self.drop_held()
        elif held == "anew" or before or self._below:
            self.holding.ask()
        self.forget_preview()

    def rollback(self, number: int) -> None:
        """Put a kept version back in force, bit for bit. Raises `LearningError` if there is none."""
        with self._changing:
            deltas = self.versions.load(number)
            self.versions.rollback(number)
            self.life, self.number = object(), number
            self.drop_held()
        self.pending.clear()
        self.hand, self._good = [], None
        self.rebase(deltas)

    def clear(self) -> None:
        """Delete every version; the base model is in force, and nobody is to use this object any more."""
        with self._changing:
            self.life, self.number = object(), 0
            self.versions.rollback(0)
            self.versions.remove(one.number for one in self.versions.kept())
            self.drop_held()

    def keep(self, kept: Kept, life: object) -> None:
        """Put what is held on the disk; may run on another thread. Nothing happens if `life` is over."""
        from ruvllm_sona.holding import save

        with self._changing:
            if life is self.life and self.holding is not None:
                save(self.holding.path, kept)

    def drop_held(self) -> None:
        """Hold nothing any more, and delete the file, also one of other settings."""
        if self.holding is not None:
            self.holding.drop()
        else:
            self._held.unlink(missing_ok=True)

    def hold_preview(self) -> None:
        """Have the preview stay near to nothing where that changes what is held."""
        self.micro.anchor = self.holding.preview if self.holding is not None else None

    @property
    def unjudged(self) -> bool:
        """Whether the gate has not seen the preview that is in force."""
        return self.micro.version != self.accepted and bool(np.any(self.micro.current.b))

    def take_back(self) -> None:
        """Put the preview back to what the gate has let pass, or to nothing."""
        if self.accepted in self.micro.versions:
            self.micro.rollback(self.accepted)
        else:
            self.forget_preview()

    def _set_base(self, deltas: Deltas) -> None:
        """Learning starts from `deltas`. Of the learner's own kind they become its factors, for what lies below adds
        its rank to every version to come."""
        self._published, self.away = dict(deltas), None
        self._learner, self._saved = None, None
        self._below: Deltas = self._published
        sites = linear_sites(self._spec)
        if deltas.keys() == sites.keys() and all(len(one.a) == self._settings.rank for one in deltas.values()):
            self._below, saved = {}, {"steps": np.zeros(1, np.float32)}
            for site, delta in deltas.items():
                saved[f"{site}.a"], saved[f"{site}.b"] = delta.a[None], delta.b[None] * np.float32(delta.scale)
            self._saved = saved

    def forget_preview(self) -> None:
        """Set the final site back to nothing."""
        first = self.micro.versions[0]
        if first.endswith(".0"):
            self.micro.rollback(first)
        else:
            self.micro = self._new_micro()
        self.accepted, self.begun = "", object()
        self.hold_preview()

    def state(self) -> tuple[dict[str, FloatArray], dict[str, Any]]:
        """The learner's factors and moments, what lies below, and numbers; `restore` takes them."""
        arrays: dict[str, FloatArray] = {}
        own = self._good if self._good is not None else self._saved
        if self._good is None and self._learner is not None:
            own = self._learner.state()
        for name, values in (own or {}).items():
            arrays[f"learner.{name}"] = values
        for site, delta in self._below.items():
            arrays[f"below.{site}.a"], arrays[f"below.{site}.b"] = delta.a, delta.b * np.float32(delta.scale)
        preview, meta = self.micro.state()
        arrays |= {f"preview.{name}": values for name, values in preview.items()}
        numbers = {"number": self.number, "covers": self.covers, "learner": own is not None, "preview": meta}
        if self.holding is not None:
            numbers["since"] = self.holding.since
            if self.holding.preview is not None:
                u, v = self.holding.preview.fisher.sites[FINAL_SITE]
                arrays["held.u"], arrays["held.v"] = u.astype(np.float32), v.astype(np.float32)
        waiting = [[one.sequence, advantage] for one, advantage in (*self.hand, *self.pending)]
        return arrays, {**numbers, "pending": waiting, "step": self.backoff.step, "rejected": self.backoff.rejected}

    def restore(self, arrays: Mapping[str, FloatArray], meta: Mapping[str, Any]) -> None:
        """Go on where `state` was taken, if that is the version in force; else from that version.

        Afterwards `due` has the sequences of the answers that waited, and how much better than expected each was.
        """
        self.covers, waiting = int(meta["covers"]), {int(one): float(advantage) for one, advantage in meta["pending"]}
        self.backoff = Backoff(step=float(meta["step"]), rejected=int(meta["rejected"]))
        if self.holding is not None:
            self.holding.since = int(meta.get("since", 0))
        if meta["number"] != self.number:
            published = {one.number: one.metadata for one in self.versions.kept()}
            self.covers = max(self.covers, int(published.get(self.number, {}).get("covers", 0)))
            self.due = {one: advantage for one, advantage in waiting.items() if one > self.covers}
            return
        self.due = waiting
        below = {
            name[6:-2]: LowRank(values, arrays[f"{name[:-2]}.b"])
            for name, values in arrays.items()
            if name.startswith("below.") and name.endswith(".a")
        }
        if set(below) - set(linear_sites(self._spec)):
            raise LearningError("what was learned is of another model", hint="use another data directory")
        self._below = below
        preview = {name[8:]: values for name, values in arrays.items() if name.startswith("preview.")}
        self.micro = MicroLoRA.restore(preview, meta["preview"], meta["preview"]["current"].rpartition(".")[0])
        if self.holding is not None and "held.u" in arrays:
            self.holding.preview = resting(arrays["held.u"], arrays["held.v"])
        self.hold_preview()
        if meta["learner"]:
            self._saved = {name[8:]: values for name, values in arrays.items() if name.startswith("learner.")}
        else:
            self._saved = None

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
