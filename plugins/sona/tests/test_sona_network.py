"""The network that learns is the model that answers, and its gradients are those of the loss as written."""

from __future__ import annotations

from collections import deque
from dataclasses import replace

import numpy as np
import pytest
import torch

from ruvllm_core.protocols import LowRank
from ruvllm_core.testing import tiny
from ruvllm_sona.adapters import AdapterStack
from ruvllm_sona.anchors import CHATS
from ruvllm_sona.anchors import TEXTS as ANCHORS
from ruvllm_sona.fisher import fisher
from ruvllm_sona.learner import Learner, LearnerConfig
from ruvllm_sona.leash_texts import PIECE, leash_piece
from ruvllm_sona.leash_texts import TEXTS as LEASHED
from ruvllm_sona.network import Network, padded
from ruvllm_sona.objective import ObjectiveConfig, saturated
from ruvllm_sona.records import Example
from ruvllm_sona.sites import final_site, linear_sites, start
from ruvllm_sona.update import Outcome, gradients

SPEC = tiny.tiny_spec()
EXAMPLES = [
    Example("a", tuple(tiny.TEXTS["a"][:7]), tuple(tiny.TEXTS["a"][7:]), 1.0, 0.8),
    Example("b", tuple(tiny.TEXTS["b"][:3]), tuple(tiny.TEXTS["b"][3:]), 0.0, 1.3),
]


def network(spec=SPEC, schemes=("f32",), **options) -> Network:
    made = Network(spec, tiny.tiny_weights(spec, schemes), dtype=torch.float32, **options)
    for _ in made.load():
        pass
    return made


def stack(seed: int = 1, rank: int = 2, rows: int = 1) -> AdapterStack:
    shapes = linear_sites(SPEC) | final_site(SPEC)
    rng, found = np.random.default_rng(seed), []
    for row in range(rows):
        begun = start(shapes, rank, seed + row)
        b = {name: rng.normal(0, 0.05, delta.b.shape).astype(np.float32) for name, delta in begun.items()}
        found.append({name: LowRank(delta.a, b[name], 0.7) for name, delta in begun.items()})
    return AdapterStack.of(found)


def last(work):
    return deque(work, maxlen=1)[0]


@pytest.mark.parametrize("name", tiny.FLAVOURS)
@pytest.mark.parametrize("resident", [True, False])
def test_logits_are_those_of_the_decoder(name: str, resident: bool) -> None:
    spec = tiny.FLAVOURS[name]
    schemes = ("q8_0", "f32")
    if spec.hidden_size % 32 or (spec.num_heads * spec.head_dim) % 32:
        schemes = ("f32",)
    weights, adapter = tiny.tiny_weights(spec, schemes), tiny.tiny_adapter(spec)
    decoder, made = tiny.tiny_decoder(spec, weights), network(spec, schemes, resident=resident)
    for text in tiny.TEXTS.values():
        with torch.no_grad():
            got = made.logits(made.hidden(padded([text]), AdapterStack.of([adapter.sites])))[0].numpy()
        tiny.assert_close(got, tiny.whole(decoder, text, len(text), adapter), 2e-5, name)


def test_rows_have_their_own_adapters_and_padding_is_not_seen() -> None:
    made, both = network(), stack(rows=2)
    texts = [tiny.TEXTS["a"], tiny.TEXTS["b"]]
    with torch.no_grad():
        together = made.hidden(padded(texts), both)
        for row, text in enumerate(texts):
            alone = made.hidden(padded([text]), AdapterStack.of([both.deltas(row)]))
            np.testing.assert_allclose(together[row, : len(text)], alone[0], atol=2e-5)


def loss(made: Network, adapters: AdapterStack, example: Example, weight: float, config: ObjectiveConfig):
    """As the module's first lines say, by automatic differentiation and nothing else."""
    ids = padded([[*example.prompt_ids, *example.output_ids]])
    rows = slice(len(example.prompt_ids) - 1, ids.shape[1] - 1)
    targets = torch.tensor(example.output_ids)[:, None]
    logits = made.logits(made.hidden(ids, adapters))[0, rows]
    with torch.no_grad():
        base = torch.log_softmax(made.logits(made.hidden(ids))[0, rows], -1)
    chosen = torch.log_softmax(logits / example.temperature, -1).gather(1, targets).mean()
    logp = torch.log_softmax(logits, -1)
    kl = (logp.exp() * (logp - base)).sum(-1).mean()
    moved = float((logp.gather(1, targets) - base.gather(1, targets)).sum().detach())
    c = float(saturated(torch.tensor([weight]), torch.tensor([moved]), config.saturation)[0])
    return -c * chosen + config.leash * kl, float(kl.detach()), moved


