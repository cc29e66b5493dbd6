"""The background and the deep loop: slices, answers that cannot be learned from, and both of them at once."""

from __future__ import annotations

import time

import numpy as np
import pytest

from ruvllm_core.errors import LearningError
from ruvllm_core.testing import tiny
from ruvllm_sona.leash_texts import leash_piece

TEXT = tiny.TEXTS["c"]
ANSWERS = [(tuple(TEXT[n : n + 6]), tuple(TEXT[n + 8 : n + 14]), float(n % 2)) for n in range(8)]
#: Good ones are alike and so are bad ones: what is learned from some holds for those held out.
ALIKE = [
    (prompt, tuple(TEXT[8 + 8 * (n % 2) : 14 + 8 * (n % 2)]), quality) for n, (prompt, _, quality) in enumerate(ANSWERS)
]


def teach(rig, answers) -> None:
    for words in answers:
        rig.on(lambda w=words: rig.loop.teach("", *w))


def deepen(rig) -> list[Exception | None]:
    ended: list[Exception | None] = []
    rig.on(lambda: rig.loop.deepen("", ended.append))
    return ended


def test_an_update_is_done_in_many_slices(rigs) -> None:
    rig = rigs()

    def slices() -> int:
        rig.loop.teach("", *ANSWERS[1])
        count = 0
        while rig.loop._schedule.run(0.0):
            count += 1
        return count

    assert rig.on(slices) > 8 * 3, "8 anchors through 2 layers and the last norm, at least"
    assert rig.number() == 1


def test_an_answer_that_breaks_does_not_block_the_rest(rigs, monkeypatch: pytest.MonkeyPatch) -> None:
    rig = rigs()
    teach(rig, ANSWERS[:1])
    rig.idle()
    from ruvllm_sona.learner import Learner

    step, broken = Learner.step, [True]

    def sometimes(self, *arguments, **named):
        if broken.pop() if broken else False:
            raise RuntimeError("no memory for this one")
        return step(self, *arguments, **named)

    monkeypatch.setattr(Learner, "step", sometimes)
    teach(rig, ANSWERS[1:3])
    rig.idle()
    assert [one.note for one in rig.audit() if one.action == "refuse"] == ["no memory for this one"]
    brain = rig.on(lambda: rig.loop.tenant().brain(0))
    assert brain.learner.steps == 2 and not brain.pending


def test_every_step_has_a_text_that_nobody_rated(rigs, monkeypatch: pytest.MonkeyPatch) -> None:
    """The next one in every step that counts, in the background and in the deep loop; none without a tokenizer."""
    from ruvllm_sona.learner import Learner

    step, found = Learner.step, []

    def noted(self, *arguments, **named):
        found.append((self.steps, list(named["texts"])))
        return step(self, *arguments, **named)

    monkeypatch.setattr(Learner, "step", noted)
    rig = rigs()
    teach(rig, ANSWERS[:1])
    rig.idle()
    assert found == [(0, [])]
    texts = [tuple(tiny.TEXTS["a"]), tuple(tiny.TEXTS["b"])]
    rig.loop.study._leash_texts = texts
    teach(rig, ANSWERS[1:])
    rig.idle()
    deepen(rig)
    rig.idle()
    assert [steps for steps, _ in found[:8]] == list(range(8)) and len(found) > 8
    assert all(pieces == [leash_piece(texts, steps)] for steps, pieces in found[1:])


def test_a_step_taken_back_leaves_no_trace(rigs) -> None:
    rig = rigs()
    teach(rig, ANSWERS[:2])
    rig.idle()
    learner = rig.on(lambda: rig.loop.tenant().brain(0)).learner
    network, before = rig.loop.study._made[0], learner.state()
    example = rig.on(lambda: list(rig.loop.tenant().examples()))[0]

    def go() -> None:
        revert = learner.snapshot()
        for _ in learner.step(network, [example], [1.0]):
            pass
        assert learner.steps == 3
        revert()

    rig.on(go)
    np.testing.assert_equal(learner.state(), before)
    rig.on(lambda: [None for _ in learner.step(network, [example], [1.0])])
    once = learner.state()
    learner.restore(before)
    rig.on(lambda: [None for _ in learner.step(network, [example], [1.0])])
    np.testing.assert_equal(learner.state(), once)


def test_deep_training_says_what_it_came_to(rigs) -> None:
    rig = rigs()
    teach(rig, ALIKE)
    rig.idle()
    before, ended = rig.number(), deepen(rig)
    rig.idle()
    assert ended == [None]
    (last,) = [one for one in rig.audit() if one.actor == "deep"]
    assert (last.action, last.note, rig.number()) == ("deep", "", before + 1)
    assert not (rig.folder() / "deep.safetensors").exists()


def test_deep_training_without_good_and_bad_says_so(rigs) -> None:
    rig = rigs()
    teach(rig, ANSWERS[:1])
    ended = deepen(rig)
    rig.idle()
    assert len(ended) == 1 and "needs good and bad" in str(ended[0])
    assert len(rig.answer().token_ids) == 8


def test_deep_training_that_is_ended_says_so_and_goes_on_later(rigs) -> None:
    rig = rigs()
    teach(rig, ALIKE)
    rig.idle()
    ended: list[Exception | None] = []

    def part() -> None:
        rig.loop.deepen("", ended.append)
        with pytest.raises(LearningError, match="under way"):
            rig.loop.deepen("")
        path, until = rig.loop.tenant().folder / "deep.safetensors", time.monotonic() + 20.0
        while not path.exists() and time.monotonic() < until:
            rig.loop._schedule.run(0.0)
        assert path.exists()
        rig.loop._schedule.drop()

    rig.on(part)
    assert len(ended) == 1 and "was ended" in str(ended[0])
    rig.engine.close()
    again = rigs()
    ended = deepen(again)
    again.idle()
    assert ended == [None] and [one.action for one in again.audit() if one.actor == "deep"] == ["deep"]


def test_feedback_during_deep_training_is_learned(rigs) -> None:
    rig = rigs()
    teach(rig, ANSWERS[:6])
    rig.idle()
    ended = deepen(rig)

    def both() -> None:
        for n, words in enumerate(ANSWERS):
            rig.loop.teach("", *words)
            for _ in range(10 + 7 * n):
                rig.loop._schedule.run(0.0)

    rig.on(both)
    rig.idle()
    brain = rig.on(lambda: rig.loop.tenant().brain(0))
    assert ended == [None] and not brain.pending and not brain.hand
    assert brain.number == brain.versions.current
    assert rig.on(lambda: rig.loop.tenant().learned) >= 8
    kept = brain.versions.load(brain.number)
    for site, delta in rig.adapter().sites.items():
        np.testing.assert_array_equal(delta.b, kept[site].b)
