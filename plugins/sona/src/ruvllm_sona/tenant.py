"""`Tenant`: all that was learned for one user, in memory and in a folder."""

from __future__ import annotations

import json
import shutil
import threading
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ruvllm_core.errors import LearningError
from ruvllm_core.log import get_logger
from ruvllm_core.protocols import FloatArray
from ruvllm_sona.audit import Audit, read_audit
from ruvllm_sona.brain import HELD, Brain
from ruvllm_sona.chain import Entry
from ruvllm_sona.drafting import ACCEPTANCE, ANSWERS, HEAD
from ruvllm_sona.files import LOG, FolderLock, load_tensors, save_tensors, write_atomic
from ruvllm_sona.frames import Record, feedback
from ruvllm_sona.gate import Verdict
from ruvllm_sona.ledger import Ledger, Limits
from ruvllm_sona.log import Log
from ruvllm_sona.merge import merge_all
from ruvllm_sona.patterns import SHARED, BankConfig, PatternBank
from ruvllm_sona.records import Example
from ruvllm_sona.settings import SonaSettings
from ruvllm_sona.sites import Deltas

if TYPE_CHECKING:
    from ruvllm_core.model.spec import ModelSpec
    from ruvllm_sona.pooled import Pooler

#: Has work done on a thread that may wait for the disk; yields until it is done, and returns what it returned.
Elsewhere = Callable[[Callable[[], Any]], Generator[object, None, Any]]
#: The gate, for what may be published; yields between slices.
Judge = Callable[[Deltas], Generator[object, None, Verdict]]
_MERGED_RANK = 4  # of what two patterns have learned: of rank 1 both, it is exact
DEEP, DISTILL = "deep.safetensors", "distill.safetensors"  # of a user's folder, where these trainings are
_log = get_logger("sona")