@pytest.mark.parametrize("spec", [SPEC, tiny.FLAVOURS["softcaps and gelu"]], ids=["plain", "softcaps"])
@pytest.mark.parametrize("resident", [True, False])
def test_gradients_are_those_of_the_loss(spec, resident: bool) -> None:
    made, config = network(spec, resident=resident), ObjectiveConfig(leash=0.3, saturation=0.02)
    together = stack(rows=2).trainable()
    outcome = last(gradients(made, together, EXAMPLES, [0.9, -0.4], config))
    assert isinstance(outcome, Outcome)
    for row, (example, weight) in enumerate(zip(EXAMPLES, [0.9, -0.4], strict=True)):
        own = AdapterStack.of([together.deltas(row)]).trainable()
        value, kl, moved = loss(made, own, example, weight, config)
        value.backward()
        assert float(outcome.kl[row]) == pytest.approx(kl, rel=1e-4)
        assert float(outcome.moved[row]) == pytest.approx(moved, rel=1e-3, abs=1e-4)
        for name, both in own.sites.items():
            for mine, theirs in zip(together.sites[name], both, strict=True):
                expected = theirs.grad[0].numpy()
                scale = abs(expected).max() + 1e-12
                np.testing.assert_allclose(mine.grad[row].numpy() / scale, expected / scale, atol=2e-4, err_msg=name)


def test_one_adapter_for_all_gets_the_sum() -> None:
    made, config = network(), ObjectiveConfig()
    shared, apart = stack().trainable(), AdapterStack.of([stack().deltas()] * 2).trainable()
    last(gradients(made, shared, EXAMPLES, [1.0, -1.0], config))
    last(gradients(made, apart, EXAMPLES, [1.0, -1.0], config))
    for name, both in shared.sites.items():
        for one, two in zip(both, apart.sites[name], strict=True):
            np.testing.assert_allclose(one.grad[0], two.grad.sum(0), atol=1e-6, rtol=1e-3)


def test_a_leash_alone_pulls_back_to_the_reference() -> None:
    made, target = network(), stack(seed=9)
    student = stack(seed=2).trainable()
    adam = torch.optim.Adam(student.parameters(), lr=3e-3)
    found = []
    for _ in range(60):
        adam.zero_grad()
        outcome = last(gradients(made, student, EXAMPLES, [0.0, 0.0], ObjectiveConfig(1.0, 0.0), (made, target)))
        adam.step()
        found.append(float(outcome.kl.mean()))
    assert found[-1] < 0.25 * found[0]


def test_texts_nobody_rated_add_their_leash_to_the_step() -> None:
    """The gradient of a step is the answers' plus that of λ·KL on the texts, which is none of the answers' settings."""
    made, config = network(), ObjectiveConfig(leash=0.3, saturation=0.02, budget=0.1, text_leash=0.7)
    text, both, answer = EXAMPLES[1], stack(seed=3).trainable(), stack(seed=3).trainable()
    alone = stack(seed=3).trainable()
    value, _, _ = loss(made, alone, text, 0.0, ObjectiveConfig(leash=0.7))
    value.backward()
    last(gradients(made, answer, EXAMPLES[:1], [0.9], config))
    last(gradients(made, both, EXAMPLES[:1], [0.9], config))
    last(gradients(made, both, (), (), config, texts=[text]))
    for name, factors in both.sites.items():
        for mine, first, second in zip(factors, answer.sites[name], alone.sites[name], strict=True):
            expected = (first.grad + second.grad).numpy()
            np.testing.assert_allclose(mine.grad, expected, atol=3e-4 * abs(expected).max() + 1e-12, err_msg=name)
            assert np.any(second.grad.numpy())


def test_texts_nobody_rated_stay_nearer_to_the_base_model() -> None:
    made, text = network(), replace(EXAMPLES[1], quality=0.5, temperature=1.0)
    ids = padded([[*text.prompt_ids, *text.output_ids]])
    far, moved = [], []
    for strength in (0.0, 10.0):
        config = LearnerConfig(objective=ObjectiveConfig(text_leash=strength))
        learner = Learner(linear_sites(SPEC), config)
        for _ in range(80):
            outcome = last(learner.step(made, EXAMPLES[:1], [1.0], texts=[text]))
        with torch.no_grad():
            logp, base = (
                torch.log_softmax(made.logits(made.hidden(ids, adapters))[0, len(text.prompt_ids) - 1 : -1], -1)
                for adapters in (learner.learned(), AdapterStack({}, {}))
            )
        far.append(float((logp.exp() * (logp - base)).sum(-1).mean()))
        moved.append(float(outcome.moved[0]))
    assert far[1] < 0.2 * far[0]
    assert moved[1] > 0.9 * moved[0] > 0


def test_every_step_has_another_piece_of_another_text() -> None:
    texts = [tuple(range(100, 100 + size)) for size in (2, 30, PIECE + 1, PIECE + 2, 3 * PIECE)]
    pieces = [leash_piece(texts, step) for step in range(3 * len(texts))]
    assert pieces == [leash_piece(texts, step) for step in range(3 * len(texts))]
    seen = [{token for one in pieces[n :: len(texts)] for token in one.output_ids} for n in range(len(texts))]
    assert seen == [set(text[1:]) for text in texts]
    assert all(1 <= len(one.output_ids) <= PIECE and len(one.prompt_ids) == 1 for one in pieces)
    assert all(one.output_ids[0] == one.prompt_ids[0] + 1 for one in pieces)


