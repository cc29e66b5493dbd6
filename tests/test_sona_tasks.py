"""The benchmark of learning: its rules judge what they say, and its lockstep is the plugin's own learning."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import realdata
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))
from sona import controls, deep_arm, lockstep, report
from sona.cells import Baseline, Cell, random_direction
from sona.final import FinalFleet
from sona.gating import Gatekeeper, finished
from sona.measures import Elsewhere, HeldOut, Measured
from sona.optimizer import CellAdam
from sona.sampling import Sampler, Shared
from sona.tasks import TASKS, Prompt, on_topic, prompts
from sona.texts import UNRELATED, other_text
from sona.topics import FEEDBACK_TOPICS, HELD_OUT_TOPICS

from ruvllm_core.generate.sampler import Distribution
from ruvllm_core.protocols import LowRank
from ruvllm_core.testing import tiny
from ruvllm_sona.adapters import AdapterStack
from ruvllm_sona.deep import DeepConfig, deep
from ruvllm_sona.gate import Gate, GateConfig
from ruvllm_sona.learner import Learner, LearnerConfig
from ruvllm_sona.leash_texts import leash_piece
from ruvllm_sona.measure import NetworkMeasure, weight_norms
from ruvllm_sona.micro import MicroLoRA, MicroLoRAConfig
from ruvllm_sona.network import Network
from ruvllm_sona.objective import ObjectiveConfig
from ruvllm_sona.patterns import PatternBank
from ruvllm_sona.sites import final_site, linear_sites, start
from ruvllm_sona.trace import Head, eligibility

YES_NO = {
    "short": ("Rain is water.", " ".join(["word"] * 31)),
    "list": ("Here:\n- one\n- two", "- one\nand two"),
    "question": ('She asked: "Why?"', "Why? Because."),
    "words 1": ("You see what a list can do.", "Your scan cannot."),
    "words 2": ("Small, but with care.", "butter without"),
    "one sentence": ("Bread costs 2.50 euros!", "One. Two."),
    "no I": ("It is nice in Italy.", "Well, I’m fine."),
}


@pytest.mark.parametrize("name", TASKS)
def test_a_task_tells_yes_from_no(name: str) -> None:
    yes, no = YES_NO[name]
    score = TASKS[name].score
    assert (score(yes), score(no), score(""), score(" \n")) == (1, 0, 0, 0)
    assert score(f"\n{yes}  ") == 1


@pytest.mark.parametrize(
    ("text", "score"), [("1. a\n2) b", 1), ("* a\n\n  • b", 1), ("-a\n-b", 0), ("1.5 kg\n2.5 kg", 0), ("a - b\nc", 0)]
)
def test_what_a_list_is(text: str, score: int) -> None:
    assert TASKS["list"].score(text) == score


@pytest.mark.parametrize(
    ("text", "score"), [("No end", 0), ("A?!", 1), ("Dr. Who left.", 0), ("Yes (sure).", 1), ("Two\nlines.", 0)]
)
def test_what_one_sentence_is(text: str, score: int) -> None:
    assert TASKS["one sentence"].score(text) == score


def test_prompts_are_different_even_and_about_disjoint_topics() -> None:
    assert min(len(FEEDBACK_TOPICS), len(HELD_OUT_TOPICS)) >= 60
    both = (FEEDBACK_TOPICS, HELD_OUT_TOPICS)
    first, second = ({word for topic in topics for word in topic.lower().split()} for topics in both)
    assert first & second <= {"the", "of"}
    for kind, topics in (("feedback", FEEDBACK_TOPICS), ("held-out", HELD_OUT_TOPICS)):
        found = prompts(kind, 200, 3)
        assert found == prompts(kind, 200, 3) != prompts(kind, 200, 4)
        assert len({one.text for one in found}) == 200
        counts = [sum(one.topic == topic for one in found) for topic in topics]
        assert max(counts) - min(counts) <= 1
        templates = [one.text.replace(one.topic, "{}") for one in found]
        assert max(map(templates.count, templates)) <= 2 * 200 / 16
    most = len(FEEDBACK_TOPICS) * 16
    assert len({one.text for one in prompts("feedback", most, 0)}) == most
    with pytest.raises(ValueError, match=f"{most + 1} prompts"):
        prompts("feedback", most + 1, 0)


def test_on_topic_needs_the_topic_and_no_circles() -> None:
    prompt = Prompt("Tell me about ants.", "ants", ("ants", "ant", "insect"))
    assert on_topic(prompt, "Insects of this kind build hills.")
    assert not on_topic(prompt, "A restaurant serves soup.")
    assert not on_topic(prompt, "")
    assert not on_topic(prompt, "Ants are good. " * 5)
    assert not on_topic(prompt, "ants ants ants ants ants and some more words here now")


def test_the_other_text_is_long_and_the_chats_are_about_something_else(tmp_path: Path) -> None:
    assert len(other_text(None)) > 24 * 256 * 16
    (tmp_path / "own.txt").write_text("mine", encoding="utf-8")
    assert other_text(tmp_path / "own.txt") == "mine"
    assert len(set(UNRELATED)) >= 24


def test_shuffled_feedback_is_the_verdict_on_the_answer_before() -> None:
    scores, heard = [1, 0, 0, 1, 1], []
    for n, score in enumerate(scores):
        heard.append(controls.feedback_of(controls.SHUFFLED, score, scores[n - 1] if n else None))
    assert heard == [0.5, 1, 0, 0, 1]
    assert [controls.feedback_of(controls.CONSTANT, score, None) for score in (0, 1)] == [1, 1]
    assert [controls.feedback_of(controls.LEASHED, score, 1) for score in (0, 1)] == [0, 1]


def test_the_baseline_is_that_of_the_plugin() -> None:
    bank, baseline = PatternBank(4), Baseline(2)
    for n, quality in enumerate([1.0, 1.0, 0.0, 0.3, *[0.9] * 100]):
        expected = bank.learn(str(n), np.zeros(4, np.float32), quality, 0)
        assert baseline.advantages([quality, 0.5]) == pytest.approx([expected, 0.0])


def test_a_random_direction_is_as_far_in_every_cell() -> None:
    begun, end = torch.randn(3, 2, 5), torch.randn(3, 2, 5)
    moved = random_direction(begun, end, torch.Generator().manual_seed(1))
    torch.testing.assert_close((moved - begun).flatten(1).norm(dim=1), (end - begun).flatten(1).norm(dim=1))
    cosines = torch.cosine_similarity((moved - begun).flatten(1), (end - begun).flatten(1))
    assert cosines.abs().max() < 0.99


def test_gains_are_differences_from_the_same_seed() -> None:
    rows = [
        Measured(Cell(controls.BASE, "short", 0), 0, 0.1, 0.9),
        Measured(Cell(controls.BASE, "short", 1), 0, 0.3, 0.9),
        Measured(Cell(controls.LEASHED, "short", 1), 48, 0.5, 0.8, 1.02, 0.1),
        Measured(Cell(controls.LEASHED, "short", 0), 48, 0.2, 0.6, 1.0, 0.3),
    ]
    base, learned = report.summary(rows)
    assert (base["arm"], base["gain"], learned["arm"]) == (controls.BASE, 0.0, controls.LEASHED)
    assert learned["gain"] == pytest.approx(15)
    assert learned["gain_interval"] == pytest.approx((10, 20))
    assert learned["perplexity_percent"] == pytest.approx(1) and learned["perplexity_worst_percent"] == pytest.approx(2)
    assert (learned["kl"], learned["on_topic"]) == pytest.approx((0.2, 0.7))


def test_the_interval_is_that_of_a_mean() -> None:
    values = np.random.default_rng(1).normal(3, 2, 400)
    low, high = report.interval(values.tolist())
    assert (low, high) == pytest.approx((values.mean() - 0.196, values.mean() + 0.196), abs=0.02)


SPEC = tiny.tiny_spec()


class Letters:
    """One token is one letter, and nothing ends an answer but token 1."""

    eos_ids = frozenset({1})
    bos_id = None

    def decode(self, ids: list[int]) -> str:
        return " ".join("I" if token % 2 else "you" for token in ids)


def subject(spec=SPEC) -> SimpleNamespace:
    weights = tiny.tiny_weights(spec)
    network = Network(spec, weights, dtype=torch.float32, resident=True)
    for _ in network.load():
        pass
    embed, letters = torch.from_numpy(weights["embed"].dequantize().copy()), Letters()
    return SimpleNamespace(
        network=network, exact=network, embed=embed, tokenizer=letters, text=letters.decode,
        chat=lambda text: tuple(ord(letter) % 251 + 2 for letter in text[:12]),
    )  # fmt: skip


def adapters(spec, rows: int) -> AdapterStack:
    rng, shapes = np.random.default_rng(5), linear_sites(spec) | final_site(spec)
    found = []
    for row in range(rows):
        begun = start(shapes, 2, row)
        found.append(
            {name: LowRank(d.a, rng.normal(0, 0.2, d.b.shape).astype(np.float32), 0.7) for name, d in begun.items()}
        )
    return AdapterStack.of(found)


def picked(stack: AdapterStack, rows: list[int]) -> AdapterStack:
    return AdapterStack({name: (a[rows], b[rows]) for name, (a, b) in stack.sites.items()}, stack.scales)


@pytest.mark.parametrize("name", tiny.FLAVOURS)
def test_answers_are_draws_from_the_whole_network(name: str) -> None:
    """Each token is the inverse transform of its number under a forward pass over all that came before."""
    spec = tiny.FLAVOURS[name]
    model = subject(spec)
    asked = [tuple(tiny.TEXTS["a"][:5]), tuple(tiny.TEXTS["b"][:9]), tuple(tiny.TEXTS["c"][:7])]
    stack, luck = adapters(spec, 3), np.random.default_rng(2).random((3, 10))
    sampler = Sampler(model, 3, 9 + 10, stack, 0.8, 10)
    for _ in range(2):  # a second time, over what the first left in the cache
        answers = sampler.sample(asked, luck)
        for row, (prompt, answer) in enumerate(zip(asked, answers, strict=True)):
            assert len(answer) == 10 or answer[-1] == 1
            with torch.no_grad():
                hidden = model.exact.hidden(torch.tensor([[*prompt, *answer]]), picked(stack, [row]))
                share = torch.softmax(model.exact.logits(hidden)[0].double() / 0.8, -1).cumsum(-1)
            for n, token in enumerate(answer):
                upper = share[len(prompt) - 1 + n]
                assert (upper[token - 1] if token else 0.0) - 1e-4 <= luck[row, n] <= upper[token] + 1e-4


def test_cells_share_an_adapter_over_their_rows() -> None:
    stack, x, y = adapters(SPEC, 2), torch.randn(6, 4, SPEC.hidden_size), torch.randn(6, 4, SPEC.hidden_size)
    got = Shared(stack, 3).add("final", x, y)
    each = [0, 0, 0, 1, 1, 1]
    torch.testing.assert_close(got, picked(stack, each).add("final", x, y))


def test_held_out_answers_do_not_depend_on_how_many_are_drawn_at_once() -> None:
    model, stack = subject(), adapters(SPEC, 3)
    asked = [[f"{cell} asks {n}" for n in range(2)] for cell in range(3)]
    luck = [np.random.default_rng(cell).random((2, 6)) for cell in range(3)]
    one, two, three = (HeldOut(model, 2, 6, most).texts(asked, luck, stack) for most in (2, 4, 100))
    assert one == two == three
    assert one != HeldOut(model, 2, 6, 100).texts(asked, luck, None)


def test_lockstep_learns_what_the_plugin_learns() -> None:
    """Each cell's adapter is what the plugin's own learner makes of the same answers and advantages."""
    objective = ObjectiveConfig(text_leash=0.3)
    model, config = subject(), LearnerConfig(learning_rate=0.01, average=2, objective=objective)
    shapes, texts = linear_sites(SPEC), [tuple(tiny.TEXTS["b"][:12]), tuple(tiny.TEXTS["c"][:9])]
    cells = [Cell(controls.LEASHED, "short", 0), Cell(controls.SHUFFLED, "no I", 1), Cell(controls.LEASHED, "no I", 2)]
    fleet = lockstep.Fleet(model, cells, shapes, config, 5, 5, 2, texts=texts)
    for _ in range(5):
        fleet.round()
    assert len({one.quality for examples in fleet.log for one in examples}) > 1
    baseline = Baseline(len(cells))
    advantages = [baseline.advantages([one.quality for one in examples]) for examples in fleet.log]
    for n, cell in enumerate(cells):
        alone = Learner(shapes, replace(config, seed=cell.seed))
        for examples, found in zip(fleet.log, advantages, strict=True):
            piece = leash_piece(texts, alone.steps)
            finished(alone.step(model.network, [examples[n]], [found[n]], texts=[piece]))
        got = fleet.stack.deltas(n)
        for name, delta in alone.deltas().items():
            np.testing.assert_allclose(got[name].a, delta.a, atol=2e-5)
            np.testing.assert_allclose(got[name].b, delta.b, atol=2e-5)


def test_without_weight_texts_change_nothing() -> None:
    """As in the arm that has no leash."""
    model, shapes = subject(), linear_sites(SPEC)
    cells = [Cell(controls.FREE, "short", 0), Cell(controls.FREE, "no I", 1)]
    config = LearnerConfig(learning_rate=0.01, objective=ObjectiveConfig(leash=0.0, text_leash=0.0))
    found = []
    for texts in ([], [tuple(tiny.TEXTS["b"][:12])]):
        fleet = lockstep.Fleet(model, cells, shapes, config, 2, 5, 2, texts=texts)
        fleet.round()
        fleet.round()
        found.append(fleet.stack.deltas(1))
    for name, delta in found[0].items():
        np.testing.assert_array_equal(delta.b, found[1][name].b)
        assert np.any(delta.b)


def test_the_gatekeeper_judges_as_the_gate() -> None:
    """Every figure of many cells at once is that of one candidate after the other; what is refused is taken back."""
    model, shapes = subject(), linear_sites(SPEC)
    anchors = [tuple(tiny.TEXTS["b"][:20]), tuple(tiny.TEXTS["c"][:13])]
    norms = finished(weight_norms(tiny.tiny_weights(SPEC), list(shapes), SPEC.hidden_size))
    stack, config = adapters(SPEC, 3), GateConfig(max_kl=0.2)
    for name, (_, b) in stack.sites.items():
        b[0] *= 1e-3
        b[2] *= 100.0 if name.endswith("attn.q") else 1.0
    keeper = Gatekeeper(model.exact, anchors, norms, config)
    found = keeper.verdicts(stack, [(1.0,), (1.0, 0.5, 0.25), (1.0,)])
    gate, measure = Gate(anchors, norms, config), NetworkMeasure(model.exact)
    for n, (verdict, scales) in enumerate(zip(found, [(1.0,), (1.0, 0.5, 0.25), (1.0,)], strict=True)):
        expected = finished(gate.check(measure, stack.deltas(n), scales=scales))
        assert (verdict.passed, verdict.scale, verdict.scales) == (expected.passed, expected.scale, expected.scales)
        if expected.figures.mean_loss is not None:
            for name in ("mean_loss", "worst_loss", "kl", "relative_norm"):
                got, wanted = getattr(verdict.figures, name), getattr(expected.figures, name)
                assert got == pytest.approx(wanted, rel=1e-3, abs=1e-6)
    assert [(one.passed, one.scale < 1.0) for one in found] == [(True, False), (True, True), (False, False)]


def test_a_cell_goes_back_or_begins_anew_as_the_plugin_does() -> None:
    shapes, random = linear_sites(SPEC), torch.Generator().manual_seed(0)
    learning = AdapterStack.of([start(shapes, 1, n) for n in range(3)]).trainable()
    mean = lockstep.copied(learning)
    adam = CellAdam(learning, mean, 0.01, 2)
    alone = [torch.optim.Adam([torch.nn.Parameter(f[n].detach().clone()) for f in learning.parameters()], lr=0.01)
             for n in range(3)]  # fmt: skip
    for turn in range(4):
        for k, factor in enumerate(learning.parameters()):
            factor.grad = torch.randn(factor.shape, generator=random)
            for n, one in enumerate(alone):
                one.param_groups[0]["params"][k].grad = factor.grad[n].clone()
        adam.step([1.0, 1.0, 0.5])
        for n, one in enumerate(alone):
            one.param_groups[0]["lr"] = 0.01 * (0.5 if n == 2 else 1.0)
            if (n, turn) != (1, 2):
                one.step()
        if turn == 2:
            adam.take_back([1])
    for n, one in enumerate(alone):
        for factor, wanted in zip(learning.parameters(), one.param_groups[0]["params"], strict=True):
            np.testing.assert_allclose(factor[n].detach(), wanted.detach(), atol=1e-6)
    before = mean.deltas(0)
    adam.begin_anew(0, 0.5)
    for name, delta in learning.deltas(0).items():
        np.testing.assert_allclose(delta.b @ delta.a, 0.5 * before[name].b @ before[name].a, atol=1e-7)


def test_what_happens_at_the_final_site_is_the_plugins_own_step() -> None:
    """Traces of many answers at once against those that the plugin takes of one, and the step that follows."""
    model = subject()
    cells = [Cell(controls.FINAL, "no I", seed) for seed in range(3)] + [Cell(controls.ORIGINAL, "no I", 7)]
    config = MicroLoRAConfig(SPEC.hidden_size, learning_rate=3.0)
    fleet = FinalFleet(model, cells, config, 4, 6, 2)
    micros = [MicroLoRA(replace(config, seed=cell.seed)) for cell in cells]
    head = Head.of(SPEC, tiny.tiny_weights(SPEC))
    everything = np.arange(SPEC.vocab_size)
    for _ in range(4):
        fleet.round()
        for n, cell in enumerate(cells[:3]):
            one, micro = fleet.log[-1][n], micros[n]
            with torch.no_grad():
                hidden = model.exact.hidden(torch.tensor([[*one.prompt_ids, *one.output_ids]]))[0]
                hidden = hidden[len(one.prompt_ids) - 1 : -1].numpy()
                logits = model.exact.logits(torch.from_numpy(micro.apply(hidden))).double() / 0.8
            drawn = [Distribution(everything, row) for row in torch.softmax(logits, -1).numpy()]
            trace = eligibility(hidden, one.output_ids, drawn, 0.8, micro.current, head, version=micro.version)
            micro.learn(trace, one.quality)
            got = fleet.stack.deltas(n)["final"]
            np.testing.assert_allclose(got.a, micro.current.a, atol=1e-4)
            np.testing.assert_allclose(got.b, micro.current.b, atol=1e-4)
            assert cell.arm != controls.FINAL or micro.stats().updates
    assert np.abs(fleet.stack.deltas(0)["final"].b).max() > 1e-3
    assert [np.abs(fleet.stack.deltas(3)["final"].b).max() > 0] == [any(told[3].quality for told in fleet.log)]


def test_what_the_gate_refuses_changes_nothing() -> None:
    """Neither through the whole network nor at the final site; the original's rule has no gate."""
    model, shapes = subject(), linear_sites(SPEC)
    norms = finished(weight_norms(tiny.tiny_weights(SPEC), list(shapes), SPEC.hidden_size))
    keeper = Gatekeeper(model.exact, [tuple(tiny.TEXTS["b"][:20])], norms, GateConfig(max_kl=0.0))
    config = MicroLoRAConfig(SPEC.hidden_size, learning_rate=3.0)
    arms = (controls.FINAL, controls.ORIGINAL)
    final = FinalFleet(model, [Cell(arm, "no I", 7) for arm in arms], config, 4, 6, 2, keeper)
    whole = lockstep.Fleet(model, [Cell(controls.LEASHED, "no I", 7)], shapes, LearnerConfig(), 4, 6, 2, keeper)
    for fleet in (final, whole):
        for _ in range(4):
            fleet.round()
    assert final.refused == [4, 0] and whole.refused == [4]
    assert not np.abs(final.stack.deltas(0)["final"].b).max()
    assert all(not np.abs(one.b).max() for one in whole.stack.deltas().values())