class Tenant:
    """One user's memory. Opening it takes the folder's lock and finds what a killed process had not learned yet.

    Args:
        folder: of this user and this model.
        name: the user's.
        pooler: turns prompts into states.

    Attributes:
        refused: sequences of feedback that the ledger did not allow; it is not learned from when the rest is anew.
        free_until: feedback up to this sequence has been paid for.
        learned, rejected: answers that versions were made of, and candidates that did not pass the gate, since opened.

    Raises `LearningError` if another process has the folder, or something in it is damaged.
    """

    def __init__(self, folder: Path, name: str, spec: ModelSpec, settings: SonaSettings, pooler: Pooler) -> None:
        self.folder, self.name = folder, name
        self._spec, self._settings, self._pooler = spec, settings, pooler
        self._lock = FolderLock(folder)
        try:
            self.log = Log(folder / LOG)
            self.audit = Audit(folder / "audit.jsonl")
            own = settings
            limits = Limits(own.nats_per_hour, own.nats_per_day, own.feedback_per_minute, own.burst)
            self.ledger = Ledger(folder / "ledger.bin", limits)
            self._saving, self._taken, self._written = threading.Lock(), 0, 0
            self.refused: set[int] = set()
            self.free_until = self.learned = self.rejected = 0
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
            self.brains[pattern] = Brain(folder, f"{self.folder.name[-32:]}.{pattern}", self._spec, self._settings)
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

    def learn_later(self, example: Example, state: FloatArray | None = None) -> float:
        """Queue a rated answer for its brain; how much better than expected it was. `state`: its prompt's, if known."""
        state = self._pooler(example.prompt_ids) if state is None else state
        pattern = self.bank.route(state)
        found = pattern.id if pattern is not None else SHARED
        advantage = self.bank.learn(example.request_id, state, example.quality, found, example.prompt_ids)
        brain = self.brain(self.bank.find(found).id)
        if example.sequence > brain.covers and example.sequence not in self.refused:
            brain.pending.append((example, advantage))
        return advantage

    def examples(self) -> Iterator[Example]:
        """All rated answers in the log, oldest first."""
        for record in self.log.records():
            if record.example is not None:
                yield self._numbered(record.example, record.sequence)

    def said(self, actor: str, since: int) -> Entry | None:
        """The last entry of the audit log by `actor` after the one of number `since`."""
        found = [one for one in read_audit(self.audit.path) if one.entry > since and one.actor == actor]
        return found[-1] if found else None

    def forget(self, request_id: str) -> int:
        """Forget the feedback on one answer, or with an empty id all of it: the rest is learned anew.

        Requests run with the base model until it has been. Returns how many records went.
        """
        if request_id and not any(_about(record, request_id) for record in self.log.records()):
            return 0
        before = self.brains[SHARED].number
        upto = self.log.append(Record("forget", time.time(), request_id=request_id))
        dropped = self._forget(request_id, upto)
        self.audit.append(
            "forget", actor="user", before=str(before), after="0", request_id=request_id, note=f"{dropped} records"
        )
        return dropped

    def _forget(self, request_id: str, upto: int) -> int:
        """Drop the feedback on an answer up to a sequence, and whatever has seen it; queue the rest."""
        dropped = self.log.rewrite(lambda record: _about(record, request_id) and record.sequence < upto)
        waiting = [one.sequence for brain in self.brains.values() for one, _ in (*brain.hand, *brain.pending)]
        self.free_until = max(self.free_until, min(waiting, default=upto) - 1)
        for name in (HEAD, ANSWERS, ACCEPTANCE, DEEP, DISTILL):
            (self.folder / name).unlink(missing_ok=True)
        for brain in self.brains.values():
            brain.clear()
        for folder in (self.folder / "versions").iterdir():  # also of patterns that are no more
            if folder.name not in {f"{pattern:04d}" for pattern in self.brains}:
                shutil.rmtree(folder)
        shutil.rmtree(self.folder / HELD, ignore_errors=True)
        self._begin()
        for example in self.examples():
            self.learn_later(example)
        self.save()
        return dropped

    def rollback(self, number: int, pattern: int = SHARED) -> None:
        """Put an old version in force; feedback up to now is not learned again. Raises `LearningError`."""
        brain = self.brain(pattern)
        before = brain.number
        brain.rollback(number)
        brain.covers = self.log.last
        self.log.append(Record("rollback", time.time(), version=number))
        self.save()
        self.audit.append("rollback", actor="user", before=str(before), after=str(number))

    def maintain(self, elsewhere: Elsewhere, judge: Judge) -> Generator[object, None, None]:
        """Let the bank find out whether prompts of a kind need an adapter of their own; yields between slices.

        `elsewhere` has work done by a thread that may wait for the disk; `judge` is the gate.
        """
        bank = self.bank
        for change in (yield from bank.maintain()):
            if bank is not self.bank:  # forgotten meanwhile
                return
            brain, other = self.brain(change.pattern), self.brain(change.other)
            if change.kind == "split":
                brain.covers = self.log.last
                if other.number:
                    deltas, life, source = other.versions.load(other.number), brain.life, other.number
                    number = yield from elsewhere(partial(brain.publish, deltas, {"from": source}, brain.covers, life))
                    if brain.life is not life:
                        return
                    brain.adopt(number, deltas, brain.covers)
                    brain.rebase(deltas)
            else:
                brain.pending.extend([*other.hand, *other.pending])
                other.life = object()
                other.drop_held()
                del self.brains[change.other]
                if other.number:
                    yield from self._merge(brain, other, change.share, elsewhere, judge)
            self.audit.append(change.kind, actor="background", note=change.reason)
            _log.info("patterns changed", user=self.name, what=change.kind, reason=change.reason)

    def _merge(
        self, brain: Brain, other: Brain, share: float, elsewhere: Elsewhere, judge: Judge
    ) -> Generator[object, None, None]:
        """Publish for `brain` what both have learned, each for its share of the feedback, if that passes the gate."""
        life, before = brain.life, brain.number
        both = [one.versions.load(one.number) for one in (brain, other)]
        merged = yield from elsewhere(partial(merge_all, both, (1.0 - share, share), _MERGED_RANK))
        verdict = yield from judge({site: one.delta for site, one in merged.items()})
        if brain.life is not life:
            return
        if verdict.passed and verdict.deltas is not None:
            found = {"merged": other.number, "share": share}
            number = yield from elsewhere(partial(brain.publish, verdict.deltas, found, brain.covers, life))
            if brain.life is not life:
                return
            brain.put_back()
            brain.adopt(number, verdict.deltas, brain.covers)
            brain.rebase(verdict.deltas, "anew")
            brain.life = object()
        self.audit.append(
            "publish" if verdict.passed else "reject",
            actor="background",
            before=str(before),
            after=str(brain.number),
            note="; ".join(verdict.reasons) or f"merged with pattern {other.name.rpartition('.')[2]}",
        )

    def save(self) -> None:
        """Put bank and learners where they last. What is lost without it is only work: the log has all feedback."""
        self.snapshot()()

    def snapshot(self) -> Callable[[], None]:
        """What `save` would write now, copied; the function returned writes it, on any thread.

        One that is older than what has been written since does nothing.
        """
        arrays, meta = self.bank.state()
        found = {f"bank.{name}": values for name, values in arrays.items()}
        brains = {}
        for pattern, brain in self.brains.items():
            own, brains[str(pattern)] = brain.state()
            found |= {f"brain.{pattern}.{name}": values for name, values in own.items()}
        numbers = {"learned": self.log.last, "free_until": self.free_until, "refused": sorted(self.refused)}
        text = json.dumps({"bank": meta, "brains": brains, **numbers, "audit": str(self.audit.head)})
        self._taken = taken = self._taken + 1

        def write() -> None:
            with self._saving:
                if taken > self._written:
                    save_tensors(self.folder / "state.safetensors", found, {"state": text})
                    self._written = taken

        return write

    def files(self) -> dict[str, Any]:
        """Everything in the folder, saved now: `put_files` makes the same user of it.

        Files of tensors are ``(tensors, metadata)``, since what they say is the same in more than one order of bytes.
        """
        self.save()
        self.log.sync()
        paths = (path for path in sorted(self.folder.rglob("*")) if path.is_file() and not path.name.startswith("."))
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
            try:
                state = json.loads(metadata["state"])
                self.bank.restore(_under(arrays, "bank."), state["bank"])
                for pattern, meta in state["brains"].items():
                    self.brain(int(pattern)).restore(_under(arrays, f"brain.{pattern}."), meta)
                learned, self.free_until = int(state["learned"]), int(state["free_until"])
                self.refused = set(state["refused"])
            except (KeyError, TypeError, ValueError) as error:
                raise LearningError(
                    f"{path} is of another version of this plugin: {type(error).__name__} {error}",
                    hint="delete it: what was published stays, and feedback since then is learned from anew",
                ) from error
        forgotten = [record for record in self.log.records(after=learned) if record.kind == "forget"]
        for record in forgotten:  # a killed process did not get to the end of it
            self._forget(record.request_id, record.sequence)
        if forgotten:
            return
        due = {one: (brain, advantage) for brain in self.brains.values() for one, advantage in brain.due.items()}
        for record in self.log.records(after=min([learned, *(one - 1 for one in due)])):
            if record.example is None:
                continue
            example = self._numbered(record.example, record.sequence)
            if record.sequence > learned:  # the bank has not heard of it
                self.learn_later(example)
            elif record.sequence in due:
                brain, advantage = due[record.sequence]
                brain.pending.append((example, advantage))

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
