"""The ledger: no window of time ever sees more than its limit, restarts and strange clocks included."""

from __future__ import annotations

import math
import os
import random
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ruvllm_core.errors import LearningError
from ruvllm_sona.ledger import Ledger, Limits


@pytest.fixture(autouse=True)
def _no_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hundreds of files are written here, and none has to outlive the machine."""
    monkeypatch.setattr(os, "fsync", lambda fd: None)


LIMITS = Limits(nats_per_hour=10.0, nats_per_day=40.0, feedback_per_minute=6.0, burst=3)
NOW = 1.7e9


@settings(max_examples=40, deadline=None)
@given(
    st.lists(
        st.tuples(st.sampled_from([0.0, 1.0, 59.0, 700.0, 3000.0, 20000.0]), st.floats(0.0, 4.0), st.booleans()),
        max_size=60,
    ),
    st.floats(0.0, 1e5),
)
def test_no_window_sees_more_than_its_limit(
    tmp_path_factory: pytest.TempPathFactory, steps: list[tuple[float, float, bool]], start: float
) -> None:
    path = tmp_path_factory.mktemp("ledger") / "ledger.bin"
    ledger, now = Ledger(path, LIMITS), NOW + start
    spent: list[tuple[float, float]] = []
    counted: list[float] = []
    for wait, nats, restart in steps:
        now += wait
        if restart:
            ledger.close()
            ledger = Ledger(path, LIMITS)
        if ledger.allow(nats, now) is None:
            spent.append((now, nats))
        else:  # there was no room, or not for the length of a bin
            hour = sum(n for t, n in spent if t > now - 3600 - 60)
            day = sum(n for t, n in spent if t > now - 86400 - 900)
            assert hour + nats > 10.0 - 1e-9 or day + nats > 40.0 - 1e-9
        if ledger.feedback(now) is None:
            counted.append(now)
    ledger.close()
    for time, _ in spent:
        assert sum(n for t, n in spent if time - 3600 < t <= time) <= 10.0 + 1e-9
        assert sum(n for t, n in spent if time - 86400 < t <= time) <= 40.0 + 1e-9
    for first in counted:
        for last in counted:
            if first <= last:
                allowed = 3 + (last - first) / 60 * 6
                assert sum(first <= t <= last for t in counted) <= allowed + 1e-6


def test_refusals_say_when_it_goes_on_and_are_right(tmp_path: Path) -> None:
    rng = random.Random(4)
    with Ledger(tmp_path / "l", LIMITS) as ledger:
        now, refused, hours, days = NOW + 17.3, 0, 0, 0
        for _ in range(400):
            now += rng.choice([0.0, 30.0, 400.0])
            nats = rng.uniform(0.5, 3.0)
            if refusal := ledger.allow(nats, now):
                refused += 1
                hours += "hour" in refusal.reason
                days += "day" in refusal.reason
                assert 0 < refusal.retry_s <= 86400 + 900
                assert ledger.allow(nats, now + refusal.retry_s - 1e-3), "not a bin earlier"
                now += refusal.retry_s + 1e-3
                later = ledger.allow(nats, now)
                assert later is None or ("day" in later.reason and "hour" in refusal.reason)
        assert hours > 5 and days > 5
        never = ledger.allow(11.0, now)
        assert never is not None and never.retry_s == math.inf and "11 nats" in str(never)
        now += 600
        assert [ledger.feedback(now) is None for _ in range(4)] == [True, True, True, False]
        refusal = ledger.feedback(now)
        assert refusal is not None and refusal.retry_s == pytest.approx(10.0) and "again in 10 s" in str(refusal)
        assert ledger.feedback(now + 9.9) is not None
        assert ledger.feedback(now + refusal.retry_s) is None


def test_nothing_is_spent_by_what_is_refused(tmp_path: Path) -> None:
    with Ledger(tmp_path / "l", LIMITS) as ledger:
        assert ledger.allow(9.0, NOW) is None
        for _ in range(5):
            assert ledger.allow(2.0, NOW) is not None
        assert ledger.allow(1.0, NOW) is None
        spent = ledger.spent(NOW)
        assert (spent.hour, spent.day, spent.feedback_left) == (10.0, 10.0, 3)
        later = ledger.spent(NOW + 3700)
        assert (later.hour, later.day) == (0.0, 10.0)
        assert ledger.spent(NOW + 3 * 86400).day == 0.0


def test_limits_may_change_between_runs_and_what_was_spent_stays(tmp_path: Path) -> None:
    path = tmp_path / "l"
    with Ledger(path, LIMITS) as ledger:
        ledger.allow(9.0, NOW)
        ledger.feedback(NOW)
    with Ledger(path, Limits(9.5, 40.0, 6.0, 1)) as ledger:
        assert ledger.spent(NOW) == type(ledger.spent(NOW))(9.0, 9.0, 1)
        assert ledger.allow(1.0, NOW) is not None
    with Ledger(path, Limits(math.inf, math.inf, math.inf, 1)) as ledger:
        for _ in range(100):
            assert ledger.allow(1e6, NOW) is None and ledger.feedback(NOW) is None


def test_a_clock_set_back_makes_nothing_free(tmp_path: Path) -> None:
    with Ledger(tmp_path / "l", LIMITS) as ledger:
        assert ledger.allow(10.0, NOW) is None
        for _ in range(3):
            ledger.feedback(NOW)
        for back in (1.0, 59.0, 4000.0, 1e6, NOW):
            assert ledger.allow(1.0, NOW - back) is not None
            assert ledger.feedback(NOW - back) is not None
        assert ledger.allow(1.0, 3500.0) is not None, "an hour has not passed since the clock was set to 0"
        assert ledger.allow(1.0, 3700.0) is None, "and it does go on"


def test_a_torn_or_damaged_file_gives_no_new_budget(tmp_path: Path) -> None:
    path = tmp_path / "l"
    with Ledger(path, LIMITS) as ledger:
        for n in range(1, 6):
            assert ledger.allow(1.0, NOW) is None
            whole = path.read_bytes()
            for at in range(0, len(whole), 7):  # wherever one write may be torn, the other slot holds
                path.write_bytes(whole[:at] + bytes([whole[at] ^ 255]) + whole[at + 1 :])
                with Ledger(path, LIMITS) as again:
                    assert again.spent(NOW).hour in (n - 1, n)
            path.write_bytes(whole)
    for content in (b"", b"hello", bytes(len(whole)), whole[: len(whole) // 3]):
        path.write_bytes(content)
        with pytest.raises(LearningError, match="damaged, or no ledger") as caught:
            Ledger(path, LIMITS)
        assert caught.value.hint


def test_senseless_amounts_limits_and_times_are_refused(tmp_path: Path) -> None:
    for values in (
        (0.0, 1.0, 1.0, 1),
        (1.0, -1.0, 1.0, 1),
        (1.0, 1.0, math.nan, 1),
        (1.0, 1.0, 1.0, 0),
        (1, 1, 1, 1.5),
    ):
        with pytest.raises(LearningError) as caught:
            Limits(*values)  # type: ignore[arg-type]
        assert caught.value.hint
    ledger = Ledger(tmp_path / "l", LIMITS)
    for nats in (-1.0, math.nan, math.inf):
        with pytest.raises(LearningError, match="cannot be spent"):
            ledger.allow(nats, NOW)
    for now in (-1.0, math.nan, math.inf):
        with pytest.raises(LearningError, match="is no time"):
            ledger.allow(1.0, now)
    assert ledger.spent(NOW).hour == 0.0
    ledger.close()
    ledger.close()
    with pytest.raises(LearningError, match="is closed"):
        ledger.feedback(NOW)
    with pytest.raises(LearningError, match="cannot write"):
        Ledger(tmp_path / "missing" / "l", LIMITS)
