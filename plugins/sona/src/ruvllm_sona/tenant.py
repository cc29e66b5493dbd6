"""`Tenant`: all that was learned for one user, in memory and in a folder."""

from __future__ import annotations

import json
import time
from collections.abc import Generator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ruvllm_core.errors import LearningError
from ruvllm_core.log import get_logger
from ruvllm_core.protocols import FloatArray
from ruvllm_sona.audit import Audit
from ruvllm_sona.brain import Brain
from ruvllm_sona.drafting import ANSWERS, HEAD
from ruvllm_sona.files import FolderLock, load_tensors, save_tensors, write_atomic
from ruvllm_sona.frames import Record, feedback
from ruvllm_sona.ledger import Ledger, Limits
from ruvllm_sona.log import Log
from ruvllm_sona.patterns import SHARED, BankConfig, PatternBank
from ruvllm_sona.records import Example
from ruvllm_sona.settings import SonaSettings

if TYPE_CHECKING:
    from ruvllm_core.model.spec import ModelSpec
    from ruvllm_sona.pooled import Pooler

_log = get_logger("sona")


class Tenant:
    """One user's memory. Opening it takes the folder's lock and finds what a killed process had not learned yet.

    Args:
        folder: of this user and this model.
        name: the user's.
        pooler: turns prompts into states.

    Raises `LearningError` if another process has the folder, or something in it is damaged.
    """

    def __init__(self, folder: Path, name: str, spec: ModelSpec, settings: SonaSettings, pooler: Pooler) -> None:
        self.folder, self.name = folder, name
        self._spec, self._settings, self._pooler = spec, settings, pooler
        self._lock = FolderLock(folder)
        try:
            self.log = Log(folder / "log.bin")
            self.audit = Audit(folder / "audit.jsonl")
            own = settings
            limits = Limits(own.nats_per_hour, own.nats_per_day, own.feedback_per_minute, own.burst)
            self.ledger = Ledger(folder / "ledger.bin", limits)
            self._begin()
            self._recover()
        except BaseException:
            self._lock.close()
            raise

    def _begin(self) -> None:
        config = BankConfig(
            max_patterns=self._settings.max_patterns,
            specialise=self._settings.specialise,
            abstain_below=self._settings.abstain_below,
        )
        self.bank = PatternBank(self._spec.hidden_size, config)
        self.brains: dict[int, Brain] = {}
        self.brain(SHARED)

    def brain(self, pattern: int) -> Brain:
        """That of a pattern; a new one is empty."""
        if pattern not in self.brains:
            folder = self.folder / "versions" / f"{pattern:04d}"
            self.brains[pattern] = Brain(folder, f"{self.folder.name[-8:]}.{pattern}", self._spec, self._settings)
        return self.brains[pattern]

    def route(self, prompt_ids: Sequence[int]) -> Brain | None:
        """Whose adapter a prompt gets; None is the base model."""
        if len(self.bank.patterns) == 1 and self.bank.config.abstain_below is None:
            return self.brains[SHARED]
        pattern = self.bank.route(self._pooler(prompt_ids))
        return None if pattern is None else self.brain(pattern.id)

    def pattern_of(self, brain: Brain) -> int:
        """The pattern that a brain belongs to."""
        return next(pattern for pattern, one in self.brains.items() if one is brain)

    def remember(self, example: Example, trace: tuple[FloatArray, FloatArray] | None) -> Example:
        """Put feedback into the log, where it survives this process; the example with its sequence."""
        record = feedback(example, trace)
        return self._numbered(example, self.log.append(record))

    def learn_later(self, example: Example) -> float:
        """Queue a rated answer for its brain; how much better than expected it was."""
        state = self._pooler(example.prompt_ids)
        pattern = self.bank.route(state)
        found = pattern.id if pattern is not None else SHARED
        advantage = self.bank.learn(example.request_id, state, example.quality, found, example.prompt_ids)
        brain = self.brain(self.bank.find(found).id)
        if example.sequence > brain.covers:
            brain.pending.append((example, advantage))
        return advantage

    def examples(self) -> list[Example]:
        """All rated answers in the log, oldest first."""
        return [
            self._numbered(record.example, record.sequence)
            for record in self.log.records()
            if record.example is not None
        ]

    def forget(self, request_id: str) -> int:
        """Forget the feedback on one answer, or with an empty id all of it: the rest is learned anew.

        Requests run with the base model until it has been. Returns how many records went.
        """
        before = self.brains[SHARED].number
        dropped = self.log.rewrite(lambda record: _about(record, request_id))
        for name in (HEAD, ANSWERS):
            (self.folder / name).unlink(missing_ok=True)
        for brain in self.brains.values():
            brain.versions.rollback(0)
            brain.versions.remove(one.number for one in brain.versions.kept())
        self._begin()
        self.log.append(Record("forget", time.time(), request_id=request_id))
        self.save()
        self.audit.append(
            "forget", actor="user", before=str(before), after="0", request_id=request_id, note=f"{dropped} records"
        )
        for example in self.examples():
            self.learn_later(example)
        return dropped

    def rollback(self, number: int, pattern: int = SHARED) -> None:
        """Put an old version in force; feedback since then is not learned again. Raises `LearningError`."""
        brain = self.brain(pattern)
        before = brain.number
        brain.rollback(number)
        brain.covers = self.log.last
        self.log.append(Record("rollback", time.time(), version=number))
        self.save()
        self.audit.append("rollback", actor="user", before=str(before), after=str(number))

    def maintain(self) -> Generator[None, None, None]:
        """Let the bank find out whether prompts of a kind need an adapter of their own; yields between slices."""
        for change in (yield from self.bank.maintain()):
            brain, other = self.brain(change.pattern), self.brain(change.other)
            if change.kind == "split" and other.number:
                deltas = other.versions.load(other.number)
                brain.publish(deltas, {"from": other.number}, other.covers)
                brain.rebase(deltas)
                brain.covers = self.log.last
            elif change.kind == "merge":
                brain.pending.extend(other.pending)
                del self.brains[change.other]
            self.audit.append(change.kind, actor="background", note=change.reason)
            _log.info("patterns changed", user=self.name, what=change.kind, reason=change.reason)

    def save(self) -> None:
        """Put bank and learners where they last. What is lost without it is only work: the log has all feedback."""
        arrays, meta = self.bank.state()
        found = {f"bank.{name}": values for name, values in arrays.items()}
        brains = {}
        for pattern, brain in self.brains.items():
            own, brains[str(pattern)] = brain.state()
            found |= {f"brain.{pattern}.{name}": values for name, values in own.items()}
        text = json.dumps({"bank": meta, "brains": brains, "learned": self.log.last, "audit": str(self.audit.head)})
        save_tensors(self.folder / "state.safetensors", found, {"state": text})

    def files(self) -> dict[str, Any]:
        """Everything in the folder, saved now: `put_files` makes the same user of it.

        Files of tensors are ``(tensors, metadata)``, since what they say is the same in more than one order of bytes.
        """
        self.save()
        self.log.sync()
        paths = (path for path in sorted(self.folder.rglob("*")) if path.is_file() and path.name != ".lock")
        return {
            path.relative_to(self.folder).as_posix(): load_tensors(path)
            if path.suffix == ".safetensors"
            else path.read_bytes()
            for path in paths
        }

    def close(self) -> None:
        """Save, and give the folder back."""
        try:
            self.save()
            self.log.close()
            self.audit.close()
            self.ledger.close()
        finally:
            self._lock.close()

    def _recover(self) -> None:
        path, learned = self.folder / "state.safetensors", 0
        if path.exists():
            arrays, metadata = load_tensors(path)
            state = json.loads(metadata["state"])
            self.bank.restore(_under(arrays, "bank."), state["bank"])
            for pattern, meta in state["brains"].items():
                self.brain(int(pattern)).restore(_under(arrays, f"brain.{pattern}."), meta)
            learned = int(state["learned"])
        waiting = [brain for brain in self.brains.values() if brain.covers < self.log.last]
        since = min([learned, *(brain.covers for brain in waiting)])
        for record in self.log.records(after=since):
            if record.example is None:
                continue
            example = self._numbered(record.example, record.sequence)
            if record.sequence > learned:  # the bank has not heard of it
                self.learn_later(example)
            elif (brain := self.route(example.prompt_ids)) is not None and record.sequence > brain.covers:
                baseline = self.bank.patterns[self.pattern_of(brain)].baseline
                brain.pending.append((example, example.quality - baseline))

    @staticmethod
    def _numbered(example: Example, sequence: int) -> Example:
        return Example(**{**vars(example), "sequence": sequence})


def put_files(folder: Path, files: Mapping[str, Any]) -> None:
    """Make a user's folder hold these files and nothing else. Raises `LearningError` for names that lead out of it."""
    with FolderLock(folder):
        for path in folder.rglob("*"):
            if path.is_file() and path.name != ".lock":
                path.unlink()
        for name, content in files.items():
            path = folder / name
            if not path.resolve().is_relative_to(folder.resolve()):
                raise LearningError(f"the state has a file {name!r}, which is not in its folder")
            path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            if isinstance(content, bytes):
                write_atomic(path, content)
            else:
                save_tensors(path, *content)


def _under(arrays: dict[str, np.ndarray], prefix: str) -> dict[str, np.ndarray]:
    return {name[len(prefix) :]: values for name, values in arrays.items() if name.startswith(prefix)}


def _about(record: Record, request_id: str) -> bool:
    return record.example is not None and request_id in ("", record.example.request_id)
