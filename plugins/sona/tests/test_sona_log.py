"""The write-ahead log: what went in comes out, whatever is done to the file in between."""

from __future__ import annotations

import errno
import os
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ruvllm_core.errors import LearningError
from ruvllm_sona.frames import Record, feedback
from ruvllm_sona.log import Log, read_log
from ruvllm_sona.records import Example


@pytest.fixture(autouse=True)
def _no_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hundreds of files are written here, and none has to outlive the machine."""
    monkeypatch.setattr(os, "fsync", lambda fd: None)


IDS = st.lists(st.integers(0, 2**24 - 1), max_size=30).map(tuple)
FLOATS = {"min_value": 0.0, "allow_nan": False, "allow_infinity": False}
EXAMPLES = st.builds(
    Example,
    request_id=st.text(max_size=20),
    prompt_ids=IDS,
    output_ids=IDS,
    quality=st.floats(0.0, 1.0),
    temperature=st.floats(**FLOATS),
    adapter_version=st.text(max_size=20),
    time=st.floats(**FLOATS),
)


@st.composite
def traces(draw: st.DrawFn) -> tuple[Any, Any] | None:
    if draw(st.booleans()):
        return None
    rank, width = draw(st.integers(1, 2)), draw(st.integers(1, 9))
    random = np.random.default_rng(draw(st.integers(0, 99)))
    return random.normal(size=(rank, width)).astype("f"), random.normal(size=(width, rank)).astype("f")


RECORDS = st.one_of(
    st.builds(feedback, EXAMPLES, traces()),
    st.builds(
        Record,
        st.sampled_from(["published", "forget", "rollback"]),
        st.floats(**FLOATS),
        version=st.integers(0, 10**9),
        covers=st.integers(0, 10**9),
        request_id=st.text(max_size=20),
    ),
)


def plain(record: Record, sequence: int) -> tuple[Any, ...]:
    """A record in a form that can be compared, as if it had this sequence."""
    trace = None if record.trace is None else tuple((x.dtype, x.shape, x.tobytes()) for x in record.trace)
    example = record.example and {**vars(record.example), "sequence": sequence}
    return (record.kind, record.time, example, trace, record.version, record.covers, record.request_id, sequence)


def some(count: int, words: int = 3) -> list[Record]:
    """Records of all kinds."""
    kinds: list[Any] = ["published", "forget", "rollback"]
    found = []
    for n in range(1, count + 1):
        if n % 4:
            example = Example(f"req-{n}", tuple(range(n, n + words)), (n,), 0.5, time=float(n))
            found.append(feedback(example, (np.full((1, 2), n, "f"), np.full((2, 1), n, "f"))))
        else:
            found.append(Record(kinds[n // 4 % 3], float(n), version=n, covers=n - 1, request_id="r"))
    return found


def write(path: Path, records: list[Record]) -> list[int]:
    """Append all; where each one ends, the start of the log first."""
    with Log(path) as log:
        ends = [path.stat().st_size]
        for record in records:
            log.append(record)
            ends.append(path.stat().st_size)
    return ends


@settings(max_examples=60, deadline=None)
@given(st.lists(RECORDS, max_size=6))
def test_what_is_appended_comes_back(tmp_path_factory: pytest.TempPathFactory, records: list[Record]) -> None:
    path = tmp_path_factory.mktemp("log") / "log.bin"
    with Log(path) as log:
        assert [log.append(record) for record in records] == list(range(1, len(records) + 1))
        live = [plain(record, record.sequence) for record in log.records()]
    expected = [plain(record, n) for n, record in enumerate(records, 1)]
    with Log(path) as log:
        assert log.damage == () and log.last == len(log) == len(records)
        again = [plain(record, record.sequence) for record in log.records()]
        late = [record.sequence for record in log.records(after=2)]
    assert live == again == expected == [plain(record, record.sequence) for record in read_log(path)]
    assert late == list(range(3, len(records) + 1)) == [record.sequence for record in read_log(path, after=2)]


def test_cut_anywhere_it_keeps_every_whole_record(tmp_path: Path) -> None:
    path = tmp_path / "log.bin"
    ends = write(path, some(3))
    whole = path.read_bytes()
    for size in range(len(whole)):
        path.write_bytes(whole[:size])
        if size < ends[0]:
            with pytest.raises(LearningError, match="no log of feedback") as caught:
                Log(path)
            assert caught.value.hint and path.read_bytes() == whole[:size]
            continue
        kept = sum(end <= size for end in ends[1:])
        assert [record.sequence for record in read_log(path)] == list(range(1, kept + 1))
        assert path.read_bytes() == whole[:size], "reading repairs nothing"
        with Log(path) as log:
            assert len(log) == kept
            if size in ends:
                assert log.damage == ()
            else:
                (damage,) = log.damage
                assert damage.torn and (damage.offset, damage.size) == (ends[kept], size - ends[kept])
                assert damage.aside.read_bytes() == whole[ends[kept] : size]
                damage.aside.unlink()
            assert log.append(some(1)[0]) == kept + 1
        with Log(path) as log:
            assert log.damage == () and [record.sequence for record in log.records()] == list(range(1, kept + 2))


def test_a_flipped_byte_costs_the_record_it_is_in_and_no_other(tmp_path: Path) -> None:
    path = tmp_path / "log.bin"
    records = some(3)
    ends = write(path, records)
    whole = path.read_bytes()
    for at in range(len(whole)):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1 << at % 8]) + whole[at + 1 :])
        hit = sum(end <= at for end in ends)  # 0 is the start of the file, which is no record
        with Log(path) as log:
            expected = [plain(record, n) for n, record in enumerate(records, 1) if n != hit]
            assert [plain(record, record.sequence) for record in log.records()] == expected
            (damage,) = log.damage
            start = ends[hit - 1] if hit else 0
            assert damage.offset == start and damage.offset + damage.size == ends[hit]
            assert damage.torn == (hit == 3)
            assert log.append(records[0]) == (4 if hit != 3 else 3)
            damage.aside.unlink()
        with Log(path) as log:
            assert log.damage == ()


def test_what_users_say_is_never_taken_for_a_record(tmp_path: Path) -> None:
    inner, path = tmp_path / "inner.bin", tmp_path / "log.bin"
    ends = write(inner, some(1))
    said = np.frombuffer(inner.read_bytes()[ends[0] :].ljust(4096, b"\0"), "<i4")
    with Log(path) as log, pytest.raises(LearningError, match="token"):
        log.append(feedback(Example("r", tuple(said.tolist()), (), 0.5)))


def test_rewrite_drops_for_good_and_gives_no_number_twice(tmp_path: Path) -> None:
    path = tmp_path / "log.bin"
    records = some(6)
    write(path, records)
    secret = b"req-6"
    with path.open("ab") as file:
        file.write(path.read_bytes()[-80:])  # a torn end that holds a copy of what is to be forgotten
    with Log(path) as log:
        assert log.damage[0].torn
        running = log.records()
        first = next(running)
        assert log.rewrite(lambda record: record.example is not None and record.example.request_id == "req-6") == 1
        assert [first.sequence, *(record.sequence for record in running)] == [1, 2, 3, 4, 5, 6], "an old reader goes on"
        assert [record.sequence for record in log.records()] == [1, 2, 3, 4, 5]
        assert log.last == 6 and len(log) == 5
    for file_path in tmp_path.iterdir():
        assert secret not in file_path.read_bytes()
    assert [file_path.name for file_path in tmp_path.iterdir()] == ["log.bin"]
    with Log(path) as log:
        assert log.append(records[0]) == 7
        assert log.rewrite(lambda record: True) == 6
        assert log.rewrite(lambda record: True) == 0
    with Log(path) as log:
        assert log.last == 7 and len(log) == 0
        assert log.append(records[0]) == 8
        with pytest.raises(ZeroDivisionError):
            log.rewrite(lambda record: 1 / 0 > 0)
        assert [plain(record, record.sequence) for record in log.records()] == [plain(records[0], 8)]


def test_records_reach_the_disk_by_themselves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced = threading.Event()
    with Log(tmp_path / "log.bin", flush_s=0.01) as log:
        inode = log.path.stat().st_ino

        def watch(fd: int) -> None:
            if os.fstat(fd).st_ino == inode:
                synced.set()

        monkeypatch.setattr(os, "fsync", watch)
        for record in some(3):  # the thread comes back for more
            synced.clear()
            log.append(record)
            assert synced.wait(10)
        log.sync()
        assert 0.01 <= log.slowest_sync_s < 10
    assert not any(thread.name == "ruvllm-sona-log" for thread in threading.enumerate())


def test_a_disk_that_fails_is_not_forgiven(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = Log(tmp_path / "log.bin", flush_s=60)
    log.append(some(1)[0])

    def broken(fd: int) -> None:
        raise OSError(errno.EIO, "the disk is broken")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", broken)
        with pytest.raises(LearningError, match="the disk is broken"):
            log.sync()
    for again in (log.sync, lambda: log.append(some(1)[0])):
        with pytest.raises(LearningError, match="the disk is broken") as caught:
            again()
        assert "check the disk" in str(caught.value)
    log.close()


def test_threads_may_append_at_once(tmp_path: Path) -> None:
    path = tmp_path / "log.bin"
    found: list[list[int]] = [[], [], []]
    with Log(path, flush_s=0.0) as log:
        threads = [
            threading.Thread(target=lambda mine=mine: mine.extend(log.append(r) for r in some(60, 500)))
            for mine in found
        ]
        for thread in threads:
            thread.start()
        time.sleep(0.02)
        log.rewrite(lambda record: record.kind != "feedback")
        for thread in threads:
            thread.join()
        assert sorted(n for mine in found for n in mine) == list(range(1, 181))
    with Log(path) as log:
        assert log.damage == ()
        assert sum(record.kind == "feedback" for record in log.records()) == 135


@pytest.mark.parametrize(
    ("record", "problem"),
    [
        (Record("party", 1.0), "kind 'party'"),  # type: ignore[arg-type]
        (Record("feedback", 1.0), "kind 'feedback'"),
        (Record("forget", 1.0, example=Example("r", (1,), (2,), 0.5)), "kind 'forget'"),
        (Record("feedback", 1.0, example=Example("r", (1,), (2,), 0.5, time=2.0)), "time 1.0"),
        (Record("published", 1.0, version=-1), "version -1"),
        (Record("published", float("nan")), "time nan"),
        (feedback(Example("r", (1,), (2,), 1.5)), "quality 1.5"),
        (feedback(Example("r", (1,), (2,), float("nan"))), "quality nan"),
        (feedback(Example("r", (1,), (2,), 0.5, temperature=float("inf"))), "temperature inf"),
        (feedback(Example("r", (-1,), (2,), 0.5)), "prompt_ids: tokens -1 to -1"),
        (feedback(Example("r", (1,), (2**24,), 0.5)), "output_ids"),
        (feedback(Example("r", (1.5,), (2,), 0.5)), "prompt_ids"),  # type: ignore[arg-type]
        (feedback(Example("\ud800", (1,), (2,), 0.5)), "cannot be stored"),
        (feedback(Example("r", (1,), (2,), 0.5), (np.zeros((1, 4), "f"), np.zeros((4, 2), "f"))), "a trace"),
        (feedback(Example("r", (1,), (2,), 0.5), (np.zeros((1, 4)), np.zeros((4, 1)))), "a trace of float64"),
        (feedback(Example("r", (1,), (2,), 0.5), (np.full((1, 4), np.nan, "f"), np.zeros((4, 1), "f"))), "a trace"),
    ],
)
def test_senseless_records_are_refused(tmp_path: Path, record: Record, problem: str) -> None:
    with Log(tmp_path / "log.bin") as log:
        size = log.path.stat().st_size
        with pytest.raises(LearningError, match=problem) as caught:
            log.append(record)
        assert caught.value.hint and log.last == 0 and log.path.stat().st_size == size


def test_other_files_and_closed_logs_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "log.bin"
    for content in (b"", b"hello", b"\0" * 5000, b"\xff\xfeRV" * 1000):
        path.write_bytes(content)
        with pytest.raises(LearningError, match="no log of feedback"):
            Log(path)
        assert path.read_bytes() == content
    with pytest.raises(LearningError, match="does not exist"):
        list(read_log(tmp_path / "missing"))
    log = Log(tmp_path / "new.bin")
    log.close()
    log.close()
    for use in (log.sync, lambda: log.append(some(1)[0]), lambda: list(log.records()), lambda: log.rewrite(bool)):
        with pytest.raises(LearningError, match="is closed"):
            use()
