"""What a user's memory keeps: over restarts, kills, rollbacks and forgetting, to the last bit."""

from __future__ import annotations

import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest

from ruvllm_core.errors import LearningError
from ruvllm_core.protocols import Adapter, LowRank
from ruvllm_core.testing import tiny
from ruvllm_sona.audit import verify_audit
from ruvllm_sona.gate import Figures, Verdict
from ruvllm_sona.patterns import Change
from ruvllm_sona.sites import linear_sites

TEXT = tiny.TEXTS["c"]
ANSWERS = [(tuple(TEXT[n : n + 6]), tuple(TEXT[n + 8 : n + 14]), float(n % 2)) for n in range(6)]


def same(one, other) -> None:
    assert set(one.sites) == set(other.sites)
    for site, delta in one.sites.items():
        np.testing.assert_array_equal(delta.a, other.sites[site].a, site)
        np.testing.assert_array_equal(delta.b, other.sites[site].b, site)
        assert delta.scale == other.sites[site].scale


def teach(rig, answers, user: str = "", idle: bool = True) -> None:
    for prompt, answer, quality in answers:
        assert rig.on(lambda w=(prompt, answer, quality): rig.loop.teach(user, *w)).status == "deferred"
        if idle:
            rig.idle()


def ids(rig, user: str = "") -> list[str]:
    return [one.request_id for one in rig.on(lambda: list(rig.loop.tenant(user).examples()))]


def test_versions_chain_in_the_audit_log(rigs) -> None:
    rig = rigs()
    teach(rig, ANSWERS[:3])
    entries = rig.audit()
    assert [one.action for one in entries] == ["start", *["feedback", "publish"] * 3]
    published = [(one.before, one.after) for one in entries if one.action == "publish"]
    assert published == [("0", "1"), ("1", "2"), ("2", "3")]
    assert verify_audit(rig.folder() / "audit.jsonl").ok
    kept = rig.on(lambda: rig.loop.tenant().brain(0).versions.kept())
    assert [one.number for one in kept] == [1, 2, 3] and [one.current for one in kept] == [False, False, True]
    assert all(len(one.a) == 1 for one in rig.adapter().sites.values()), "versions do not grow in rank"


def test_a_version_that_does_not_pass_changes_nothing(rigs) -> None:
    rig = rigs(max_kl=0.0, max_loss=0.0)
    base = rig.logits()
    assert rig.rate(1.0).status == "applied"
    rig.idle()
    assert rig.number() == 0 and rig.adapter() is None, "the preview goes with it"
    np.testing.assert_array_equal(rig.logits(), base)
    rejected = [one for one in rig.audit() if one.action == "reject"]
    assert [one.actor for one in rejected] == ["instant", "background"]
    assert all("kl is" in one.note for one in rejected)
    brain = rig.on(lambda: rig.loop.tenant().brain(0))
    assert not brain.pending and not brain.hand and brain.learner.steps == 0 and brain.covers == 1


def test_the_old_version_stays_when_the_next_is_poisoned(rigs) -> None:
    rig = rigs()
    teach(rig, ANSWERS[:1])
    before = rig.adapter()
    rig.on(lambda: setattr(rig.loop.study._gate, "config", type(rig.loop.study._gate.config)(max_kl=0.0)))
    teach(rig, ANSWERS[1:2])
    assert rig.number() == 1 and rig.adapter().version == before.version
    same(rig.adapter(), before)


def test_a_restart_goes_on_as_if_nothing_had_been(rigs, tmp_path: Path) -> None:
    straight = rigs(tmp_path / "straight")
    teach(straight, ANSWERS)
    first = rigs()
    teach(first, ANSWERS[:3])
    version, logits = first.adapter().version, first.logits()
    first.engine.close()
    second = rigs()
    assert second.adapter().version == version
    np.testing.assert_array_equal(second.logits(), logits)
    teach(second, ANSWERS[3:])
    same(second.adapter(), straight.adapter())


def test_closing_in_the_middle_of_an_update_learns_it_once(rigs, tmp_path: Path) -> None:
    straight = rigs(tmp_path / "straight")
    teach(straight, ANSWERS[:4], idle=False)
    straight.idle()
    for slices in (3, 20, 60, 90):
        rig = rigs(tmp_path / str(slices))

        def part(rig=rig, slices=slices) -> None:
            tenant = rig.loop.tenant()
            for words in ANSWERS[:4]:
                rig.loop.teach("", *words)
            for _ in range(slices):
                rig.loop._schedule.run(0.0)
            rig.loop._schedule.drop()
            tenant.save()

        rig.on(part)
        rig.engine.close()
        again = rigs(tmp_path / str(slices))
        again.adapter(), again.idle()
        same(again.adapter(), straight.adapter())


