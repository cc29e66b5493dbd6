"""`SonaLLM`: a model that is asked and taught by texts, for programs that want no more than that.

>>> with SonaLLM(SonaConfig(model="smollm2")) as llm:
...     answer = llm.generate("Name a colour.")
...     llm.instant_adapt("Name a colour.", answer.text, 1.0)
"""

from __future__ import annotations

import contextvars
import time
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

from ruvllm_core import Engine, GenerateParams, Generation, Registry, Settings, load_settings
from ruvllm_core.errors import LearningError
from ruvllm_core.protocols import FeedbackResult
from ruvllm_sona.loop import MADE, SonaLoop
from ruvllm_sona.patterns import SHARED
from ruvllm_sona.settings import SonaSettings

T = TypeVar("T")
_REMEMBERED = 1000


@dataclass(frozen=True)
class SonaConfig:
    """What to load and how to learn.

    Attributes:
        model: as for `Engine.load`.
        user: whose model it is; what one user teaches, no other gets.
        data_dir: where models and what was learned are kept; None is where `settings` say.
        learning: how it learns.
        settings: everything else; None reads them as every command does.
    """

    model: str | Path = "smollm2"
    user: str = ""
    data_dir: Path | None = None
    learning: SonaSettings = field(default_factory=SonaSettings)
    settings: Settings | None = None


@dataclass(frozen=True)
class InstantResult:
    """What became of a verdict; see `ruvllm_core.protocols.FeedbackResult` for `status`.

    Attributes:
        before, after: versions of the adapter; they differ if and only if `status` is ``applied``.
        generated: whether it was this model that gave the answer, so that how it was drawn is known.
    """

    status: Literal["applied", "deferred", "refused"]
    before: str
    after: str
    reason: str
    generated: bool


@dataclass(frozen=True)
class BackgroundResult:
    """What the background loop did.

    Attributes:
        samples_used: answers that the new versions were made of.
        before, after: numbers of the published version.
        rejected: candidates that did not pass the gate.
        waiting: answers that it has not learned from yet.
    """

    samples_used: int
    before: int
    after: int
    rejected: int
    waiting: int


@dataclass(frozen=True)
class DeepResult:
    """What deep training came to: a new version, or the reason why there is none."""

    published: bool
    before: int
    after: int
    samples: int
    reason: str


@dataclass(frozen=True)
class SonaStats:
    """How a user's memory stands.

    Attributes:
        version: of the adapter in force; empty is the base model.
        published: its number; 0 is the base model.
        feedback: verdicts in the log.
        waiting: of them, those that were not learned from yet.
        learned, rejected: answers in versions, and candidates that did not pass the gate, since it was opened.
        baseline: running mean of the verdicts.
        nats_last_hour: that were spent, of those that settings allow.
    """

    version: str
    published: int
    feedback: int
    waiting: int
    learned: int
    rejected: int
    baseline: float
    nats_last_hour: float


