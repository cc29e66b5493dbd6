"""What must not be forgotten is held, in a learner and through the whole loop; it is dropped when it has to be."""

from __future__ import annotations

import itertools
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from ruvllm_core.decode.lora import FINAL_SITE
from ruvllm_core.errors import LearningError
from ruvllm_core.protocols import Adapter, LowRank
from ruvllm_core.testing import tiny
from ruvllm_sona import holding as module
from ruvllm_sona.adapters import AdapterStack
from ruvllm_sona.audit import read_audit
from ruvllm_sona.chain import Entry
from ruvllm_sona.command_report import held_here
from ruvllm_sona.curvature import normalized
from ruvllm_sona.files import load_tensors, save_tensors
from ruvllm_sona.gate import PARTS
from ruvllm_sona.holding import Holding, digest, load, save
from ruvllm_sona.learner import Learner, LearnerConfig
from ruvllm_sona.looking import AnswerProbe
from ruvllm_sona.measure import NetworkMeasure
from ruvllm_sona.network import Network
from ruvllm_sona.objective import ObjectiveConfig
from ruvllm_sona.records import Example
from ruvllm_sona.sites import linear_sites

SPEC = tiny.tiny_spec()
SHAPES = linear_sites(SPEC)
TEXT = tiny.TEXTS["c"]
ANSWERS = [(tuple(TEXT[n : n + 6]), tuple(TEXT[n + 8 : n + 14]), float(n % 2)) for n in range(8)]
EXAMPLES = [Example(str(n), prompt, answer, 1.0) for n, (prompt, answer, _) in enumerate(ANSWERS)]


@pytest.fixture(scope="module")
def network() -> Network:
    made = Network(SPEC, tiny.tiny_weights(SPEC, ("f32",)), dtype=torch.float32)
    for _ in made.load():
        pass
    return made


@pytest.fixture(scope="module")
def decoder():
    return tiny.tiny_decoder(SPEC, tiny.tiny_weights(SPEC, ("f32",)))


def elsewhere(work):
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(work)
        yield future
        return future.result()


def result(work):
    """What a generator returns, and how often it yields."""
    count = 0
    while True:
        try:
            next(work)
            count += 1
        except StopIteration as stop:
            return stop.value, count


def learner(ewc: float, average: int = 1) -> Learner:
    objective = ObjectiveConfig(leash=0.0, saturation=0.0)
    return Learner(SHAPES, LearnerConfig(rank=1, learning_rate=3e-3, objective=objective, average=average, ewc=ewc))


def learn(network: Network, pupil: Learner, verdict: float, rounds: int, holds=()) -> None:
    for _ in range(rounds):
        for example in EXAMPLES[:4]:
            deque(pupil.step(network, [example], [verdict], holds=holds), maxlen=0)


def consolidated(network: Network, pupil: Learner, path) -> tuple[Holding, module.Kept]:
    held = Holding(path, 1)
    kept, _ = result(held.consolidate(network, pupil.learned(), EXAMPLES[:4], {}, elsewhere))
    return held, kept


def likely(decoder, deltas, examples=tuple(EXAMPLES[:4])) -> np.ndarray:
    """Log-probabilities of answers by the decoder that answers, float64."""
    found = []
    for one in examples:
        ids, start = [*one.prompt_ids, *one.output_ids], len(one.prompt_ids) - 1
        logits = tiny.whole(decoder, ids, len(ids), Adapter("x", deltas)).astype(np.float64)[start:-1]
        logp = logits - np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1, keepdims=True))
        logp -= logits.max(-1, keepdims=True)
        found.append(logp[range(len(one.output_ids)), one.output_ids].sum())
    return np.array(found)


def product(delta: LowRank) -> np.ndarray:
    return delta.scale * delta.b.astype(np.float64) @ delta.a.astype(np.float64)


