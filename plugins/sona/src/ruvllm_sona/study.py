"""`Study`: what the background and the deep loop do, in slices, with the learning network."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias, TypeVar

from ruvllm_core.decode.lora import FINAL_SITE
from ruvllm_core.errors import LearningError
from ruvllm_core.log import get_logger
from ruvllm_core.protocols import LearningContext
from ruvllm_sona.anchors import CHATS, anchor_tokens
from ruvllm_sona.brain import Brain
from ruvllm_sona.frames import Record
from ruvllm_sona.gate import PARTS, RESCUE, Gate, GateConfig, Verdict, scaled
from ruvllm_sona.holding import ANSWERS, Holding
from ruvllm_sona.leash_texts import leash_piece, leash_tokens
from ruvllm_sona.patterns import SHARED
from ruvllm_sona.records import Example
from ruvllm_sona.settings import SonaSettings
from ruvllm_sona.sites import Deltas, linear_sites
from ruvllm_sona.tenant import DEEP, DISTILL, Tenant

if TYPE_CHECKING:
    from ruvllm_sona.curvature import Hold
    from ruvllm_sona.distilling import LargeTeacher
    from ruvllm_sona.measure import NetworkMeasure
    from ruvllm_sona.network import Network

T = TypeVar("T")
#: A job in slices; what it yields is nothing, or a future that it waits for.
Work: TypeAlias = Generator[object, None, T]
_READ = 32  # records of a log in one slice
_AT_ONCE = 8  # answers that one publication may learn from, when many are waiting
_LEAST_ANCHOR = 2
_log = get_logger("sona")


class Study:
    """The learning network of a model, made when it is first needed, and the jobs that use it.

    Files are written by a thread of its own: putting them on the disk takes longer than a slice may.
    """

    def __init__(self, context: LearningContext, settings: SonaSettings) -> None:
        self._context, self._settings = context, settings
        self._files = ThreadPoolExecutor(1, thread_name_prefix="ruvllm-sona-files")
        self._made: tuple[Network, NetworkMeasure] | None = None
        self._gate: Gate | None = None
        self._leash_texts: Sequence[Sequence[int]] | None = None

    def close(self) -> None:
        """Wait for files that are being written."""
        self._files.shutdown()

    def learn(self, tenant: Tenant) -> Work[None]:
        """Learn from all rated answers that wait, publish what passes the gate, and save."""
        while waiting := [brain for brain in tenant.brains.values() if brain.waiting]:
            for brain in waiting:
                if brain.pending:
                    yield from self._unless_changed(brain, self._learn(tenant, brain))
                if brain.holding is not None and brain.holding.due:
                    yield from self._unless_changed(brain, self._consolidate(tenant, brain, brain.holding))
        yield from self.elsewhere(tenant.snapshot())

    def deep(self, tenant: Tenant) -> Work[None]:
        """Train an adapter of higher rank on all that was ever rated, and publish it if it passes the gate.

        Every round is put on the disk; the next call goes on after the last one. Raises `LearningError` if there is
        nothing to tell good from bad by.
        """
        brain = tenant.brain(SHARED)
        yield from self._unless_changed(brain, self._deep(tenant, brain))

    def _deep(self, tenant: Tenant, brain: Brain) -> Work[None]:
        network, _ = yield from self._network()
        from ruvllm_sona.checkpoint import load_progress, save_progress
        from ruvllm_sona.deep import DeepConfig, deep

        path, examples = tenant.folder / DEEP, []
        for number, one in enumerate(tenant.examples()):
            examples.append(self._shortened(one))
            if number % _READ == 0:
                yield None
        texts = yield from self._texts()
        covers = examples[-1].sequence if examples else 0
        shapes, last = linear_sites(self._context.spec), load_progress(path, covers)
        for found in deep(network, shapes, examples, texts, DeepConfig(), resume=last):
            if found is not None:
                last = found
                yield from self.elsewhere(partial(save_progress, path, found, covers))
                _log.info("deep training", user=tenant.name, epoch=found.epoch, margin=round(found.margin, 4))
            yield None
        if last is None or last.deltas is None:
            path.unlink(missing_ok=True)
            tenant.audit.append("reject", actor="deep", note="held-out answers were told apart no better than before")
            return
        yield from self._replace(tenant, brain, last.deltas, covers, "deep", {"margin": last.best}, path)

    def distill(self, tenant: Tenant, large: LargeTeacher | None = None, steps: int = 100) -> Work[None]:
        """Distil the adapters of all patterns, or another model, into the shared adapter (see `distilling`).

        It is published if it has come nearer to its teachers and passes the gate. Yields a `DistillProgress` after
        every step. Raises `LearningError` if there is nothing to distil.
        """
        brain = tenant.brain(SHARED)
        yield from self._unless_changed(brain, self._distill(tenant, brain, large, steps))

    def _distill(self, tenant: Tenant, brain: Brain, large: LargeTeacher | None, steps: int) -> Work[None]:
        from ruvllm_sona.distilling import distilling

        last = yield from distilling(tenant, self._network(), self._context, large, steps, self.elsewhere)
        assert last.after is not None and last.deltas is not None
        nearer, path = {"kl_before": last.before, "kl_after": last.after}, tenant.folder / DISTILL
        if last.after >= last.before:
            path.unlink(missing_ok=True)
            note = f"from {last.before:.3g} to {last.after:.3g} nats a token: no nearer to the teacher"
            number = str(brain.number)
            tenant.audit.append("reject", actor="distill", before=number, after=number, predicted=nearer, note=note)
            return
        yield from self._replace(tenant, brain, last.deltas, brain.covers, "distill", nearer, path)

    def _replace(
        self,
        tenant: Tenant,
        brain: Brain,
        deltas: Deltas,
        covers: int,
        actor: str,
        predicted: dict[str, float],
        path: Path,
    ) -> Work[None]:
        """Publish what was trained beside the background loop, if it passes the gate; then `path` is not needed."""
        verdict = yield from self.judge(deltas)
        path.unlink(missing_ok=True)
        if verdict.passed and verdict.deltas is not None:
            yield from self._publish(tenant, brain, verdict, covers, actor, predicted)
            brain.rebase(verdict.deltas, "anew")
            brain.life = object()  # the background loop begins again, on top of this
            yield from self.elsewhere(tenant.snapshot())
        else:
            self._rejected(tenant, brain, verdict, actor)

    def _unless_changed(self, brain: Brain, work: Work[None]) -> Work[None]:
        """`work`, up to the moment at which somebody rolls `brain` back or has it forget: that must not be undone."""
        life = brain.life
        try:
            for found in work:
                yield found
                if brain.life is not life:
                    return
        finally:
            work.close()
            if brain.life is life:
                brain.put_back()

    def _learn(self, tenant: Tenant, brain: Brain) -> Work[None]:
        network, _ = yield from self._network()
        learner, covers, predicted, learned = brain.learner, brain.covers, 0.0, 0
        yield None
        holds = (yield from self._holds(tenant, brain)) if brain.holding is not None else ()
        texts = yield from self._texts()
        while brain.pending and learned < _AT_ONCE:
            example, advantage = brain.take()
            covers = max(covers, example.sequence)
            yield None
            if advantage == 0.0:
                continue
            revert = learner.snapshot()
            yield None
            try:
                learner.rate(self._settings.learning_rate * brain.backoff.step)
                pieces = [leash_piece(texts, learner.steps)] if texts else []
                answer = self._shortened(example)
                for _ in learner.step(network, [answer], [advantage], holds=holds, texts=pieces):
                    yield None
            except (LearningError, RuntimeError, ValueError, IndexError) as error:  # an answer must not block the rest
                revert()
                self._refused(tenant, brain, example, str(error))
                continue
            nats = abs(learner.predicted) * min(len(example.output_ids), self._settings.max_answer)
            paid = example.sequence <= tenant.free_until
            if not paid and (refusal := tenant.ledger.allow(nats, time.time())) is not None:
                revert()
                tenant.refused.add(example.sequence)
                self._refused(tenant, brain, example, str(refusal))
                continue
            learned, predicted = learned + 1, predicted + learner.predicted
            yield None
        if not learned:
            brain.settle(covers)
            return
        candidate = brain.candidate()
        yield None
        verdict = yield from self._judge(candidate, brain.backoff.scales)
        brain.backoff.note(verdict)
        if verdict.passed and verdict.deltas is not None:
            yield from self._publish(tenant, brain, verdict, covers, "background", {"loss": -predicted})
            tenant.learned += learned
            if brain.holding is not None:
                brain.holding.since += learned
            if verdict.scale != 1.0:
                brain.rebase(verdict.deltas, "still")
        else:
            brain.undo()
            brain.settle(covers)
            brain.forget_preview()
            self._rejected(tenant, brain, verdict, "background")

    def _publish(
        self, tenant: Tenant, brain: Brain, verdict: Verdict, covers: int, actor: str, predicted: dict[str, float]
    ) -> Work[None]:
        before, deltas, life = brain.number, verdict.deltas, brain.life
        assert deltas is not None
        number = yield from self.elsewhere(lambda: brain.publish(deltas, verdict.record(), covers, life))
        if actor != "background":
            brain.put_back()  # what the background loop has in hand is not in this version
        brain.adopt(number, deltas, covers)
        brain.away = verdict.figures.text_kl
        tenant.bank.patterns[tenant.pattern_of(brain)].version = str(number)
        tenant.log.append(Record("published", time.time(), version=number, covers=covers))
        measured = {
            name: value for name, value in verdict.record()["figures"].items() if isinstance(value, int | float)
        }
        tenant.audit.append(
            "publish" if actor == "background" else actor,
            actor=actor,
            before=str(before),
            after=str(number),
            predicted=predicted,
            measured=measured,
        )

    def _holds(self, tenant: Tenant, brain: Brain) -> Work[Sequence[Hold]]:
        """What the steps of `brain` are held by; a file of it that is damaged holds nothing, and is told of."""
        holding = brain.holding
        assert holding is not None
        if not holding.looked:
            try:
                yield from holding.load(linear_sites(self._context.spec), brain.below, self.elsewhere)
            except LearningError as error:
                _log.warning("what was learned is not held", user=tenant.name, reason=str(error))
            brain.hold_preview()
        return holding.holds

    def _consolidate(self, tenant: Tenant, brain: Brain, holding: Holding) -> Work[None]:
        """Hold what `brain` has learned up to now (see `Holding`)."""
        network, _ = yield from self._network()
        latest = yield from self._latest(tenant, brain, ANSWERS)
        life, stack = brain.life, brain.learner.learned()
        yield None
        try:
            if not latest:
                raise LearningError("no rated answer is left of what was learned")
            kept = yield from holding.consolidate(network, stack, list(latest), brain.below, self.elsewhere)
            brain.hold_preview()
            yield from self.elsewhere(partial(brain.keep, kept, life))
        except (LearningError, RuntimeError, ValueError, IndexError) as error:  # learning must go on
            holding.since = 0
            _log.warning("what was learned could not be consolidated", user=tenant.name, reason=str(error))
            return
        note = f"answers {len(latest)}, consolidation {kept.count}"
        version = str(brain.number)
        tenant.audit.append("consolidate", actor="background", before=version, after=version, note=note)

    def _latest(self, tenant: Tenant, brain: Brain, count: int) -> Work[deque[Example]]:
        """The last answers that `brain` has learned from."""
        latest: deque[Example] = deque(maxlen=count)
        for number, one in enumerate(tenant.examples()):
            learned = one.sequence <= brain.covers and one.sequence not in tenant.refused
            if learned and tenant.route(one.prompt_ids) is brain:
                latest.append(self._shortened(one))
            if number % _READ == 0:
                yield None
        return latest

    def preview(self, tenant: Tenant) -> Work[None]:
        """Judge the previews in force as whatever is published is, and take back what does not pass."""
        for brain in list(tenant.brains.values()):
            while brain.unjudged and brain in tenant.brains.values():
                yield from self._preview(tenant, brain)

    def _preview(self, tenant: Tenant, brain: Brain) -> Work[None]:
        micro, version, begun = brain.micro, brain.micro.version, brain.begun
        delta, reasons = {FINAL_SITE: micro.current}, ""
        if (away := brain.away) is None:
            published = brain.published
            away = ((yield from self._judge(published, RESCUE[:1])).figures.text_kl or 0.0) if published else 0.0
            if brain.begun is not begun:
                return
            brain.away = away
        for part in PARTS:
            verdict = yield from self._judge({**brain.published, **scaled(delta, part)}, RESCUE[:1])
            if brain.begun is not begun or version not in micro.versions:
                return  # what was judged is gone
            added = (verdict.figures.text_kl or 0.0) - away
            if verdict.passed and added <= self._settings.preview_kl:
                self._accept(brain, version, part)
                return
            reasons = reasons or "; ".join(verdict.reasons)
            reasons = reasons or f"adds {added:.4g} nats per token on texts, allowed is {self._settings.preview_kl:.4g}"
        before = brain.version
        brain.take_back()
        _log.info("a preview did not pass the gate", user=tenant.name, reason=reasons)
        tenant.audit.append("reject", actor="instant", before=before, after=brain.version, note=reasons)

    def _accept(self, brain: Brain, version: str, part: float) -> None:
        """That part of a preview may stay; of one that has moved on meanwhile the newer one is judged next."""
        if part == 1.0:
            brain.accepted = version
        elif brain.micro.version == version:
            brain.micro.shrink(part)
            brain.accepted = brain.micro.version
            _log.info("a preview was made smaller", version=version, part=part)

    def _rejected(self, tenant: Tenant, brain: Brain, verdict: Verdict, actor: str) -> None:
        reasons = "; ".join(verdict.reasons)
        tenant.rejected += 1
        _log.info("a new version did not pass the gate", user=tenant.name, reason=reasons)
        tenant.audit.append("reject", actor=actor, before=str(brain.number), after=str(brain.number), note=reasons)

    def _refused(self, tenant: Tenant, brain: Brain, example: Example, reason: str) -> None:
        _log.info("an answer was not learned from", user=tenant.name, reason=reason)
        number = str(brain.number)
        tenant.audit.append(
            "refuse", actor="background", before=number, after=number, request_id=example.request_id, note=reason
        )

    def judge(self, candidate: Deltas) -> Work[Verdict]:
        """The gate's verdict on what was not learned step by step; the largest part of it that passes."""
        return (yield from self._judge(candidate, PARTS))

    def _judge(self, candidate: Deltas, scales: Sequence[float]) -> Work[Verdict]:
        _, measure = yield from self._network()
        if self._gate is None:
            from ruvllm_sona.measure import weight_norms

            sites = list(linear_sites(self._context.spec))
            norms = yield from weight_norms(self._context.weights, sites, self._context.spec.hidden_size)
            limits = GateConfig(max_mean_loss=self._settings.max_loss, max_kl=self._settings.max_kl)
            chats = 0 if self._context.tokenizer is None else len(CHATS)
            self._gate = Gate((yield from self._anchors()), norms, limits, chats=chats)
        return (yield from self._gate.check(measure, candidate, scales=scales))

    def _network(self) -> Work[tuple[Network, NetworkMeasure]]:
        if self._made is None:
            made = yield from self.elsewhere(self._make_network)
            yield from made[0].load()
            self._made = self._made or made
        return self._made

    def _make_network(self) -> tuple[Network, NetworkMeasure]:
        from ruvllm_sona.learner import warm_up
        from ruvllm_sona.measure import NetworkMeasure
        from ruvllm_sona.network import Network

        warm_up()
        network = Network(self._context.spec, self._context.weights)
        return network, NetworkMeasure(network)

    def _anchors(self) -> Work[list[tuple[int, ...]]]:
        """Texts that are to stay as likely as they are. Where there is no tokenizer, single tokens stand for them."""
        if (tokenizer := self._context.tokenizer) is not None:
            return list((yield from self.elsewhere(lambda: anchor_tokens(tokenizer, self._settings.anchors))))
        size = self._context.spec.vocab_size
        return [tuple(range(start, min(start + 16, size))) for start in range(0, size - _LEAST_ANCHOR, size // 8)]

    def _texts(self) -> Work[Sequence[Sequence[int]]]:
        """Texts that nobody rated; none where there is no tokenizer."""
        if self._leash_texts is None:
            tokenizer = self._context.tokenizer
            made = (yield from self.elsewhere(partial(leash_tokens, tokenizer))) if tokenizer is not None else ()
            self._leash_texts = made
        return self._leash_texts

    def _shortened(self, example: Example) -> Example:
        room = min(self._settings.max_answer, self._context.spec.max_context - len(example.prompt_ids))
        return replace(example, output_ids=example.output_ids[: max(room, 1)])

    def elsewhere(self, work: Callable[[], T]) -> Work[T]:
        """Have `work` done by the thread that may wait for the disk; yields what it waits for."""
        future = self._files.submit(work)
        while not future.done():
            yield future
        return future.result()