def test_rollback_is_exact_also_after_a_restart(rigs) -> None:
    rig = rigs()
    logits = []
    for one in ANSWERS[:4]:
        teach(rig, [one])
        logits.append((rig.adapter(), rig.logits()))
    rig.on(lambda: rig.loop.tenant().rollback(2))
    same(rig.adapter(), logits[1][0])
    assert rig.adapter().version == logits[1][0].version
    np.testing.assert_array_equal(rig.logits(), logits[1][1])
    rig.idle()
    assert rig.number() == 2, "what was rolled back is not learned again"
    rig.engine.close()
    again = rigs()
    np.testing.assert_array_equal(again.logits(), logits[1][1])
    teach(again, ANSWERS[4:5])
    assert again.number() == 5, "no number is given twice"
    again.on(lambda: again.loop.tenant().rollback(0))
    assert again.adapter() is None
    with pytest.raises(LearningError, match="there is no version 9"):
        again.on(lambda: again.loop.tenant().rollback(9))


def test_forgetting_one_answer_is_never_having_heard_of_it(rigs, tmp_path: Path) -> None:
    never = rigs(tmp_path / "never")
    teach(never, [*ANSWERS[:2], *ANSWERS[3:]])
    rig = rigs()
    teach(rig, ANSWERS)
    gone = ids(rig)[2]
    assert rig.on(lambda: rig.loop.tenant().forget("nobody")) == 0 and rig.number() == 6
    assert rig.on(lambda: rig.loop.forget("", gone)) == 1
    assert rig.adapter() is None, "the base model answers until the rest is learned anew"
    rig.idle()
    same(rig.adapter(), never.adapter())
    assert gone not in ids(rig) and len(ids(rig)) == 5
    entry = next(one for one in rig.audit() if one.action == "forget")
    assert (entry.before, entry.after, entry.note) == ("6", "0", "1 records")
    assert gone.encode() not in b"".join(path.read_bytes() for path in rig.folder().rglob("*.safetensors"))
    rig.engine.close()
    again = rigs()
    same(again.adapter(), never.adapter())


def test_forgetting_all_leaves_the_base_model(rigs) -> None:
    rig = rigs()
    base = rig.logits()
    teach(rig, ANSWERS[:3])
    assert rig.on(lambda: rig.loop.forget()) == 3
    rig.idle()
    assert rig.adapter() is None and ids(rig) == []
    np.testing.assert_array_equal(rig.logits(), base)
    assert not list(rig.folder().rglob("0*.safetensors"))


@pytest.mark.parametrize("what", ["forget", "rollback"])
@pytest.mark.parametrize("slices", [2, 12, 40, 100])
def test_learning_that_is_under_way_does_not_undo_it(rigs, what: str, slices: int) -> None:
    rig = rigs()
    teach(rig, ANSWERS[:2])

    def change() -> None:
        tenant = rig.loop.tenant()
        rig.loop.teach("", *ANSWERS[2])
        for _ in range(slices):
            rig.loop._schedule.run(0.0)
        if what == "forget":
            tenant.forget("")
        else:
            tenant.rollback(1)

    rig.on(change)
    rig.idle()
    assert rig.number() == (0 if what == "forget" else 1)
    assert (rig.adapter() is None) == (what == "forget")


def test_replaying_costs_no_budget_and_frees_none(rigs) -> None:
    rig = rigs()
    teach(rig, ANSWERS)
    spent = rig.on(lambda: rig.loop.tenant().ledger.spent(rig.loop.tenant().ledger._now).hour)
    assert spent > 0.0
    gone = ids(rig)[0]
    rig.on(lambda: rig.loop.forget("", gone)), rig.idle()
    assert rig.number() > 6
    assert rig.on(lambda: rig.loop.tenant().ledger.spent(rig.loop.tenant().ledger._now).hour) == spent


def test_what_was_refused_is_not_learned_when_the_rest_is(rigs) -> None:
    rig = rigs(nats_per_hour=1e-9)
    teach(rig, ANSWERS[:3])
    rig.on(lambda: rig.loop.forget("", ids_of(rig)[0])), rig.idle()
    assert rig.number() == 0 and rig.on(lambda: len(rig.loop.tenant().refused)) == 3


def ids_of(rig) -> list[str]:
    return [one.request_id for one in rig.loop.tenant().examples()]