def distance(deltas, anchor) -> float:
    """Frobenius, over that of the anchor."""
    apart = sum(np.square(product(deltas[site]) - product(anchor[site])).sum() for site in anchor)
    return float(np.sqrt(apart / sum(np.square(product(one)).sum() for one in anchor.values())))


def same(one, other) -> None:
    assert set(one) == set(other)
    for site, delta in one.items():
        np.testing.assert_array_equal(delta.a, other[site].a, site)
        np.testing.assert_array_equal(delta.b, other[site].b, site)


def test_what_is_held_moves_less_under_opposite_feedback(network, decoder, tmp_path, monkeypatch) -> None:
    # A sketch as wide as the tiny model sees everything, and what 32 places say nothing about is then quite free.
    monkeypatch.setattr(module, "_COLUMNS", 16)
    moved, apart, far = [], [], []
    for strength in (0.0, 10.0, 100.0, 1e6):
        pupil = learner(strength)
        learn(network, pupil, 1.0, 4)
        before, anchor = likely(decoder, pupil.deltas()), pupil.deltas()
        held, _ = consolidated(network, pupil, tmp_path / f"{strength}.safetensors")
        learn(network, pupil, -1.0, 4, held.holds)
        moved.append(np.abs(likely(decoder, pupil.deltas()) - before).sum())
        apart.append(distance(pupil.deltas(), anchor))
        far.append(sum(float(hold.penalty(pupil.learned())[0]) for hold in held.holds))
    assert moved[0] > 1.0, "without a hold they are unlearned"
    assert moved[1] < 0.95 * moved[0] and moved[2] < 0.6 * moved[0] and moved[3] < 0.001 * moved[0]
    assert apart == sorted(apart, reverse=True) and far == sorted(far, reverse=True)
    assert far[3] < 1e-4 * far[0], "the heaviest keeps ΔW where it was, as far as it matters"


def test_a_weight_of_zero_is_no_step_to_the_last_bit(network, tmp_path) -> None:
    free, held_by_nothing = learner(0.0), learner(0.0)
    learn(network, free, 1.0, 1), learn(network, held_by_nothing, 1.0, 1)
    held, _ = consolidated(network, free, tmp_path / "held.safetensors")
    learn(network, free, -1.0, 1), learn(network, held_by_nothing, -1.0, 1, held.holds)
    np.testing.assert_equal(held_by_nothing.state(), free.state())
    assert held_by_nothing.predicted == free.predicted


def test_a_step_that_is_ended_between_adam_and_the_hold_is_none(network, tmp_path) -> None:
    pupil = learner(10.0, average=4)
    learn(network, pupil, 1.0, 1)
    held, _ = consolidated(network, pupil, tmp_path / "held.safetensors")
    before, begun = pupil.state(), 0
    _, slices = result(pupil.step(network, EXAMPLES[:1], [1.0], holds=held.holds))
    assert slices > 2 * (SPEC.num_layers + 1) + len(held.holds)
    once = pupil.state()
    assert any(np.any(once[name] != before[name]) for name in before)
    for stop in range(slices):
        pupil.restore(before)
        work = pupil.step(network, EXAMPLES[:1], [1.0], holds=held.holds)
        for _ in range(stop):
            next(work)
        work.close()
        np.testing.assert_equal(pupil.state(), before)
        begun += 1
    assert begun == slices
    deque(pupil.step(network, EXAMPLES[:1], [1.0], holds=held.holds), maxlen=0)
    np.testing.assert_equal(pupil.state(), once)
    revert = pupil.snapshot()
    deque(pupil.step(network, EXAMPLES[1:2], [1.0], holds=held.holds), maxlen=0)
    revert()
    np.testing.assert_equal(pupil.state(), once)


