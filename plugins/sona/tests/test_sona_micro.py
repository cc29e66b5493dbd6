"""MicroLoRA: what a verdict changes, what bounds it, and what it never does."""

from __future__ import annotations

import dataclasses
import math
import threading
import time

import numpy as np
import pytest
from safetensors import numpy as safetensors

from ruvllm_core.errors import ConfigError, LearningError
from ruvllm_core.generate.sampler import Distribution
from ruvllm_core.model.quant import QuantTensor
from ruvllm_core.protocols import LowRank
from ruvllm_sona.ewc import Anchor, Fisher, penalty
from ruvllm_sona.micro import AdaptFeedback, MicroLoRA, MicroLoRAConfig
from ruvllm_sona.trace import Head, Trace, eligibility, gradients

WIDTH, VOCABULARY = 24, 50
HEAD = Head(QuantTensor.from_float(np.random.default_rng(99).normal(0.0, 0.4, (VOCABULARY, WIDTH)).astype(np.float32)))
GOOD = AdaptFeedback.from_quality(1.0)


def config(**changes: float) -> MicroLoRAConfig:
    return dataclasses.replace(MicroLoRAConfig.for_hidden_dim(WIDTH), **{"max_norm": 1e6, **changes})


class Answer:
    """States and the tokens drawn at them, as whatever adapter is in force then makes of them."""

    def __init__(self, micro: MicroLoRA, seed: int = 0, tokens: int = 12) -> None:
        random = np.random.default_rng(seed)
        self.hidden = random.normal(size=(tokens, WIDTH)).astype(np.float32)
        logs = self.logprobs(micro.current)
        self.ids = [int(random.choice(VOCABULARY, p=np.exp(each))) for each in logs]
        self.drawn = [Distribution(np.arange(VOCABULARY), np.exp(each)) for each in logs]

    def logprobs(self, delta: LowRank) -> np.ndarray:
        hidden = self.hidden.astype(np.float64)
        logits = (hidden + delta.scale * hidden @ delta.a.T @ delta.b.T) @ HEAD.rows(np.arange(VOCABULARY)).T
        logits -= logits.max(1, keepdims=True)
        return logits - np.log(np.exp(logits).sum(1, keepdims=True))

    def logprob(self, delta: LowRank) -> float:
        return float(self.logprobs(delta)[np.arange(len(self.ids)), self.ids].sum())

    def divergence(self, new: LowRank, old: LowRank) -> float:
        logs = self.logprobs(old)
        return float((np.exp(logs) * (logs - self.logprobs(new))).sum())

    def trace(self, micro: MicroLoRA) -> Trace:
        found = eligibility(self.hidden, self.ids, self.drawn, 1.0, micro.current, HEAD, version=micro.version)
        assert found is not None
        return found


def numbers(delta: LowRank) -> bytes:
    return delta.a.tobytes() + delta.b.tobytes()


@pytest.mark.parametrize("quality", [1.0, 0.7, 0.0])
def test_a_verdict_makes_its_answer_likelier_or_not(quality: float) -> None:
    micro = MicroLoRA(config(learning_rate=0.05))
    answer = Answer(micro)
    before = micro.current
    step = micro.learn(answer.trace(micro), quality)
    assert step.applied and step.version == micro.version and step.nats is not None
    change = answer.logprob(micro.current) - answer.logprob(before)
    assert change * (quality - 0.5) > 0
    assert change == pytest.approx(step.nats, rel=0.15)


