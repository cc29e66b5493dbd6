"""`SonaLoop`: the learning loop that the engine runs; what is done when."""

from __future__ import annotations

import queue
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeAlias, TypeVar, cast

from ruvllm_core.decode.lora import FINAL_SITE
from ruvllm_core.errors import LearningError
from ruvllm_core.generate.request import Request, Trajectory, new_request_id
from ruvllm_core.log import get_logger
from ruvllm_core.protocols import Adapter, FeedbackResult, FloatArray, LearningContext, LowRank, Proposer
from ruvllm_sona.borrowed import Borrowed
from ruvllm_sona.brain import Brain
from ruvllm_sona.drafting import Drafting
from ruvllm_sona.files import LOG, FolderInUse, folder_name
from ruvllm_sona.fingerprint import Fingerprint
from ruvllm_sona.pooled import Pooler
from ruvllm_sona.records import Example
from ruvllm_sona.schedule import Schedule
from ruvllm_sona.settings import SonaSettings
from ruvllm_sona.sites import final_site, start
from ruvllm_sona.study import Study
from ruvllm_sona.tenant import Tenant, put_files
from ruvllm_sona.trace import Head, Trace, eligibility, why_untraceable

T = TypeVar("T")
Status: TypeAlias = Literal["applied", "deferred", "refused"]
_log = get_logger("sona")
_HELD_BYTES = 64 << 20  # hidden states of answers that have no trace yet
_AGAIN_S = 10.0  # from one try to open a user's memory that cannot be opened to the next


#: Hears of the loops that are made in this context, for whoever loads an engine and has more to say to its loop.
MADE: ContextVar[Callable[[SonaLoop], None] | None] = ContextVar("MADE", default=None)


@dataclass(eq=False)
class _Answer:
    """A finished answer that feedback may come for."""

    trajectory: Trajectory
    user: str
    brain: Brain | None
    micro: tuple[str, LowRank] | None
    trace: Trace | None = None
    state: FloatArray | None = None
    reason: str = "its trace has not been computed yet"

    @property
    def example(self) -> Example:
        done, params = self.trajectory, self.trajectory.params
        version = done.adapter_version or ""
        return Example(done.request_id, done.prompt_ids, done.output_ids, 0.5, params.temperature, 0, version)


