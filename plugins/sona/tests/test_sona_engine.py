"""Learning as a user meets it: an engine answers, hears a verdict, and answers otherwise."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import numpy as np
import pytest

from ruvllm_core.errors import LearningError
from ruvllm_core.testing import tiny
from ruvllm_sona.files import FolderLock

PROMPT = tuple(tiny.TEXTS["c"][:8])


def test_without_feedback_it_is_the_base_model_bit_for_bit(rigs, tmp_path: Path) -> None:
    rig = rigs()
    base = tiny.whole(rig.decoder, tiny.TEXTS["b"])
    rig.answer(), rig.answer(user="anna")
    rig.idle()
    assert rig.adapter() is None and rig.adapter("anna") is None
    np.testing.assert_array_equal(rig.logits(), base)
    assert not list((tmp_path / "learned").rglob("*")), "who gives no feedback leaves nothing behind"


def test_feedback_changes_the_next_request_at_once_and_no_running_one(rigs) -> None:
    rig = rigs(background=False)
    base, asked = rig.logits(), rig.answer(max_tokens=30, temperature=0.0)
    first = rig.answer()
    running = rig.engine.stream(list(PROMPT), asked_params(30))
    next(iter(running))
    result = rig.engine.feedback(first.request_id, 1.0)["sona"]
    assert result.status == "applied" and result.reason == ""
    assert running.result().token_ids == asked.token_ids
    adapter = rig.adapter()
    assert adapter is not None and adapter.version == result.version and set(adapter.sites) == {"final"}
    assert np.abs(rig.logits() - base).max() > 0.0


def asked_params(count: int):
    from ruvllm_core.generate.request import GenerateParams

    return GenerateParams(max_tokens=count, temperature=0.0, ignore_eos=True)


def test_a_greedy_answer_is_deferred_and_learned_in_the_background(rigs) -> None:
    rig = rigs()
    base = rig.logits()
    result = rig.rate(1.0, temperature=0.0)
    assert result.status == "deferred" and "greedy" in result.reason
    rig.idle()
    assert rig.number() == 1
    assert np.abs(rig.logits() - base).max() > 0.0
    adapter = rig.adapter()
    assert adapter is not None and len(adapter.sites) == 14


def test_a_foreign_answer_is_deferred_then_learned_and_likelier(rigs) -> None:
    rig = rigs(learning_rate=3e-3)
    base, answer = rig.logits(), tuple(tiny.TEXTS["b"][8:16])
    prompt = tuple(tiny.TEXTS["b"][:8])

    def likely() -> float:
        logits = rig.logits().astype(np.float64)[7:15]
        return float((logits - np.log(np.exp(logits).sum(-1, keepdims=True)))[range(8), answer].sum())

    before = likely()
    result = rig.on(lambda: rig.loop.teach("", prompt, answer, 1.0))
    assert result.status == "deferred" and result.version == ""
    np.testing.assert_array_equal(rig.on(lambda: tiny.whole(rig.decoder, tiny.TEXTS["b"])), base)
    rig.idle()
    assert likely() > before
    for words in ((prompt, answer, 1.5), (prompt, (999,), 1.0), ((), answer, 1.0), (prompt * 9, answer, 1.0)):
        with pytest.raises(LearningError):
            rig.on(lambda words=words: rig.loop.teach("", *words))


def test_what_will_never_change_anything_is_refused(rigs) -> None:
    rig = rigs()
    assert rig.rate(0.5).status == "refused"  # the baseline is 0.5 at first
    off = rigs(Path(rig.folder()).parent.parent / "off", background=False)
    assert off.rate(1.0, temperature=0.0).status == "refused"
    assert off.on(lambda: off.loop.teach("", (1, 2), (3, 4), 1.0)).status == "refused"
    off.idle()
    assert off.adapter() is None


def test_two_users_are_apart(rigs) -> None:
    rig = rigs()
    base = rig.logits("ben")
    rig.rate(1.0, user="anna"), rig.idle()
    assert rig.adapter("anna") is not None and rig.adapter("ben") is None and rig.adapter() is None
    rig.rate(0.0, user="ben"), rig.idle()
    anna, ben = rig.adapter("anna"), rig.adapter("ben")
    assert anna.version != ben.version
    kept = anna.sites["layers.0.attn.q"].b.copy()
    for _ in range(3):
        rig.rate(0.0, user="ben")
    rig.idle()
    assert rig.adapter("anna").version == anna.version
    np.testing.assert_array_equal(rig.adapter("anna").sites["layers.0.attn.q"].b, kept)
    assert np.abs(rig.logits("ben") - base).max() > 0
    asked = [rig.engine._worker._adapted(tiny.tiny_request(PROMPT, user=user)) for user in ("anna", "ben", "")]
    assert len({one.cache_key for one in asked}) == 3


def test_a_locked_memory_is_left_alone_and_taken_up_later(rigs, monkeypatch: pytest.MonkeyPatch) -> None:
    first = rigs()
    done = first.answer()
    first.engine.feedback(done.request_id, 1.0), first.idle()
    folder, version, learned = first.folder(), first.adapter().version, first.logits()
    first.engine.close()
    lock, second = FolderLock(folder), rigs()
    done = second.answer()
    assert len(done.token_ids) == 8
    borrowed = second.adapter()
    assert borrowed.version == version and second.adapter() is borrowed, "what was published is used, and not changed"
    np.testing.assert_array_equal(second.logits(), learned)
    with pytest.raises(LearningError, match="is in use"):
        second.engine.feedback(done.request_id, 1.0)
    assert len(second.answer().token_ids) == 8
    lock.close()
    now = time.monotonic()
    monkeypatch.setattr("ruvllm_sona.loop.time.monotonic", lambda: now + 60.0)
    assert second.adapter().version == version


def test_a_job_that_fails_takes_nothing_down(rigs, monkeypatch: pytest.MonkeyPatch) -> None:
    rig = rigs()

    def broken(*_: object) -> None:
        raise MemoryError("no room")

    monkeypatch.setattr("ruvllm_sona.network.Network.__init__", broken)
    assert rig.rate(1.0).status == "applied"
    rig.idle()
    assert len(rig.answer().token_ids) == 8 and rig.number() == 0
    monkeypatch.undo()
    rig.rate(1.0, seed=2), rig.idle()
    tenant = rig.on(lambda: rig.loop.tenant())
    assert rig.number() == 1 and tenant.brain(0).covers >= 2, "what waited is learned when it works again"


def test_limits_of_rate_and_of_nats_say_why(rigs) -> None:
    rig = rigs(burst=2, feedback_per_minute=1.0)
    assert [rig.rate(1.0, seed=n).status for n in range(3)] == ["applied", "applied", "refused"]
    assert "more often than 1 times a minute" in rig.rate(1.0).reason
    poor = rigs(Path(rig.folder()).parent.parent / "poor", nats_per_hour=1e-9)
    poor.rate(1.0), poor.idle()
    assert poor.number() == 0
    refused = [entry for entry in poor.audit() if entry.action == "refuse"]
    assert len(refused) == 1 and "of one hour allow" in refused[0].note
    tight = rigs(Path(rig.folder()).parent.parent / "tight", nats_per_hour=1e-9, background=False)
    result = tight.rate(1.0)
    assert result.status == "refused" and "of one hour allow" in result.reason and tight.adapter() is None


def test_ticks_keep_their_budget_with_ten_thousand_answers(rigs, capsys: pytest.CaptureFixture[str]) -> None:
    rig = rigs(burst=1000, remember=10_000)
    done = rig.answer()
    seen = rig.loop._answers[done.request_id].trajectory
    hidden = np.random.default_rng(0).normal(size=(8, 64)).astype(np.float32)

    def flood() -> list[float]:
        from dataclasses import replace

        from ruvllm_core.generate.sampler import Distribution

        drawn = tuple(
            Distribution(np.array([token, 1 + token % 200]), np.array([0.6, 0.4])) for token in seen.output_ids
        )
        for n in range(10_000):
            rig.loop.observe(replace(seen, request_id=f"r{n}", hidden=hidden, drawn_from=drawn))
        for n in range(0, 10_000, 250):
            rig.loop.feedback(f"r{n}", float(n % 500 == 0))
        times = []
        while True:
            began = time.perf_counter()
            more = rig.loop.tick(0.1)
            times.append(time.perf_counter() - began)
            if not more:
                return times

    times = rig.on(flood)
    p99 = float(np.quantile(times, 0.99))
    with capsys.disabled():
        sys.stdout.write(f"\ntick(0.1) p99 {1e3 * p99:.1f} ms of {len(times)}, longest {1e3 * max(times):.1f} ms\n")
    assert p99 < 0.2
    assert len(rig.loop._answers) <= 10_000 and not rig.loop._untraced and rig.loop._held == 0


def test_answers_that_nobody_can_rate_any_more_are_let_go(rigs) -> None:
    rig = rigs(remember=5)
    for n in range(12):
        rig.answer(seed=n)
    assert len(rig.loop._answers) == 5
    rig.idle()
    assert rig.loop._held == 0 and len(rig.loop._running) <= 10
    assert all(one.trajectory.hidden is None for one in rig.loop._answers.values())
