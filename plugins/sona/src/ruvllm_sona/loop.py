"""`SonaLoop`: the learning loop that the engine runs; what is done when."""

from __future__ import annotations

import time
from collections import OrderedDict, deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from ruvllm_core.errors import LearningError
from ruvllm_core.generate.request import Request, Trajectory
from ruvllm_core.log import get_logger
from ruvllm_core.protocols import Adapter, FeedbackResult, LearningContext, LowRank, Proposer
from ruvllm_sona.brain import Brain
from ruvllm_sona.drafting import Drafting
from ruvllm_sona.files import folder_name
from ruvllm_sona.fingerprint import Fingerprint
from ruvllm_sona.pooled import Pooler
from ruvllm_sona.records import Example
from ruvllm_sona.schedule import Schedule
from ruvllm_sona.settings import SonaSettings
from ruvllm_sona.study import Study
from ruvllm_sona.tenant import Tenant, put_files
from ruvllm_sona.trace import Head, Trace, eligibility, why_untraceable

_log = get_logger("sona")
_HELD_BYTES = 64 << 20  # hidden states of answers that have no trace yet


@dataclass(eq=False)
class _Answer:
    """A finished answer that feedback may come for."""

    trajectory: Trajectory
    user: str
    brain: Brain | None
    micro: tuple[str, LowRank] | None
    trace: Trace | None = None
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
        self._tenants: dict[str, Tenant | LearningError] = {}
        self._running: OrderedDict[str, tuple[str, Brain | None, tuple[str, LowRank] | None]] = OrderedDict()
        self._answers: OrderedDict[str, _Answer] = OrderedDict()
        self._untraced: deque[_Answer] = deque()
        self._held = 0
        self._schedule = Schedule()
        self.study = Study(context, self.settings)
        self._drafting: Drafting | None = None

    def adapter(self, request: Request) -> Adapter | None:
        if self._drafting is not None:
            self._drafting.know(request.params.user)
        tenant = self._find(request.params.user)
        brain = tenant.route(request.prompt_ids) if isinstance(tenant, Tenant) else None
        micro = (brain.micro.version, brain.micro.current) if brain is not None else None
        self._running[request.id] = request.params.user, brain, micro
        while len(self._running) > 2 * self.settings.remember:
            self._running.popitem(last=False)
        return brain.adapter() if brain is not None else None

    def observe(self, trajectory: Trajectory) -> None:
        if self._drafting is not None:
            self._drafting.observe(trajectory)
        user, brain, micro = self._running.pop(trajectory.request_id, (trajectory.params.user, None, None))
        answer = _Answer(trajectory, user, brain, micro)
        self._answers[trajectory.request_id] = answer
        while len(self._answers) > self.settings.remember:
            self._answers.popitem(last=False)
        if not self.settings.instant or trajectory.hidden is None:
            answer.reason = "the preview is switched off, or hidden states were not recorded"
            return
        self._untraced.append(answer)
        self._held += trajectory.hidden.nbytes
        while self._held > _HELD_BYTES:
            self._drop_hidden(self._untraced.popleft(), "too many answers came after it")
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
        if answer.trace is None and answer in self._untraced:
            self._trace(answer)
        brain = answer.brain or tenant.route(answer.trajectory.prompt_ids)
        example = replace(answer.example, quality=quality, time=now)
        trace = answer.trace
        example = tenant.remember(example, (trace.a, trace.b) if trace is not None else None)
        before, nats = brain.version if brain is not None else "", 0.0
        status, reason = "deferred", answer.reason
        if trace is not None and brain is not None:
            step = brain.micro.learn(trace, quality)
            status, reason, nats = ("applied" if step.applied else "deferred"), step.reason, step.nats or 0.0
        tenant.learn_later(example)
        self._plan(tenant)
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
        return FeedbackResult(status, after, reason if status != "applied" else "")  # type: ignore[arg-type]

    def teach(
        self, user: str, prompt_ids: tuple[int, ...], output_ids: tuple[int, ...], quality: float
    ) -> FeedbackResult:
        """Feedback on an answer that was not given here; nothing is known of how it was drawn, so it is deferred."""
        if not prompt_ids or not output_ids:
            raise LearningError("a prompt and an answer of at least one token each are needed")
        tenant, now = self._open(user), time.time()
        if (refusal := tenant.ledger.feedback(now)) is not None:
            return FeedbackResult("refused", "", str(refusal))
        example = tenant.remember(Example(f"taught-{now:.6f}", prompt_ids, output_ids, quality, 0.0, time=now), None)
        tenant.learn_later(example)
        self._plan(tenant)
        return FeedbackResult("deferred", "", "the answer was not drawn here, so it takes a forward pass")

    def tick(self, budget_s: float) -> bool:
        return self._schedule.run(budget_s)

    def state_dict(self) -> dict[str, Any]:
        """The files of every user that is known here, by name and as bytes."""
        found = {}
        for user, tenant in self._tenants.items():
            if isinstance(tenant, Tenant):
                found[user] = tenant.files()
        return found

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Put those files in place of what there is. Raises `LearningError` if they are not of this model."""
        for user, files in state.items():
            if isinstance(tenant := self._tenants.pop(user, None), Tenant):
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
        self._schedule.drop()
        if self._drafting is not None:
            self._drafting.close()
        for tenant in self._tenants.values():
            if isinstance(tenant, Tenant):
                tenant.close()
        self._tenants.clear()
        self.study.close()

    def deepen(self, user: str = "") -> None:
        """Have the deep loop train on all that `user` ever rated, in idle time. Raises `LearningError`."""
        tenant = self._open(user)
        if not self._schedule.has(name := f"deep {tenant.folder.name}"):
            self._schedule.add(name, self.study.deep(tenant), rank=3)

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

    def _find(self, user: str) -> Tenant | LearningError | None:
        """A user's memory if there is any; what is wrong with it is said once, and answers go on without."""
        if user not in self._tenants and (self.folder / folder_name(user)).is_dir():
            try:
                self._tenants[user] = self._make(user)
                self._plan(self._tenants[user])
            except LearningError as error:
                _log.warning("answers do without what was learned", user=user, reason=str(error))
                self._tenants[user] = error
        return self._tenants.get(user)

    def _open(self, user: str) -> Tenant:
        found = self._find(user)
        if isinstance(found, LearningError):
            raise found
        if found is None:
            found = self._tenants[user] = self._make(user)
        return found

    def _make(self, user: str) -> Tenant:
        return Tenant(self.folder / folder_name(user), user, self._context.spec, self.settings, self._pooler)

    def _plan(self, tenant: Tenant | LearningError) -> None:
        """Queue what has become due for a user."""
        if isinstance(tenant, LearningError):
            return
        name = tenant.folder.name
        waiting = self.settings.background and any(brain.pending for brain in tenant.brains.values())
        if waiting and not self._schedule.has(f"learn {name}"):
            self._schedule.add(f"learn {name}", self.study.learn(tenant), rank=1)
        if tenant.bank.due and not self._schedule.has(f"maintain {name}"):
            self._schedule.add(f"maintain {name}", tenant.maintain(), rank=2)

    def _version(self, tenant: Tenant, answer: _Answer) -> str:
        brain = answer.brain or tenant.route(answer.trajectory.prompt_ids)
        return brain.version if brain is not None else ""

    def _trace_all(self) -> Iterator[None]:
        while self._untraced:
            self._trace(self._untraced[0])
            yield

    def _trace(self, answer: _Answer) -> None:
        self._untraced.remove(answer)
        done, params = answer.trajectory, answer.trajectory.params
        count = len(done.drawn_from)
        answer.reason = why_untraceable(done.hidden, done.output_ids, done.drawn_from, params.temperature)
        if not answer.reason and answer.brain is None:
            answer.brain = self._open(answer.user).route(done.prompt_ids)
        if not answer.reason and answer.brain is not None:
            version, delta = answer.micro or (answer.brain.micro.version, answer.brain.micro.current)
            assert done.hidden is not None
            answer.trace = eligibility(
                done.hidden[:count],
                done.output_ids[:count],
                done.drawn_from,
                params.temperature,
                delta,
                self._head,
                version=version,
                repetition_penalty=params.repetition_penalty,
                prompt_ids=done.prompt_ids,
            )
        self._drop_hidden(answer, answer.reason)

    def _drop_hidden(self, answer: _Answer, reason: str) -> None:
        if answer.trajectory.hidden is not None:
            self._held -= answer.trajectory.hidden.nbytes
        answer.trajectory, answer.reason = replace(answer.trajectory, hidden=None, drawn_from=()), reason