def test_the_fisher_information_is_that_of_the_model_and_not_of_verdicts(network, tmp_path) -> None:
    pupil = learner(1.0)
    learn(network, pupil, 1.0, 2)
    _, kept = consolidated(network, pupil, tmp_path / "a.safetensors")
    held, bad = Holding(tmp_path / "b.safetensors", 1), [Example(**{**vars(one), "quality": 0.0}) for one in EXAMPLES]
    other, _ = result(held.consolidate(network, pupil.learned(), bad[:4], {}, elsewhere))
    for name, both in kept.fisher.items():
        for mine, theirs in zip(both, other.fisher[name], strict=True):
            assert torch.equal(mine.image, theirs.image) and float(mine.trace) > 0.0
    u, v = kept.final
    assert u.shape == v.shape == (SPEC.hidden_size,) and float(v.sum()) == pytest.approx(1.0, rel=1e-5)
    total = sum(float(u.trace * v.trace) for u, v in kept.fisher.values())
    assert total == pytest.approx(sum(rows * columns for rows, columns in SHAPES.values()), rel=1e-4)


def test_consolidations_are_averaged(network, tmp_path, monkeypatch) -> None:
    """The first is itself, the second counts a half, and the horizon's and every later one as much as the horizon."""
    monkeypatch.setattr(module, "_HORIZON", 3)
    seen, probes = [], AnswerProbe.final
    monkeypatch.setattr(AnswerProbe, "final", lambda self: (seen.append(normalized(self.found)), probes(self))[1])
    pupil, path, wanted = learner(1.0), tmp_path / "held.safetensors", None
    for n, weight in enumerate((1.0, 1 / 2, 1 / 3, 1 / 3)):
        learn(network, pupil, 1.0, 1)
        kept, _ = result(Holding(path, 1).consolidate(network, pupil.learned(), EXAMPLES[n : n + 3], {}, elsewhere))
        save(path, kept)
        assert kept.count == n + 1
        now = {name: u.image for name, (u, _) in seen[n].items()}
        wanted = now if wanted is None else {m: (1 - weight) * wanted[m] + weight * one for m, one in now.items()}
        for name, image in wanted.items():
            torch.testing.assert_close(
                kept.fisher[name][0].image, image, rtol=1e-5, atol=1e-6 * float(image.abs().max())
            )


def test_a_file_gives_back_the_same_steps_to_the_last_bit(network, tmp_path) -> None:
    pupil, path = learner(10.0), tmp_path / "some" / "held.safetensors"
    learn(network, pupil, 1.0, 2)
    held, kept = consolidated(network, pupil, path)
    save(path, kept)
    again = load(path, SHAPES)
    assert (again.base, again.count, again.answers, again.time) == (digest({}), 1, 4, kept.time)
    same(again.anchor, kept.anchor)
    for one, other in zip(again.final, kept.final, strict=True):
        np.testing.assert_array_equal(one, other)
    loaded = Holding(path, 1)
    result(loaded.load(SHAPES, {}, elsewhere))
    assert loaded.looked and len(loaded.holds) == len(held.holds) > 0
    stacks = [AdapterStack.of([pupil.deltas()]) for _ in range(2)]
    for stack, one in zip(stacks, (held, loaded), strict=True):
        for _, b in stack.sites.values():
            b.mul_(1.5)
        for hold in one.holds:
            hold.prox(stack, torch.tensor([0.03], dtype=torch.float64))
    for one, other in zip(stacks[0].parameters(), stacks[1].parameters(), strict=True):
        assert torch.equal(one, other)
    foreign = Holding(path, 1)
    result(foreign.load(SHAPES, pupil.deltas(), elsewhere))
    assert not foreign.holds and foreign.preview is None, "it is about adapters on top of nothing"


