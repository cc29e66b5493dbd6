"""`Study`: what the background and the deep loop do, in slices, with the learning network."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import replace
from typing import TYPE_CHECKING, TypeVar

from ruvllm_core.errors import LearningError
from ruvllm_core.log import get_logger
from ruvllm_core.protocols import LearningContext
from ruvllm_sona.anchors import anchor_tokens
from ruvllm_sona.brain import Brain
from ruvllm_sona.checkpoint import load_progress, save_progress
from ruvllm_sona.frames import Record
from ruvllm_sona.gate import Gate, GateConfig, Verdict
from ruvllm_sona.patterns import SHARED
from ruvllm_sona.records import Example
from ruvllm_sona.settings import SonaSettings
from ruvllm_sona.sites import Deltas, linear_sites
from ruvllm_sona.tenant import Tenant

if TYPE_CHECKING:
    from ruvllm_sona.measure import NetworkMeasure
    from ruvllm_sona.network import Network

T = TypeVar("T")
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

    def close(self) -> None:
        """Wait for files that are being written."""
        self._files.shutdown()

    def learn(self, tenant: Tenant) -> Iterator[None]:
        """Learn from all rated answers that wait, publish what passes the gate, and save."""
        while waiting := [brain for brain in tenant.brains.values() if brain.pending]:
            for brain in waiting:
                yield from self._learn(tenant, brain)
        yield from self._elsewhere(tenant.save)

    def deep(self, tenant: Tenant) -> Iterator[None]:
        """Train an adapter of higher rank on all that was ever rated, and publish it if it passes the gate.

        Every round is put on the disk; the next call goes on after the last one. Raises `LearningError` if there is
        nothing to tell good from bad by.
        """
        from ruvllm_sona.deep import DeepConfig, deep

        network, _ = yield from self._network()
        brain, path = tenant.brain(SHARED), tenant.folder / "deep.safetensors"
        examples = [self._shortened(one) for one in tenant.examples()]
        anchors = self._anchors(examples)
        covers = examples[-1].sequence if examples else 0
        shapes, last = linear_sites(self._context.spec), load_progress(path, covers)
        for found in deep(network, shapes, examples, anchors, DeepConfig(), resume=last):
            if found is not None:
                last = found
                yield from self._elsewhere(lambda done=found: save_progress(path, done, covers))
                _log.info("deep training", user=tenant.name, epoch=found.epoch, margin=round(found.margin, 4))
            yield None
        path.unlink(missing_ok=True)
        if last is None or last.deltas is None:
            tenant.audit.append("reject", actor="deep", note="held-out answers were told apart no better than before")
            return
        verdict = yield from self._judge(last.deltas, (1.0, 0.5, 0.25))
        if verdict.passed and verdict.deltas is not None:
            yield from self._publish(tenant, brain, verdict, covers, "deep", {"margin": last.best})
            brain.rebase(verdict.deltas)
            yield from self._elsewhere(tenant.save)
        else:
            self._rejected(tenant, brain, verdict, "deep")

    def _learn(self, tenant: Tenant, brain: Brain) -> Generator[None, None, None]:
        network, _ = yield from self._network()
        learner, good, covers, predicted = brain.learner, brain.learner.state(), brain.covers, 0.0
        learned = 0
        while brain.pending and learned < _AT_ONCE:
            example, advantage = brain.pending.popleft()
            covers = max(covers, example.sequence)
            if advantage == 0.0:
                continue
            before = learner.state()
            try:
                learner.rate(self._settings.learning_rate * brain.backoff.step)
                for _ in learner.step(network, [self._shortened(example)], [advantage]):
                    yield None
            except LearningError as error:
                self._refused(tenant, brain, example, str(error))
                continue
            nats = abs(learner.predicted) * min(len(example.output_ids), self._settings.max_answer)
            if (refusal := tenant.ledger.allow(nats, example.time)) is not None:
                learner.restore(before)
                self._refused(tenant, brain, example, str(refusal))
                continue
            learned, predicted = learned + 1, predicted + learner.predicted
        if not learned:
            brain.covers = covers
            return
        verdict = yield from self._judge(brain.candidate(), brain.backoff.scales)
        brain.backoff.note(verdict)
        if verdict.passed and verdict.deltas is not None:
            yield from self._publish(tenant, brain, verdict, covers, "background", {"loss": -predicted})
            if verdict.scale != 1.0:
                brain.rebase(verdict.deltas)
        else:
            learner.restore(good)
            brain.covers = covers
            brain.forget_preview()
            self._rejected(tenant, brain, verdict, "background")

    def _publish(
        self, tenant: Tenant, brain: Brain, verdict: Verdict, covers: int, actor: str, predicted: dict[str, float]
    ) -> Generator[None, None, None]:
        before, deltas = brain.number, verdict.deltas
        assert deltas is not None
        number = yield from self._elsewhere(lambda: brain.publish(deltas, verdict.record(), covers))
        brain.adopt(deltas, covers)
        tenant.bank.patterns[tenant.pattern_of(brain)].version = str(number)
        tenant.log.append(Record("published", 0.0, version=number, covers=covers))
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

    def _rejected(self, tenant: Tenant, brain: Brain, verdict: Verdict, actor: str) -> None:
        reasons = "; ".join(verdict.reasons)
        _log.info("a new version did not pass the gate", user=tenant.name, reason=reasons)
        tenant.audit.append("reject", actor=actor, before=str(brain.number), after=str(brain.number), note=reasons)

    def _refused(self, tenant: Tenant, brain: Brain, example: Example, reason: str) -> None:
        _log.info("an answer was not learned from", user=tenant.name, reason=reason)
        number = str(brain.number)
        tenant.audit.append(
            "refuse", actor="background", before=number, after=number, request_id=example.request_id, note=reason
        )

    def _judge(self, candidate: Deltas, scales: Sequence[float]) -> Generator[None, None, Verdict]:
        _, measure = yield from self._network()
        if self._gate is None:
            from ruvllm_sona.measure import weight_norms

            sites = list(linear_sites(self._context.spec))
            norms = yield from weight_norms(self._context.weights, sites, self._context.spec.hidden_size)
            limits = GateConfig(max_mean_loss=self._settings.max_loss, max_kl=self._settings.max_kl)
            self._gate = Gate(self._anchors(()), norms, limits)
        return (yield from self._gate.check(measure, candidate, scales=scales))

    def _network(self) -> Generator[None, None, tuple[Network, NetworkMeasure]]:
        if self._made is None:
            from ruvllm_sona.measure import NetworkMeasure
            from ruvllm_sona.network import Network

            network = Network(self._context.spec, self._context.weights)
            yield None
            yield from network.load()
            self._made = network, NetworkMeasure(network)
        return self._made

    def _anchors(self, examples: Sequence[Example]) -> list[tuple[int, ...]]:
        """Texts that are to stay as likely as they are. Where there is no tokenizer, single tokens stand for them."""
        if self._context.tokenizer is not None:
            return list(anchor_tokens(self._context.tokenizer, self._settings.anchors))
        size = self._context.spec.vocab_size
        return [tuple(range(start, min(start + 16, size))) for start in range(0, size - _LEAST_ANCHOR, size // 8)]

    def _shortened(self, example: Example) -> Example:
        room = min(self._settings.max_answer, self._context.spec.max_context - len(example.prompt_ids))
        return replace(example, output_ids=example.output_ids[: max(room, 1)])

    def _elsewhere(self, work: Callable[[], T]) -> Generator[None, None, T]:
        """Have `work` done by the thread that writes files, and wait for it in slices."""
        future: Future[T] = self._files.submit(work)
        while not future.done():
            wait([future], timeout=0.002)
            yield None
        return future.result()