def test_the_length_of_an_answer_does_not_set_the_step() -> None:
    """Twice the same tokens: twice the gradient, the same step."""
    found = []
    for repeats in (1, 2, 5):
        micro = MicroLoRA(config(learning_rate=1e-3))
        answer = Answer(micro)
        answer.hidden, answer.ids = np.tile(answer.hidden, (repeats, 1)), answer.ids * repeats
        answer.drawn = answer.drawn * repeats
        assert micro.learn(answer.trace(micro), 1.0).applied
        found.append(micro.current.b)
    np.testing.assert_allclose(found[1], found[0], rtol=1e-4, atol=1e-7)
    np.testing.assert_allclose(found[2], found[0], rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("trust", [0.01, 0.1, 0.5])
@pytest.mark.parametrize("quality", [1.0, 0.0, 0.6])
def test_trust_region(trust: float, quality: float) -> None:
    """However high the learning rate, neither the answer's log-probability nor the model moves further than allowed."""
    for seed in range(5):
        micro = MicroLoRA(config(learning_rate=1e9, trust_nats=trust))
        answer, before = Answer(micro, seed), micro.current
        step = micro.learn(answer.trace(micro), quality)
        allowed = trust * abs(quality - 0.5)
        assert step.applied and abs(step.nats or 0.0) <= allowed * (1 + 1e-5)
        assert abs(answer.logprob(micro.current) - answer.logprob(before)) <= 1.3 * allowed
        assert answer.divergence(micro.current, before) <= 1.3 * allowed


def test_the_second_order_binds_where_the_first_sees_nothing() -> None:
    """A trace with next to no slope, but much curvature, must not make a long step."""
    micro = MicroLoRA(config(learning_rate=1e9, trust_nats=1.0))
    tiny = Trace(0 * micro.current.a, np.full((WIDTH, 2), 1e-3, np.float32), 1, micro.version, curvature=4.0)
    before = micro.current.b
    assert micro.learn(tiny, 1.0).applied
    assert np.linalg.norm(micro.current.b - before) == pytest.approx(0.5 * np.linalg.norm(tiny.b), rel=1e-5)


def test_the_usual_verdict_teaches_nothing_in_the_end() -> None:
    micro = MicroLoRA(config(baseline_decay=0.5, saturation=0.0))
    nats = []
    for seed in range(12):
        nats.append(micro.learn(Answer(micro, seed).trace(micro), 0.9).nats or 0.0)
    assert micro.stats().baseline == pytest.approx(0.9, abs=1e-3)
    assert abs(nats[-1]) < 0.01 * abs(nats[0])
    usual = MicroLoRA(config(baseline=0.75))
    step = usual.learn(Answer(usual).trace(usual), 0.75)
    assert not step.applied and "usual" in step.reason


def test_saturation_is_kto_s() -> None:
    """The weight of a step is 4 σ(βr) σ(−βr), r being how much likelier than in the base model the answer is."""
    steps = {}
    for beta in (0.0, 0.3):
        micro = MicroLoRA(config(learning_rate=1e-4, trust_nats=1e6, saturation=beta))
        random = np.random.default_rng(3)
        moved = LowRank(micro.current.a, random.normal(0.0, 0.6, micro.current.b.shape).astype(np.float32), 1.0)
        arrays, metadata = micro.state()
        micro = MicroLoRA.restore({**arrays, "b": moved.b[None]}, metadata)
        trace = Answer(micro, 5).trace(micro)
        ratio = float((trace.b * moved.b).sum())
        steps[beta] = micro.learn(trace, 1.0).nats or 0.0
    sigmoid = 1.0 / (1.0 + math.exp(-0.3 * ratio))
    assert abs(ratio) > 2.0
    assert steps[0.3] / steps[0.0] == pytest.approx(4.0 * sigmoid * (1.0 - sigmoid), rel=1e-3)


def test_repeats_of_one_verdict_do_less_and_less() -> None:
    micro = MicroLoRA(config(learning_rate=0.5, baseline_decay=1.0, saturation=0.3))
    answer, gains = Answer(micro), []
    for _ in range(40):
        before = micro.current
        assert micro.learn(answer.trace(micro), 1.0).applied
        gains.append(answer.logprob(micro.current) - answer.logprob(before))
    assert min(gains) > 0.0 and gains[-1] < 0.1 * max(gains)


def test_norm_is_capped() -> None:
    micro = MicroLoRA(config(max_norm=0.05, learning_rate=5.0))
    for seed in range(20):
        micro.learn(Answer(micro, seed).trace(micro), float(seed % 2))
        delta = micro.current
        dense = delta.scale * delta.b.astype(np.float64) @ delta.a.astype(np.float64)
        assert np.linalg.norm(dense) == pytest.approx(micro.stats().norm, rel=1e-5)
        assert micro.stats().norm <= 0.05 * (1 + 1e-5)
    assert micro.stats().norm > 0.03


def test_anchor() -> None:
    """The firmer the anchor, the less of the penalty a step leaves; a firm one lets nothing be learned."""
    found = {}
    for firmness in (0.0, 10.0, 1e12):
        micro = MicroLoRA(config(ewc_lambda=firmness, learning_rate=0.1))
        answer = Answer(micro)
        fisher = Fisher.estimate(
            {"final": (gradients(answer.hidden, answer.ids, answer.drawn, 1.0, micro.current, HEAD), answer.hidden)}
        )
        anchor = micro.anchor = Anchor({"final": micro.current}, fisher)
        for seed in range(4):
            micro.learn(Answer(micro, seed).trace(micro), 1.0)
        found[firmness] = penalty({"final": micro.current}, anchor)
    assert found[0.0] > 1.02 * found[10.0] > found[1e12] and found[1e12] < 1e-9 * found[0.0]
    with pytest.raises(LearningError, match="final site of a model 24 wide"):
        micro.anchor = Anchor({}, Fisher({}))


@pytest.mark.parametrize("broken", [np.nan, np.inf, 1e30])
def test_what_is_not_finite_is_refused(broken: float) -> None:
    micro = MicroLoRA(config())
    trace = Answer(micro).trace(micro)
    before, stats = micro.current, micro.stats()
    bad = trace.b.copy()
    bad[3, 1] = broken
    for case in (dataclasses.replace(trace, b=bad), dataclasses.replace(trace, curvature=float("nan"))):
        step = micro.learn(case, 1.0)
        assert not step.applied and "finite" in step.reason and step.version == micro.version
        assert micro.current is before
    assert micro.stats() == dataclasses.replace(stats, refused=2)


def test_what_changes_nothing_is_not_called_applied() -> None:
    micro = MicroLoRA(config())
    trace = Answer(micro).trace(micro)
    zero = dataclasses.replace(trace, a=0 * trace.a, b=0 * trace.b)
    assert "zero" in micro.learn(zero, 1.0).reason
    first = micro.learn(trace, 1.0)
    assert first.applied
    slow = MicroLoRA.restore(*micro.state())
    slow.config = dataclasses.replace(slow.config, learning_rate=1e-30)
    step = slow.learn(trace, 1.0)
    assert not step.applied and "too small" in step.reason and slow.version == micro.version
    with pytest.raises(LearningError, match="does not fit"):
        micro.learn(dataclasses.replace(trace, a=trace.a[:1]), 1.0)


def test_shrinking_is_a_version_of_its_own() -> None:
    micro = MicroLoRA(config(), name="u")
    assert micro.learn(Answer(micro).trace(micro), 1.0).applied
    whole, baseline = micro.current, micro.stats().baseline
    micro.shrink(0.5)
    assert micro.version == "u.2" and micro.stats().baseline == baseline
    assert np.array_equal(micro.current.b, whole.b / 2) and np.array_equal(micro.current.a, whole.a)
    micro.rollback("u.1")
    assert numbers(micro.current) == numbers(whole)


def test_versions_and_rollback() -> None:
    micro = MicroLoRA(config(keep=4), name="u")
    seen = {micro.version: numbers(micro.current)}
    traces = []
    for seed in range(6):
        traces.append(Answer(micro, seed).trace(micro))
        assert micro.learn(traces[-1], 1.0).applied
        assert micro.version not in seen
        seen[micro.version] = numbers(micro.current)
    assert micro.version == "u.6" and micro.versions == ("u.3", "u.4", "u.5", "u.6")
    assert "too old" in micro.learn(traces[0], 1.0).reason
    held, before = micro.current, micro.stats()
    micro.rollback("u.4")
    assert numbers(micro.current) == seen["u.4"] and numbers(held) == seen["u.6"]
    assert micro.learn(Answer(micro, 9).trace(micro), 0.0).version == "u.7"
    assert numbers(micro.current) != seen["u.6"]
    micro.rollback("u.6")
    assert numbers(micro.current) == seen["u.6"] and micro.stats().baseline == before.baseline
    with pytest.raises(LearningError, match=r"kept are u\.4, u\.5, u\.6, u\.7"):
        micro.rollback("u.1")


def test_readers_see_whole_states() -> None:
    """While one thread learns, every version that others see has one set of numbers."""
    micro, stop = MicroLoRA(config(keep=1000)), threading.Event()
    seen: list[LowRank] = []

    def read() -> None:
        while not stop.is_set():
            seen.append(micro.current)

    readers = [threading.Thread(target=read) for _ in range(2)]
    for reader in readers:
        reader.start()
    expected = {numbers(micro.current)}
    for seed in range(60):
        micro.learn(Answer(micro, seed, 3).trace(micro), float(seed % 2))
        expected.add(numbers(micro.current))
    stop.set()
    for reader in readers:
        reader.join()
    assert {numbers(delta) for delta in {id(delta): delta for delta in seen}.values()} <= expected


def test_saved_and_restored_bit_for_bit() -> None:
    micro = MicroLoRA(config(keep=3), name="u")
    for seed in range(5):
        micro.learn(Answer(micro, seed).trace(micro), 0.3 * (seed % 3))
    micro.rollback("u.4")
    arrays, metadata = micro.state()
    arrays = safetensors.load(safetensors.save(arrays, metadata))
    again = MicroLoRA.restore(arrays, metadata, name="u")
    assert again.versions == micro.versions and again.version == "u.4" and again.config == micro.config
    trace = Answer(micro, 7).trace(micro)
    assert micro.learn(trace, 1.0) == again.learn(trace, 1.0)
    for version in micro.versions:
        micro.rollback(version)
        again.rollback(version)
        assert numbers(micro.current) == numbers(again.current) and micro.stats().baseline == again.stats().baseline
    for damage in (
        {"a": arrays["a"][1:]},
        {"b": arrays["b"].astype(np.float64)},
        {"baseline": arrays["a"]},
        {"b": arrays["b"] * np.float32(np.nan)},
    ):
        with pytest.raises(LearningError):
            MicroLoRA.restore({**arrays, **damage}, metadata)
    for key, value in (("current", "u.1"), ("config", "{}"), ("versions", "["), ("number", "x")):
        with pytest.raises(LearningError):
            MicroLoRA.restore(arrays, {**metadata, key: value})


def test_adapt_without_a_token_changes_how_sure_the_model_is() -> None:
    hidden = np.random.default_rng(6).normal(size=WIDTH).astype(np.float32)
    for quality, surer in ((0.9, True), (0.1, False)):
        micro = MicroLoRA(MicroLoRAConfig.for_hidden_dim(WIDTH))
        before = micro.current
        assert micro.adapt(hidden, AdaptFeedback.from_quality(quality)).count == 1
        assert micro.current is before
        step = micro.apply_updates(0.01)
        assert step.applied and step.nats is None and micro.stats().pending == 0
        changed = micro.apply(hidden)
        along = float(changed @ hidden) / float(hidden @ hidden)
        assert (along > 1.0) == surer and abs(along - 1.0) > 1e-4
        np.testing.assert_allclose(changed, along * hidden, atol=1e-5)
        logits = HEAD.rows(np.arange(VOCABULARY)) @ np.stack([hidden, changed], 1)
        share = np.exp(logits - logits.max(0)) / np.exp(logits - logits.max(0)).sum(0)
        assert (share[:, 1].max() > share[:, 0].max()) == surer
    batch = np.stack([hidden, 2 * hidden])
    np.testing.assert_allclose(micro.apply(batch)[1], 2 * micro.apply(hidden), rtol=1e-5)


def test_adapt_with_a_gradient_is_the_policy_gradient() -> None:
    micro, other = MicroLoRA(config(learning_rate=1e-4)), MicroLoRA(config(learning_rate=1e-4))
    answer = Answer(micro, tokens=1)
    gradient = gradients(answer.hidden, answer.ids, answer.drawn, 1.0, micro.current, HEAD)[0]
    assert micro.adapt(answer.hidden[0], GOOD, gradient).accepted
    step = micro.apply_updates()
    assert step.applied and other.learn(answer.trace(other), 1.0).applied
    np.testing.assert_allclose(micro.current.b, other.current.b, atol=1e-9)
    assert step.nats is not None and micro.stats().baseline == other.stats().baseline


def test_adapt_says_when_nothing_happens() -> None:
    micro = MicroLoRA(config())
    hidden = np.ones(WIDTH, np.float32)
    assert not micro.apply_updates(0.1).applied
    assert not micro.adapt(hidden, AdaptFeedback(0.5)).accepted
    assert "no step" in micro.adapt(0 * hidden, GOOD).reason
    assert not micro.apply_updates(0.1).applied and micro.stats().refused == 2
    for bad in (hidden[1:], hidden * np.nan):
        with pytest.raises(LearningError, match="24 finite numbers"):
            micro.adapt(bad, GOOD)
        with pytest.raises(LearningError, match="gradient"):
            micro.adapt(hidden, GOOD, bad)
    for rate in (0.0, -1.0, np.nan, np.inf):
        with pytest.raises(LearningError, match="learning rate"):
            micro.apply_updates(rate)


def test_what_makes_no_sense() -> None:
    for quality in (-0.1, 1.1, np.nan):
        with pytest.raises(LearningError, match="quality"):
            AdaptFeedback.from_quality(quality)
    for field, value in (
        ("rank", 3),
        ("rank", 1.5),
        ("learning_rate", 0.0),
        ("max_norm", np.nan),
        ("keep", 0),
        ("baseline", 2.0),
    ):
        with pytest.raises(ConfigError, match=field):
            config(**{field: value})
    assert MicroLoRAConfig.for_hidden_dim(4096).rank == 2


def test_a_step_of_a_wide_model_is_instant() -> None:
    """4,096 wide, of rank 2, with an anchor and at the cap; a median, since others use this machine, too."""
    random, width = np.random.default_rng(8), 4096
    micro = MicroLoRA(MicroLoRAConfig(width, max_norm=1e-2))
    samples = random.normal(size=(2, 20, width))
    micro.anchor = Anchor({"final": micro.current}, Fisher.estimate({"final": (samples[0], samples[1])}))
    a, b = random.normal(size=(2, width)).astype(np.float32), random.normal(size=(width, 2)).astype(np.float32)
    took = []
    for turn in range(60):
        trace = Trace(a, b, 80, micro.version, 1e4)
        start = time.perf_counter()
        assert micro.learn(trace, float(turn % 2)).applied
        took.append(time.perf_counter() - start)
    assert np.median(took) < 1e-3