def test_damaged_and_foreign_files_are_refused(network, tmp_path) -> None:
    pupil, path = learner(10.0), tmp_path / "held.safetensors"
    _, kept = consolidated(network, pupil, path)
    save(path, kept)
    with pytest.raises(LearningError, match="such as") as caught:
        load(path, {**SHAPES, "layers.2.attn.q": (64, 64)})
    assert "delete it" in str(caught.value.hint)
    with pytest.raises(LearningError, match="does not fit"):
        load(path, {**SHAPES, "layers.1.attn.q": (64, 65)})
    tensors, metadata = load_tensors(path)
    broken = {**tensors, "layers.0.attn.q.u": tensors["layers.0.attn.q.u"] * np.nan}
    for arrays, facts, what in (
        (broken, metadata, "not finite"),
        ({**tensors, "final.u": tensors["final.u"][1:]}, metadata, "final site"),
        (tensors, {"kind": "adapters"}, "of the kind 'adapters'"),
        (tensors, {**metadata, "facts": "{}"}, "base"),
        ({name: one for name, one in tensors.items() if name != "final.v"}, metadata, "final.v"),
    ):
        save_tensors(tmp_path / "other.safetensors", arrays, facts)
        with pytest.raises(LearningError, match=what):
            load(tmp_path / "other.safetensors", SHAPES)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    damaged = Holding(path, 1)
    with pytest.raises(LearningError, match="checksum"):
        result(damaged.load(SHAPES, {}, elsewhere))
    assert not damaged.holds and damaged.looked
    again, _ = result(damaged.consolidate(network, pupil.learned(), EXAMPLES[:2], {}, elsewhere))
    assert again.count == 1 and damaged.holds, "what is damaged is made anew"


def test_consolidating_is_done_in_many_slices(network, tmp_path) -> None:
    held = Holding(tmp_path / "held.safetensors", 1)
    _, slices = result(held.consolidate(network, learner(1.0).learned(), EXAMPLES[:4], {}, elsewhere))
    layers = SPEC.num_layers + 1
    assert slices >= 4 * 2 * layers, "there and back through every layer for each answer, at least"


# Through the loop.


def teach(rig, answers) -> None:
    for words in answers:
        rig.on(lambda w=words: rig.loop.teach("", *w))
        rig.idle()


def brain(rig):
    return rig.on(lambda: rig.loop.tenant().brain(0))


def actions(rig) -> list[str]:
    return [one.action for one in rig.audit()]


def test_without_it_no_line_runs_and_with_it_nothing_changes_before_the_first_time(rigs, tmp_path, monkeypatch) -> None:
    late = rigs(tmp_path / "late", ewc=10.0, consolidate_every=1000)
    teach(late, ANSWERS[:4])
    late_adapter = late.adapter()

    def never(*_: object, **__: object) -> None:
        raise AssertionError("it is switched off")

    for name in ("__init__", "consolidate", "load"):
        monkeypatch.setattr(Holding, name, never)
    monkeypatch.setattr("ruvllm_sona.curvature.Hold.prox", never)
    off = rigs(tmp_path / "off", ewc=0.0, consolidate_every=1)
    teach(off, ANSWERS[:4])
    same(off.adapter().sites, late_adapter.sites)
    assert brain(off).holding is None and not (off.folder() / "held").exists()


def test_the_loop_consolidates_holds_and_goes_on_after_a_restart(rigs, tmp_path) -> None:
    options = {"ewc": 10.0, "consolidate_every": 3, "average": 1}
    straight, free = rigs(tmp_path / "straight", **options), rigs(tmp_path / "free", ewc=0.0, average=1)
    teach(straight, ANSWERS), teach(free, ANSWERS)
    holding = brain(straight).holding
    assert actions(straight).count("consolidate") == 2 and holding.since == 2 and len(holding.holds) > 0
    assert load(holding.path, SHAPES).count == 2
    anchor = load(holding.path, SHAPES).anchor
    near, far = (distance(one.adapter().sites, anchor) for one in (straight, free))
    assert 0.0 < near < far
    first = rigs(tmp_path / "parts", **options)
    teach(first, ANSWERS[:4])
    first.engine.close()
    second = rigs(tmp_path / "parts", **options)
    assert brain(second).holding.since == 1 and brain(second).micro.anchor is not None
    assert not brain(second).holding.holds, "it is read when there is something to learn"
    teach(second, ANSWERS[4:])
    same(second.adapter().sites, straight.adapter().sites)


