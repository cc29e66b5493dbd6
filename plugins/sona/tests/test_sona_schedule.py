"""Jobs a slice at a time: who goes first, budgets, jobs that wait, jobs that fail."""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import Future

from ruvllm_sona.schedule import Schedule


def job(name: str, slices: int, done: list[str], seconds: float = 0.0) -> Iterator[None]:
    for _ in range(slices):
        done.append(name)
        time.sleep(seconds)
        yield


def test_the_lowest_rank_goes_first_and_within_a_rank_who_came_first() -> None:
    schedule, done = Schedule(), []
    for name, rank in (("c", 2), ("a", 1), ("b", 1), ("d", 0)):
        schedule.add(name, job(name, 2, done), rank)
    assert not schedule.run(1.0)
    assert "".join(done) == "ddaabbcc"
    assert len(schedule) == 0 and not schedule.has("a")


def test_one_slice_is_done_whatever_the_budget() -> None:
    schedule, done = Schedule(), []
    schedule.add("a", job("a", 3, done))
    assert schedule.run(0.0) and done == ["a"]
    assert schedule.run(-1.0) and done == ["a", "a"]


def test_a_slice_that_would_not_fit_is_not_begun() -> None:
    schedule, done = Schedule(), []
    schedule.add("a", job("a", 100, done, 0.01))
    schedule.run(0.0)
    for _ in range(4):
        began, before = time.perf_counter(), len(done)
        schedule.run(0.035)
        assert 1 <= len(done) - before <= 3
        assert time.perf_counter() - began < 0.06


def test_a_job_that_waits_for_a_future_lets_others_go_on() -> None:
    schedule, done, future = Schedule(), [], Future()

    def waiting() -> Iterator[object]:
        while not future.done():
            done.append("waits")
            yield future
        done.append("has it")

    schedule.add("first", waiting(), 0)
    schedule.add("second", job("second", 2, done), 1)
    assert schedule.run(1.0), "one job is left"
    assert done == ["waits", "second", "second"]
    began = time.perf_counter()
    assert schedule.run(1.0), "nothing can be done, and the time of a busy engine is not spent on it"
    assert time.perf_counter() - began < 0.5
    future.set_result(None)
    assert not schedule.run(1.0)
    assert done[-1] == "has it"


def test_a_job_that_fails_ends_alone_and_its_owner_hears_of_it() -> None:
    schedule, done, heard = Schedule(), [], []

    def failing() -> Iterator[None]:
        yield
        raise ValueError("broken")

    schedule.add("bad", failing(), 0, heard.append)
    schedule.add("good", job("good", 2, done), 1)
    assert not schedule.run(1.0)
    assert done == ["good", "good"]
    assert [str(error) for error in heard] == ["broken"]


def test_a_dropped_job_is_closed() -> None:
    schedule, closed = Schedule(), []

    def careful(name: str) -> Iterator[None]:
        try:
            while True:
                yield
        finally:
            closed.append(name)

    for rank, name in enumerate("ab"):
        schedule.add(name, careful(name), -rank)
        schedule.run(0.0)
    schedule.drop("b")
    assert schedule.has("a") and not schedule.has("b")
    schedule.drop()
    assert closed == ["b", "a"]
    assert len(schedule) == 0


def test_times_are_kept_by_kind_and_not_by_user() -> None:
    schedule = Schedule()
    for user in range(50):
        schedule.add(f"learn {user}", job("", 1, []))
    schedule.run(1.0)
    assert len(schedule._lately) == 1