def test_a_copy_of_a_running_memory_learns_what_was_acknowledged(rigs, tmp_path: Path) -> None:
    """The folder as a killed process leaves it, at any moment: here in the middle of an update."""
    straight = rigs(tmp_path / "straight")
    teach(straight, ANSWERS[:3])
    rig = rigs()
    teach(rig, ANSWERS[:2])
    folder = tmp_path / "copy"

    def killed() -> None:
        rig.loop.teach("", *ANSWERS[2])
        for _ in range(30):
            rig.loop._schedule.run(0.0)
        shutil.copytree(tmp_path / "learned", folder)

    rig.on(killed)
    copy = rigs(folder)
    assert copy.adapter() is not None
    copy.idle()
    assert len(ids(copy)) == 3 and copy.number() == 3
    same(copy.adapter(), straight.adapter())


def test_forgetting_that_was_killed_is_finished(rigs, monkeypatch: pytest.MonkeyPatch) -> None:
    rig = rigs()
    teach(rig, ANSWERS[:3])
    gone = ids(rig)[1]

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("ruvllm_sona.log.Log.rewrite", killed)
        with pytest.raises(KeyboardInterrupt):
            rig.on(lambda: rig.loop.tenant().forget(gone))
    folder = rig.folder()
    copy = folder.parents[1].with_name("copy")
    shutil.copytree(folder.parents[1], copy)
    again = rigs(copy)
    again.adapter(), again.idle()
    assert gone not in ids(again) and len(ids(again)) == 2


def test_a_killed_process_loses_nothing_that_it_acknowledged(rigs, tmp_path: Path) -> None:
    program = f"""
        import os, sys
        sys.path.insert(0, {str(Path(__file__).parent)!r})
        from pathlib import Path
        from conftest import Rig
        from test_sona_tenant import ANSWERS, teach
        rig = Rig(Path({str(tmp_path / "learned")!r}))
        teach(rig, ANSWERS[:2])
        teach(rig, ANSWERS[2:], idle=False)
        os._exit(9)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 9, done.stderr
    rig = rigs()
    assert rig.adapter() is not None
    rig.idle()
    assert [one.quality for one in rig.on(lambda: list(rig.loop.tenant().examples()))] == [q for *_, q in ANSWERS]
    assert rig.on(lambda: rig.loop.tenant().brain(0).covers) >= 6
    assert not rig.on(lambda: rig.loop.tenant().brain(0).pending)


def random_deltas(seed: int) -> dict[str, LowRank]:
    rng, found = np.random.default_rng(seed), {}
    for site, (rows, columns) in linear_sites(tiny.tiny_spec()).items():
        a, b = (rng.normal(0, 0.02, shape).astype(np.float32) for shape in ((1, columns), (rows, 1)))
        found[site] = LowRank(a, b, 0.5)
    return found


@pytest.mark.parametrize("passes", [True, False])
def test_patterns_that_become_one_keep_what_both_have_learned(rigs, passes: bool) -> None:
    rig = rigs()
    teach(rig, ANSWERS[:1])
    tenant = rig.on(lambda: rig.loop.tenant())
    both = [random_deltas(seed) for seed in (1, 2)]
    held = tenant.folder / "held" / "0001.safetensors"

    def elsewhere(work):
        yield None
        return work()

    def judge(candidate):
        yield None
        reasons = () if passes else ("it harms",)
        return Verdict(passes, reasons, Figures(), 1.0, candidate if passes else None)

    def maintain():
        yield None
        return [Change("merge", 0, 1, "alike", 0.25)]

    def run() -> tuple[int, int, Adapter | None]:
        for pattern, deltas in enumerate(both):
            brain = tenant.brain(pattern)
            brain.adopt(brain.publish(deltas, {}, 0, brain.life), deltas, 0)
            brain.rebase(deltas)
        tenant.brain(1).pending.append((next(tenant.examples()), 0.5))
        held.parent.mkdir()
        held.write_bytes(b"of the other")
        tenant.bank.maintain = maintain
        for _ in tenant.maintain(elsewhere, judge):
            pass
        assert set(tenant.brains) == {0}
        (brain,) = tenant.brains.values()
        waiting = len(brain.pending)
        assert brain.holding.due == passes, "what was merged is to be held"
        assert not held.exists(), "and the other one's is gone"
        brain.holding.since = 0
        brain.pending.clear()  # or it would be learned from in idle time
        return waiting, brain.number, brain.adapter()

    before = rig.number()
    waiting, number, adapter = rig.on(run)
    assert waiting == 1, "what waited for the one waits for the other"
    assert number == before + (2 if passes else 1)
    assert adapter is not None
    for site, delta in adapter.sites.items():
        first, second = (one[site].scale * (one[site].b @ one[site].a) for one in both)
        expected = 0.75 * first + 0.25 * second if passes else first
        np.testing.assert_allclose(delta.scale * (delta.b @ delta.a), expected, atol=1e-7)
    assert [one.action for one in rig.audit()][-2:] == ["publish" if passes else "reject", "merge"]