def test_learning_goes_on_without_a_file_that_is_damaged(rigs, capfd) -> None:
    options = {"ewc": 10.0, "consolidate_every": 3}
    first = rigs(**options)
    teach(first, ANSWERS[:3])
    path = brain(first).holding.path
    first.engine.close()
    path.write_bytes(b"\0" * 1000)
    second = rigs(**options)
    teach(second, ANSWERS[3:5])
    assert second.number() == 5 and brain(second).learner.steps == 5 and not brain(second).holding.holds
    said = capfd.readouterr().err
    assert "what was learned is not held" in said and "is damaged" in said
    teach(second, ANSWERS[5:6])
    assert brain(second).holding.holds and load(path, SHAPES).count == 1


@pytest.mark.parametrize("what", ["rollback", "forget one", "forget all", "another setting"])
def test_it_is_dropped_with_what_it_was_taken_from(rigs, what: str) -> None:
    rig = rigs(ewc=10.0, consolidate_every=3)
    teach(rig, ANSWERS[:4])
    path = brain(rig).holding.path
    assert path.exists() and brain(rig).micro.anchor is not None
    if what == "another setting":  # whoever forgets has switched it off since
        rig.engine.close()
        rig = rigs(ewc=0.0)
    tenant = rig.on(lambda: rig.loop.tenant())
    gone = next(tenant.examples()).request_id

    def change() -> bool:
        if what == "rollback":
            tenant.rollback(2)
        else:
            tenant.forget(gone if what == "forget one" else "")
        return path.exists()

    assert not rig.on(change)
    holding = brain(rig).holding
    if holding is not None:
        assert not holding.holds and holding.preview is None and holding.since == 0 and brain(rig).micro.anchor is None
    rig.idle()
    assert path.exists() == (what == "forget one"), "what is left is learned and consolidated anew"


def test_a_consolidation_that_is_under_way_does_not_outlive_forgetting(rigs) -> None:
    rig = rigs(ewc=10.0, consolidate_every=3)
    teach(rig, ANSWERS[:2])

    def change() -> int:
        tenant, count = rig.loop.tenant(), 0
        rig.loop.teach("", *ANSWERS[2])
        while not tenant.brain(0).holding.due:
            rig.loop._schedule.run(0.0)
        while tenant.brain(0).holding.due and count < 30:
            rig.loop._schedule.run(0.0)
            count += 1
        tenant.forget("")
        return count

    assert rig.on(change) == 30, "it was in the middle"
    rig.idle()
    assert not list(rig.folder().rglob("held/*")) and not brain(rig).holding.holds
    assert "consolidate" not in actions(rig)


def test_what_the_deep_loop_publishes_is_held(rigs, monkeypatch) -> None:
    rig = rigs(ewc=10.0, consolidate_every=1000)
    teach(rig, ANSWERS)
    assert "consolidate" not in actions(rig)
    better = itertools.count(1.0)
    monkeypatch.setattr("ruvllm_sona.deep._margin", lambda *_: iter([next(better)]))  # so that it is published
    rig.on(lambda: rig.loop.deepen(""))
    rig.idle()
    assert actions(rig)[-1] == "consolidate"
    kept, own = load(brain(rig).holding.path, SHAPES), brain(rig)
    assert not any(np.any(one.b) for one in kept.anchor.values()), "nothing on top of what was published"
    assert kept.base == digest(own.below) != digest({}) and own.holding.holds
    before = own.adapter()
    teach(rig, ANSWERS[:1])
    assert own.number > int(before.version.split(".")[1]) and own.holding.holds
    rig.engine.close()
    again = rigs(ewc=10.0, consolidate_every=1000)
    teach(again, ANSWERS[1:2])
    assert brain(again).holding.holds