class SonaLLM:
    """An engine with this plugin's learning loop, for one user. Any thread may use it.

    Raises what `Engine.load` raises.
    """

    def __init__(self, config: SonaConfig | None = None) -> None:
        self.config = config or SonaConfig()
        given = self.config.settings if self.config.settings is not None else load_settings()
        own = self.config.learning.model_dump(exclude_unset=True)
        update: dict[str, Any] = {"learning": ["sona"], "plugins": {**given.plugins, "sona": own}}
        if self.config.data_dir is not None:
            update["cache_dir"] = self.config.data_dir
        settings, made = given.model_copy(update=update), list[SonaLoop]()
        # In a context of its own, so that no other engine's loop is taken for ours.
        self.engine = contextvars.copy_context().run(_load, self.config.model, settings, made.append)
        self._loop = made[0]
        self._answers: OrderedDict[tuple[str, str], str] = OrderedDict()
        self._seen = self._on(self._progress)

    def generate(self, query: str, params: GenerateParams | None = None) -> Generation:
        """Answer `query` with what was learned. Raises what `Engine.generate` raises."""
        params = params or GenerateParams(**(self.config.settings or load_settings()).sampling.model_dump())
        done = self.engine.generate(query, params.model_copy(update={"user": self.config.user}))
        self._answers[query, done.text] = done.request_id
        while len(self._answers) > _REMEMBERED:
            self._answers.popitem(last=False)
        return done

    def instant_adapt(self, query: str, response: str, quality: float) -> InstantResult:
        """A verdict from 0 to 1 on an answer.

        If `generate` gave it, how it was drawn is known, and the next answer may be another one already. Else it is
        ``deferred``: the background loop computes with a real pass through the network what it takes.

        Raises `LearningError` for a quality or an answer that makes no sense, or if the user's memory is in use.
        """
        if not 0.0 <= quality <= 1.0:
            raise LearningError(f"quality is {quality}, expected a number from 0 (bad) to 1 (good)")
        prompt = tuple(self.engine.encode_prompt(query))
        request_id, user = self._answers.get((query, response)), self.config.user
        output = tuple(self.engine.tokenizer.encode(response, add_special=False, parse_special=False))
        if not output:
            raise LearningError("the answer is empty", hint="give a text that was, or could have been, the answer")
        if (end := self.engine.tokenizer.eos_id) is not None:
            output += (end,)

        def work() -> tuple[str, FeedbackResult, bool]:
            found = self._loop.tenant(user).route(prompt)
            before = found.version if found is not None else ""
            if request_id is not None and self._loop.knows(request_id):
                return before, self._loop.feedback(request_id, quality), True
            return before, self._loop.teach(user, prompt, output, quality), False

        before, result, generated = self._on(work)
        return InstantResult(result.status, before, result.version, result.reason, generated)

    def maybe_background(self, budget_s: float = 0.1) -> BackgroundResult | None:
        """Give the background loop `budget_s` seconds; what it has done since the last call, None if that is nothing.

        It also learns by itself whenever the engine is idle.
        """
        ends = time.monotonic() + budget_s

        def work() -> tuple[int, int, int, int]:
            while (left := ends - time.monotonic()) > 0.0 and self._loop.work(left):
                pass
            return self._progress()

        seen, now = self._seen, self._on(work)
        if now[:3] == seen[:3]:
            return None
        self._seen = now
        return BackgroundResult(now[1] - seen[1], seen[0], now[0], now[2] - seen[2], now[3])

    def deep(self) -> DeepResult:
        """Train on all that was ever rated; blocks for minutes. What was begun and ended early goes on where it was.

        Raises `LearningError` if there are not both good and bad answers, or it is under way already.
        """
        ended: Future[None] = Future()

        def hear(error: Exception | None) -> None:
            if error is None:
                ended.set_result(None)
            else:
                ended.set_exception(error)

        def begin() -> tuple[int, int, int]:
            tenant = self._loop.tenant(self.config.user)
            self._loop.deepen(self.config.user, hear)
            return tenant.brain(SHARED).number, tenant.audit.head.entry, sum(1 for _ in tenant.examples())

        before, since, samples = self._on(begin)
        ended.result()
        said = self._on(lambda: self._loop.tenant(self.config.user).said("deep", since))
        published = said is not None and said.action == "deep"
        after = self._on(self._progress)[0]
        reason = "" if published or said is None else said.note
        return DeepResult(
            published, before, after, samples, reason or ("" if published else "it was changed meanwhile")
        )

    def stats(self) -> SonaStats:
        """How it stands now."""

        def work() -> SonaStats:
            tenant = self._loop.tenant(self.config.user)
            brain = tenant.brain(SHARED)
            return SonaStats(
                version=brain.version,
                published=brain.number,
                feedback=sum(1 for _ in tenant.examples()),
                waiting=self._progress()[3],
                learned=tenant.learned,
                rejected=tenant.rejected,
                baseline=tenant.bank.patterns[SHARED].baseline,
                nats_last_hour=tenant.ledger.spent(time.time()).hour,
            )

        return self._on(work)

    def close(self) -> None:
        """Put what was learned where it lasts, and free everything. May be called again."""
        self.engine.close()

    def __enter__(self) -> SonaLLM:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _progress(self) -> tuple[int, int, int, int]:
        """Number of the version, answers learned, candidates rejected, answers that wait."""
        tenant = self._loop.tenant(self.config.user)
        waiting = sum(len(one.pending) + len(one.hand) for one in tenant.brains.values())
        return tenant.brain(SHARED).number, tenant.learned, tenant.rejected, waiting

    def _on(self, function: Callable[[], T]) -> T:
        """Run on the engine's thread, which is the only one that may talk to the loop."""
        future = self._loop.ask(function)
        if not future.done():
            self.engine.cache_stats()  # wakes the thread; then it looks after its loops
        return future.result()


def _load(model: str | Path, settings: Settings, hear: Callable[[SonaLoop], None]) -> Engine:
    MADE.set(hear)
    return Engine.load(model, settings=settings, registry=Registry.discover(settings))