class SonaLoop:
    """See `ruvllm_core.protocols.LearningLoop`. Every call comes from the engine's one thread."""

    def __init__(self, context: LearningContext) -> None:
        self._context = context
        self.settings: SonaSettings = context.options or SonaSettings()
        self.wants_hidden = self.settings.instant
        key = folder_name(Fingerprint.of(context.spec, context.weights).text())
        self.folder = context.state_dir / key
        self._pooler = Pooler(context.weights["embed"], context.tokenizer)
        self._head = Head.of(context.spec, context.weights)
        self._fresh = start(final_site(context.spec), self.settings.instant_rank, 0)[FINAL_SITE]
        self._tenants: dict[str, Tenant] = {}
        self._unopened: dict[str, tuple[float, LearningError]] = {}
        self._borrowed = Borrowed()
        self._failed: set[str] = set()
        self._running: OrderedDict[str, tuple[str, Brain | None, tuple[str, LowRank] | None]] = OrderedDict()
        self._answers: OrderedDict[str, _Answer] = OrderedDict()
        self._untraced: OrderedDict[str, _Answer] = OrderedDict()
        self._held = 0
        self._schedule = Schedule()
        self.study = Study(context, self.settings)
        self._drafting: Drafting | None = None
        self._asked: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._closed = False
        if (hear := MADE.get()) is not None:
            hear(self)

    def adapter(self, request: Request) -> Adapter | None:
        if self._drafting is not None:
            self._drafting.know(request.params.user)
        tenant = self._find(request.params.user)
        brain = tenant.route(request.prompt_ids) if tenant is not None else None
        micro = (brain.micro.version, brain.micro.current) if brain is not None else None
        self._running[request.id] = request.params.user, brain, micro
        while len(self._running) > 2 * self.settings.remember:
            self._running.popitem(last=False)
        if tenant is None and isinstance(self._unopened.get(request.params.user, (0, None))[1], FolderInUse):
            return self._borrowed.adapter(self.folder / folder_name(request.params.user))
        return brain.adapter() if brain is not None else None

    def observe(self, trajectory: Trajectory) -> None:
        if self._drafting is not None:
            self._drafting.observe(trajectory)
        user, brain, micro = self._running.pop(trajectory.request_id, (trajectory.params.user, None, None))
        answer = _Answer(trajectory, user, brain, micro)
        self._answers[trajectory.request_id] = answer
        while len(self._answers) > self.settings.remember:
            gone, _ = self._answers.popitem(last=False)
            if gone in self._untraced:  # nobody can rate it any more
                self._drop_hidden(gone, "")
        self._untraced[trajectory.request_id] = answer
        self._held += _bytes(trajectory)
        if not self.settings.instant or trajectory.hidden is None:
            self._drop_hidden(trajectory.request_id, "the preview is switched off, or hidden states were not recorded")
            return
        while self._held > _HELD_BYTES:
            self._drop_hidden(next(iter(self._untraced)), "too many answers came after it")
        if not self._schedule.has("traces"):
            self._schedule.add("traces", self._trace_all(), rank=0)

    def feedback(self, request_id: str, quality: float) -> FeedbackResult:
        answer = self._answers.get(request_id)
        if answer is None:
            raise LearningError(
                f"request {request_id} is not remembered",
                hint=f"the last {self.settings.remember} answers are, until the engine is closed",
            )
        tenant, now = self._open(answer.user), time.time()
        if (refusal := tenant.ledger.feedback(now)) is not None:
            return FeedbackResult("refused", self._version(tenant, answer), str(refusal))
        if request_id in self._untraced:
            self._trace(answer)
        brain = self._brain(tenant, answer)
        example = replace(answer.example, quality=quality, time=now)
        trace = answer.trace
        example = tenant.remember(example, (trace.a, trace.b) if trace is not None else None)
        before, nats = brain.version if brain is not None else "", 0.0
        status, reason = "deferred", answer.reason
        if trace is not None and brain is not None:
            old = brain.micro.version
            if not trace.version and old.endswith(".0"):  # drawn before there was anything to know of this user
                trace = replace(trace, version=old)
            step = brain.micro.learn(trace, quality)
            status, reason, nats = ("applied" if step.applied else "deferred"), step.reason, step.nats or 0.0
            # With the background loop, it is the step through the whole network that is paid for.
            if step.applied and not self.settings.background and (refusal := tenant.ledger.allow(abs(nats), now)):
                brain.micro.rollback(old)
                status, reason, nats = "refused", str(refusal), 0.0
        advantage = tenant.learn_later(example, answer.state)
        self._plan(tenant, anew=True)
        if status == "deferred" and advantage == 0.0:
            status, reason = "refused", "as good as usual: nothing to learn"
        after = self._version(tenant, answer)
        tenant.audit.append(
            "feedback",
            actor="user",
            before=before,
            after=after,
            predicted={"nats": nats},
            request_id=request_id,
            note=f"quality {quality:g}, {status}",
        )
        if status == "deferred" and not self.settings.background:
            status, reason = "refused", f"{reason}; and the background loop is switched off"
        return FeedbackResult(cast(Status, status), after, reason if status != "applied" else "")

    def teach(
        self, user: str, prompt_ids: tuple[int, ...], output_ids: tuple[int, ...], quality: float
    ) -> FeedbackResult:
        """Feedback on an answer that was not given here; nothing is known of how it was drawn, so it is deferred."""
        if not prompt_ids or not output_ids:
            raise LearningError("a prompt and an answer of at least one token each are needed")
        size = self._context.spec.vocab_size
        if not 0.0 <= quality <= 1.0 or not all(0 <= token < size for token in (*prompt_ids, *output_ids)):
            raise LearningError(f"a quality from 0 to 1 and tokens below {size} are needed; quality is {quality}")
        if len(prompt_ids) >= self._context.spec.max_context:
            raise LearningError(f"a prompt of {len(prompt_ids)} tokens leaves no room for an answer")
        tenant, now = self._open(user), time.time()
        brain = tenant.route(prompt_ids)
        version = brain.version if brain is not None else ""
        if not self.settings.background:
            return FeedbackResult("refused", version, "it takes a forward pass; the background loop is switched off")
        if (refusal := tenant.ledger.feedback(now)) is not None:
            return FeedbackResult("refused", version, str(refusal))
        example = Example(new_request_id(), prompt_ids, output_ids, quality, 0.0, adapter_version="", time=now)
        example = tenant.remember(example, None)
        advantage = tenant.learn_later(example)
        self._plan(tenant, anew=True)
        status = "deferred" if advantage else "refused"
        reason = "it was not drawn here, so it takes a forward pass" if advantage else "as good as usual"
        note = f"quality {quality:g}, taught, {status}"
        tenant.audit.append(
            "feedback", actor="user", before=version, after=version, request_id=example.request_id, note=note
        )
        return FeedbackResult(cast(Status, status), version, reason)

    def ask(self, function: Callable[[], T]) -> Future[T]:
        """Have `function` run on the engine's thread, in the next `tick`. Any thread may ask."""
        future: Future[T] = Future()

        def work() -> None:
            try:
                if self._closed:
                    raise LearningError("the engine is closed", hint="load it again")
                future.set_result(function())
            except BaseException as error:
                future.set_exception(error)

        self._asked.put(work)
        if self._closed:
            self._answer()
        return future

    def _answer(self) -> None:
        while not self._asked.empty():
            try:
                self._asked.get_nowait()()
            except queue.Empty:  # somebody else was faster
                return

    def knows(self, request_id: str) -> bool:
        """Whether feedback on this answer can still come."""
        return request_id in self._answers

    def tick(self, budget_s: float) -> bool:
        self._answer()
        return self.work(budget_s)

    def work(self, budget_s: float) -> bool:
        """`tick` without what was asked."""
        if not len(self._schedule):  # something may have been forgotten, or found in a log
            for tenant in self._tenants.values():
                self._plan(tenant)
        return self._schedule.run(budget_s)

    def state_dict(self) -> dict[str, Any]:
        """The files of every user that is known here, by name and as bytes."""
        return {user: tenant.files() for user, tenant in self._tenants.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Put those files in place of what there is. Raises `LearningError` if they are not of this model."""
        for user, files in state.items():
            if (tenant := self._tenants.pop(user, None)) is not None:
                self._drop_jobs(tenant)
                tenant.close()
            put_files(self.folder / folder_name(user), files)
            self._open(user)

    def proposer(self) -> Proposer | None:
        if not self.settings.drafts:
            return None
        if self._drafting is None:
            self._drafting = Drafting(self.folder, self._context, self._schedule)
            self.wants_hidden = True
        return self._drafting.proposer()

    def close(self) -> None:
        self._closed = True
        self._answer()
        self._schedule.drop()
        if self._drafting is not None:
            self._drafting.close()
        self.study.close()  # before the locks are given back: it may still be writing
        for tenant in self._tenants.values():
            try:
                tenant.close()
            except LearningError as error:  # the others are to be saved, too
                _log.error("what was learned cannot be saved", user=tenant.name, reason=str(error))
        self._tenants.clear()

    def deepen(self, user: str = "", done: Callable[[Exception | None], None] | None = None) -> None:
        """Have the deep loop train on all that `user` ever rated, in idle time.

        `done` hears when it has ended, and of the error if there was one. Raises `LearningError` if it is at it.
        """
        tenant = self._open(user)
        if self._schedule.has(name := f"deep {tenant.folder.name}"):
            raise LearningError("deep training is under way for this user", hint="wait for its end")
        hear: Callable[[Exception | None], None] = done or (lambda _: None)

        def job() -> Iterator[object]:
            try:
                yield from self.study.deep(tenant)
                self._plan(tenant)  # what was published is to be held
            except GeneratorExit:
                hear(LearningError("deep training was ended", hint="start it again: it goes on where it was"))
                raise
            hear(None)

        self._schedule.add(name, job(), 3, hear)

    def forget(self, user: str = "", request_id: str = "") -> int:
        """Forget one answer of a user, or with an empty id everything (see `Tenant.forget`); drafts forget all."""
        if self._drafting is not None:
            self._drafting.forget(user)
        tenant = self._open(user)
        dropped = tenant.forget(request_id)
        self._plan(tenant)
        return dropped

    def tenant(self, user: str = "") -> Tenant:
        """A user's memory, for whoever looks at it or changes it on the engine's thread. Raises `LearningError`."""
        return self._open(user)

    def _find(self, user: str) -> Tenant | None:
        """A user's memory if there is any; what is wrong with it is said, and answers go on."""
        if user not in self._tenants and (self.folder / folder_name(user) / LOG).is_file():
            since, _ = self._unopened.get(user, (-_AGAIN_S, None))
            if time.monotonic() - since >= _AGAIN_S:
                try:
                    self._open(user)
                except LearningError as error:
                    _log.warning("this engine does not learn for a user", user=user, reason=str(error))
        return self._tenants.get(user)

    def _open(self, user: str) -> Tenant:
        if user not in self._tenants:
            folder = self.folder / folder_name(user)
            try:
                tenant = Tenant(folder, user, self._context.spec, self.settings, self._pooler)
            except LearningError as error:
                self._unopened[user] = time.monotonic(), error
                raise
            self._unopened.pop(user, None)
            self._tenants[user] = tenant
            self._plan(tenant)
        return self._tenants[user]

    def _plan(self, tenant: Tenant, *, anew: bool = False) -> None:
        """Queue what has become due for a user; a job that has failed only `anew`."""
        brains, own, study = tenant.brains.values(), self.settings, self.study
        for what, rank, due, work in (
            ("preview", 0, own.background and any(brain.unjudged for brain in brains), study.preview),
            ("learn", 1, own.background and any(brain.waiting for brain in brains), study.learn),
            ("maintain", 2, tenant.bank.due, lambda tenant: tenant.maintain(study.elsewhere, study.judge)),
        ):
            name = f"{what} {tenant.folder.name}"
            if anew:
                self._failed.discard(name)
            if due and name not in self._failed and not self._schedule.has(name):
                self._schedule.add(name, work(tenant), rank, lambda _, name=name: self._failed.add(name))  # type: ignore[misc]

    def _drop_jobs(self, tenant: Tenant) -> None:
        for what in ("preview", "learn", "maintain", "deep"):
            self._schedule.drop(f"{what} {tenant.folder.name}")

    def _version(self, tenant: Tenant, answer: _Answer) -> str:
        brain = self._brain(tenant, answer)
        return brain.version if brain is not None else ""

    def _brain(self, tenant: Tenant, answer: _Answer) -> Brain | None:
        """That of an answer; the one it was given with may have been forgotten since."""
        if answer.brain is None or answer.brain not in tenant.brains.values():
            answer.brain = tenant.route(answer.trajectory.prompt_ids)
        return answer.brain

    def _trace_all(self) -> Iterator[None]:
        while self._untraced:
            self._trace(next(iter(self._untraced.values())))
            yield

    def _trace(self, answer: _Answer) -> None:
        """The trace of an answer's first tokens, as many as are learned from."""
        done, params = answer.trajectory, answer.trajectory.params
        count, reason = min(len(done.drawn_from), self.settings.max_answer), ""
        try:
            answer.state = self._pooler(done.prompt_ids)
            reason = why_untraceable(done.hidden, done.output_ids, done.drawn_from, params.temperature)
            if not reason:
                assert done.hidden is not None
                version, delta = answer.micro or ("", self._fresh)
                answer.trace = eligibility(
                    done.hidden[:count],
                    done.output_ids[:count],
                    done.drawn_from[:count],
                    params.temperature,
                    delta,
                    self._head,
                    version=version,
                    repetition_penalty=params.repetition_penalty,
                    prompt_ids=done.prompt_ids,
                )
        except LearningError as error:
            reason = str(error)
        self._drop_hidden(done.request_id, reason)

    def _drop_hidden(self, request_id: str, reason: str) -> None:
        answer = self._untraced.pop(request_id)
        self._held -= _bytes(answer.trajectory)
        answer.trajectory, answer.reason = replace(answer.trajectory, hidden=None, drawn_from=()), reason


def _bytes(trajectory: Trajectory) -> int:
    drawn = sum(one.ids.nbytes + one.probabilities.nbytes for one in trajectory.drawn_from)
    return drawn + (0 if trajectory.hidden is None else trajectory.hidden.nbytes)