def test_status_says_what_is_held_and_what_is_damaged(rigs) -> None:
    rig = rigs(ewc=10.0, consolidate_every=3)
    teach(rig, ANSWERS[:4])
    place, path = SimpleNamespace(folder=rig.folder(), settings=rig.loop.settings), brain(rig).holding.path
    found = held_here(place)
    (one,) = found["patterns"]
    assert (found["ewc"], found["consolidate_every"]) == (10.0, 3)
    assert (one["pattern"], one["answers"], one["count"], one["bytes"]) == (0, 3, 1, path.stat().st_size)
    assert one["time"] == load(path, SHAPES).time
    path.write_bytes(b"nothing")
    (one,) = held_here(place)["patterns"]
    assert "damaged" in one["problem"]


def test_a_preview_near_what_is_held_moves_less(rigs, tmp_path) -> None:
    moved = []
    for name, options in (("with", {"ewc": 1.0, "consolidate_every": 2}), ("without", {"ewc": 0.0})):
        rig = rigs(tmp_path / name, **options)
        teach(rig, ANSWERS[:2])
        answers = [rig.answer(seed=seed) for seed in range(3)]

        def rate(rig=rig, answers=answers) -> float:
            for one in answers:
                rig.loop.feedback(one.request_id, 0.0)
            delta = rig.loop.tenant().brain(0).micro.current
            return float(np.linalg.norm(delta.b @ delta.a))

        assert (brain(rig).micro.anchor is not None) == (name == "with")
        moved.append(rig.on(rate))
    assert 0.0 < moved[0] < moved[1]


def entries(rig) -> list[Entry]:
    """The audit log, on the engine's thread."""
    return list(read_audit(rig.loop.tenant().folder / "audit.jsonl"))


def judged(rig) -> None:
    """Have the gate look at previews, and at nothing else."""
    tenant = rig.loop.tenant()
    work = rig.loop.study.preview(tenant)
    for found in work:
        if found is not None:
            found.result()


def test_a_preview_that_harms_anchors_is_taken_back_and_another_stays(rigs) -> None:
    rig = rigs()
    teach(rig, ANSWERS[:2])
    answers = [rig.answer(seed=seed) for seed in range(3)]

    def go() -> None:
        own = rig.loop.tenant().brain(0)
        published = own.adapter()
        rig.loop.feedback(answers[0].request_id, 1.0)
        good = own.adapter()
        assert good.version != published.version and own.unjudged
        judged(rig)
        assert own.adapter() is good and not own.unjudged, "what does no harm stays"
        rig.loop.feedback(answers[1].request_id, 0.0)
        assert own.adapter().version != good.version
        gate = rig.loop.study._gate
        limits, gate.config = gate.config, type(gate.config)(max_kl=0.0)
        judged(rig)
        gate.config = limits
        same(own.adapter().sites, good.sites)
        assert own.adapter().version == good.version
        rejected = [one for one in entries(rig) if one.action == "reject"]
        assert len(rejected) == 1 and rejected[0].actor == "instant" and "kl is" in rejected[0].note
        assert rejected[0].after == good.version != rejected[0].before

    rig.on(go)