def test_the_deep_arm_is_the_plugins_own_training() -> None:
    """Of every cell, those that stop early and those that have nothing to learn among them."""
    learner = LearnerConfig(rank=2, learning_rate=0.02, average=3, objective=ObjectiveConfig(text_leash=0.2))
    model, config = subject(), DeepConfig(learner=learner, epochs=4, patience=0)
    cells = [Cell(controls.DEEP, task, seed) for task in ("short", "no I") for seed in (0, 1)]
    told = deep_arm.stored(model, cells, 8, 5, 8)
    assert [[one.prompt_ids for one in own] for own in told[:2]] == [
        [one.prompt_ids for one in own] for own in told[2:]
    ]
    assert [[one.output_ids for one in own] for own in told[:2]] == [
        [one.output_ids for one in own] for own in told[2:]
    ]
    assert {one.quality for one in told[0]} == {1.0}  # five tokens are always short
    mixed = [[replace(one, quality=float((n + k) % 2)) for n, one in enumerate(own)] for k, own in enumerate(told[1:])]
    texts = [tuple(tiny.TEXTS["b"][:12]), tuple(tiny.TEXTS["c"][:9])]
    stack, trained = deep_arm.train(model.network, cells, [told[0], *mixed], texts, config, 7)
    assert 0 not in trained and trained
    epochs = set()
    for n, own in enumerate(mixed, 1):
        work = deep(model.network, linear_sites(SPEC), own, texts, replace(config, seed=cells[n].seed))
        last = [found for found in work if found is not None][-1]
        epochs.add(last.epoch)
        assert (last.deltas is not None) == (n in trained)
        for name, delta in (last.deltas or {}).items():
            np.testing.assert_allclose(stack.deltas(n)[name].b, delta.b, atol=1e-4)
    assert len(epochs) > 1