def test_no_text_on_the_leash_is_one_the_gate_judges_by() -> None:
    words = [set(zip(one.split(), one.split()[1:], one.split()[2:], one.split()[3:], strict=False)) for one in LEASHED]
    anchors = " ".join((*ANCHORS, *(text for chat in CHATS for _, text in chat))).split()
    judged = set(zip(anchors, anchors[1:], anchors[2:], anchors[3:], strict=False))
    assert not any(one & judged for one in words), "four words in a row are the same"


def test_what_moved_with_its_verdict_is_slowed_and_nothing_else() -> None:
    good, bad = torch.tensor([1.0]), torch.tensor([-1.0])
    assert saturated(good, torch.tensor([-50.0]), 0.1) == 1.0
    assert saturated(bad, torch.tensor([50.0]), 0.1) == -1.0
    assert 0 < saturated(good, torch.tensor([50.0]), 0.1) < 0.05
    assert -0.05 < saturated(bad, torch.tensor([-50.0]), 0.1) < 0
    assert saturated(good, torch.tensor([1e6]), 0.0) == 1.0


def test_feedback_moves_the_answer_its_way() -> None:
    made = network()
    for weight in (1.0, -1.0):
        learner = Learner(linear_sites(SPEC), LearnerConfig())
        moved = []
        for _ in range(6):
            outcome = last(learner.step(made, EXAMPLES[:1], [weight]))
            moved.append(float(outcome.moved[0]))
        assert moved[0] == 0.0  # B starts at zero
        assert np.all(np.diff(np.array(moved) * weight) > 0)


def test_a_learner_comes_back_to_the_bit() -> None:
    made, config = network(), LearnerConfig(rank=1, average=4)
    learner = Learner(linear_sites(SPEC), config)
    last(learner.step(made, EXAMPLES, [1.0, -0.5]))
    kept = learner.state()
    last(learner.step(made, EXAMPLES, [0.3, 1.0]))
    expected = learner.deltas()
    other = Learner(linear_sites(SPEC), config)
    other.restore(kept)
    last(other.step(made, EXAMPLES, [0.3, 1.0]))
    for name, delta in other.deltas().items():
        np.testing.assert_array_equal(delta.a, expected[name].a)
        np.testing.assert_array_equal(delta.b, expected[name].b)


def test_what_was_learned_is_the_mean_of_the_last_steps() -> None:
    made, horizon = network(), 3
    every = Learner(linear_sites(SPEC), LearnerConfig())
    mean = Learner(linear_sites(SPEC), LearnerConfig(average=horizon))
    iterates, found = [], []
    for _ in range(5):
        for learner, kept in ((every, iterates), (mean, found)):
            last(learner.step(made, EXAMPLES, [1.0, -0.5]))
            kept.append({name: (one.a.astype(np.float64), one.b) for name, one in learner.deltas().items()})
    back = mean.snapshot()
    last(mean.step(made, EXAMPLES, [0.3, 1.0]))
    assert any(np.any(delta.a != found[-1][name][0]) for name, delta in mean.deltas().items())
    back()
    for name, delta in mean.deltas().items():
        np.testing.assert_array_equal(delta.a, found[-1][name][0])
        for n in (0, 1):
            expected = np.mean([one[name][n] for one in iterates[:horizon]], 0)
            np.testing.assert_allclose(found[horizon - 1][name][n], expected, rtol=1e-5, atol=1e-8)
            for one in iterates[horizon:]:
                expected = expected + (one[name][n] - expected) / horizon
            np.testing.assert_allclose(found[-1][name][n], expected, rtol=1e-5, atol=1e-8)


def test_fisher_is_that_of_a_dense_gradient() -> None:
    """Squares of the gradients by outputs of one layer, taken apart with automatic differentiation in the plain way."""
    made, text = network(), tiny.TEXTS["b"]
    found = last(fisher(made, AdapterStack({}, {}), [text], seed=3))
    assert set(found) == {*linear_sites(SPEC), *final_site(SPEC)}
    x, rope = made.embed(padded([text])), made.rope(len(text))
    x = made.layer(0, x, rope).detach()
    added = torch.zeros(1, len(text), SPEC.hidden_size, requires_grad=True)

    class Probe(AdapterStack):
        def add(self, name, x, y):
            return y + added if name == "layers.1.attn.o" else y

    hidden = made.norm(made.layer(1, x, rope, Probe({}, {})))
    logp = torch.log_softmax(made.logits(hidden[0]), -1)
    drawn = torch.multinomial(logp.detach().exp(), 1, generator=torch.Generator().manual_seed(3))
    (grad,) = torch.autograd.grad(logp.gather(1, drawn).sum(), added)
    u, _ = found["layers.1.attn.o"]
    np.testing.assert_allclose(u, grad[0].square().mean(0).numpy(), rtol=2e-3, atol=1e-9)