def test_a_preview_that_goes_too_far_on_texts_is_made_smaller(rigs) -> None:
    """Its divergence, on top of what is published, against one that is worked out here."""
    rig = rigs()
    teach(rig, ANSWERS[:2])
    answers = [rig.answer(seed=seed) for seed in range(2)]

    def away(deltas, anchors) -> float:
        work = rig.loop.study._made[1](deltas, anchors)
        while True:
            try:
                next(work)
            except StopIteration as end:
                return float(np.concatenate([one.kl for one in end.value]).mean())

    def go() -> None:
        study, own = rig.loop.study, rig.loop.tenant().brain(0)
        rig.loop.feedback(answers[0].request_id, 1.0)
        judged(rig)
        assert own.away is not None and not own.unjudged
        anchors = study._gate._anchors[: study._gate._texts]
        before, whole = own.micro.current, own.micro.version
        assert away(own.published, anchors) == pytest.approx(own.away, rel=1e-3)
        added = away(own.adapter().sites, anchors) - own.away
        assert added > 0.0
        study._settings = study._settings.model_copy(update={"preview_kl": added / 2})
        own.accepted = ""
        judged(rig)
        after = own.micro.current
        parts = [part for part in PARTS if np.array_equal(after.b, before.b * np.float32(part))]
        assert len(parts) == 1 and parts[0] < 1.0 and own.micro.version == own.accepted != whole
        assert 0.0 < away(own.adapter().sites, anchors) - own.away <= added / 2 * 1.001
        study._settings = study._settings.model_copy(update={"preview_kl": 0.0})
        own.accepted = ""
        judged(rig)
        assert not np.any(own.micro.current.b)
        assert "on texts" in entries(rig)[-1].note

    rig.on(go)


def test_a_verdict_on_a_preview_that_is_gone_brings_nothing_back(rigs) -> None:
    rig = rigs()
    teach(rig, ANSWERS[:2])
    answers = [rig.answer(seed=seed) for seed in range(2)]

    def go() -> None:
        tenant = rig.loop.tenant()
        own = tenant.brain(0)
        rig.loop.feedback(answers[0].request_id, 1.0)
        work = rig.loop.study.preview(tenant)
        next(work)
        tenant.rollback(2)
        for _ in work:
            pass
        gone = own.accepted
        rig.loop.feedback(answers[1].request_id, 1.0)
        own.take_back()
        assert gone == "" and not np.any(own.micro.current.b) and own.number == 2

    rig.on(go)


def test_a_preview_alone_is_judged_in_idle_time_before_anything_is_learned(rigs) -> None:
    rig = rigs(max_kl=0.0, max_loss=0.0)
    done = rig.answer()

    def go() -> list[str]:
        rig.loop.feedback(done.request_id, 1.0)
        own = rig.loop.tenant().brain(0)
        assert own.adapter() is not None
        for _ in range(10_000):
            rig.loop._schedule.run(0.001)
            if own.adapter() is None:
                break
        return [one.actor for one in entries(rig) if one.action == "reject"]

    assert rig.on(go) == ["instant"]


def test_a_preview_is_measured_as_the_model_that_answers_says_it(network, decoder) -> None:
    """Of states that are kept from before the final site, against a forward pass of the decoder."""
    measure, text = NetworkMeasure(network), tuple(tiny.TEXTS["b"])
    pupil = learner(0.0)
    learn(network, pupil, 1.0, 1)
    random, layers, counts = np.random.default_rng(0), pupil.deltas(), []
    a, b = (random.normal(0, 0.1, shape).astype(np.float32) for shape in ((2, 64), (64, 2)))
    final = {FINAL_SITE: LowRank(a, b, 0.5)}
    copy = {site: LowRank(2.0 * one.a, one.b) for site, one in layers.items()}
    for deltas in (layers, {**layers, **final}, final, copy, {**copy, **final}, layers):
        (found,), slices = result(measure(deltas, [text]))
        counts.append(slices)
        logits = tiny.whole(decoder, text, len(text), Adapter("x", deltas)).astype(np.float64)[:-1]
        logp = logits - logits.max(-1, keepdims=True)
        logp -= np.log(np.exp(logp).sum(-1, keepdims=True))
        np.testing.assert_allclose(found.logprobs, logp[range(len(logp)), text[1:]], atol=1e-4)
    layer = SPEC.num_layers + 1
    assert counts == [2 * layer + 1, 1, 1, layer + 1, 1, layer + 1], "layers are not computed for the final site alone"