def test_an_adapter_that_does_nothing_harms_nothing() -> None:
    model = subject()
    windows = [tuple(tiny.TEXTS["b"][:20]), tuple(tiny.TEXTS["c"][:20])]
    elsewhere = Elsewhere(model, windows, 3, 6)
    idle = AdapterStack.of([start(linear_sites(SPEC), 1, 0)])
    assert elsewhere.measure(idle, 0) == pytest.approx((1.0, 0.0), abs=1e-6)
    ratio, kl = elsewhere.measure(adapters(SPEC, 2), 1)
    assert ratio != pytest.approx(1.0, abs=1e-3) and kl > 1e-3


@pytest.mark.slow
def test_a_small_run_prints_every_column() -> None:
    """The whole program on a real model: every arm, every figure, and one JSON line that ends it."""
    script = Path(report.__file__).resolve().parent.parent / "sona_bench.py"
    command = [sys.executable, str(script), "--small", "--model", str(realdata.smollm2_gguf())]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    *lines, last = done.stdout.splitlines()
    table = [[cell.strip() for cell in line.strip("| ").split(" | ")] for line in lines if line.startswith("| ")]
    head = ["arm", "feedbacks", "gain, points (95 %)", "perplexity, mean (worst)", "KL a token", "on topic"]
    begin = table.index(head)
    arms = [row[0] for row in table[begin + 2 :] if len(row) == len(head)]
    assert arms == [controls.ARMS[arm] for arm in controls.DEFAULT]
    found = json.loads(last)
    assert [one["arm"] for one in found["summary"]] == list(controls.DEFAULT)
    by_arm = {one["arm"]: one for one in found["summary"]}
    assert all(np.isfinite([one["gain"], one["perplexity_percent"], one["kl"]]).all() for one in by_arm.values())
    # What learns has moved, and the rest stands where it stood.
    assert by_arm["leashed"]["kl"] > 0 and by_arm["final"]["kl"] > 0 and by_arm["base"]["kl"] == 0
