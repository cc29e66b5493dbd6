"""The audit log: every change to it shows, and a killed writer is not taken for a forger."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ruvllm_core.errors import LearningError
from ruvllm_sona.audit import Audit, read_audit, verify_audit
from ruvllm_sona.chain import Anchor


@pytest.fixture(autouse=True)
def _no_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hundreds of files are written here, and none has to outlive the machine."""
    monkeypatch.setattr(os, "fsync", lambda fd: None)


def write(path: Path, count: int = 4) -> Anchor:
    with Audit(path, now=lambda: 1e9) as audit:
        for n in range(count):
            audit.append(
                "publish",
                actor="background",
                before=str(n),
                after=str(n + 1),
                predicted={"nats": 0.1 * n},
                measured={"nll": float("nan"), "kl": 1e-5},
                request_id=f"req-{n}",
                note="gate",
            )
        return audit.anchor()


def test_the_chain_is_what_sha256_and_json_say(tmp_path: Path) -> None:
    path = tmp_path / "audit.jsonl"
    anchor = write(path)
    prev = "0" * 64
    lines = path.read_text().splitlines()
    for number, line in enumerate(lines, 1):
        values = json.loads(line)
        digest = values.pop("hash")
        text = json.dumps(values, sort_keys=True, separators=(",", ":"))
        assert hashlib.sha256(text.encode()).hexdigest() == digest
        assert (values["entry"], values["prev"]) == (number, prev)
        prev = digest
    assert anchor == Anchor(5, prev) == Anchor.parse(str(anchor))
    report = verify_audit(path, anchor)
    assert report.ok and report.head == anchor and report.torn == 0
    salt = bytes.fromhex(json.loads(lines[0])["note"].removeprefix("salt "))
    entries = list(read_audit(path))
    assert entries[2].request == hashlib.sha256(salt + b"req-1").hexdigest()
    assert (entries[2].before, entries[2].after, entries[2].predicted) == ("1", "2", {"nats": 0.1})
    assert entries[2].measured == {"nll": "nan", "kl": 1e-5} and entries[2].time == 1e9
    assert "req-" not in path.read_text()
    write(tmp_path / "other.jsonl")
    assert list(read_audit(tmp_path / "other.jsonl"))[2].request != entries[2].request


def test_any_flipped_byte_shows(tmp_path: Path) -> None:
    path = tmp_path / "audit.jsonl"
    write(path, 2)
    whole = path.read_bytes()
    for at in range(len(whole)):
        for bit in range(8) if whole[at] in b'\n"}' else (at % 8, 5):
            path.write_bytes(whole[:at] + bytes([whole[at] ^ 1 << bit]) + whole[at + 1 :])
            report = verify_audit(path)
            assert report.problem and report.line == whole[:at].count(b"\n") + 1 and report.torn == 0, (at, bit)


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_lines_removed_moved_doubled_or_invented_show(tmp_path_factory: pytest.TempPathFactory, data: Any) -> None:
    path = tmp_path_factory.mktemp("audit") / "audit.jsonl"
    anchor = write(path)
    lines = path.read_bytes().splitlines(keepends=True)
    choice = st.lists(st.sampled_from(lines), min_size=0, max_size=6).filter(lambda found: found != lines)
    found = data.draw(choice)
    path.write_bytes(b"".join(found))
    report = verify_audit(path, anchor)
    assert not report.ok
    honest = next((n for n, line in enumerate(found) if line != lines[n : n + 1][0]), len(found)) if found else 0
    assert report.line == min(honest, 5) + 1
    if found != lines[: len(found)] or not found:
        assert not verify_audit(path).ok
    else:  # lines missing at the end: only the anchor knows
        assert verify_audit(path).ok and "missing" in report.problem


def test_a_chain_made_anew_shows_by_the_anchor_alone(tmp_path: Path) -> None:
    path = tmp_path / "audit.jsonl"
    anchor = write(path)
    path.unlink()
    write(path)
    assert verify_audit(path).ok
    report = verify_audit(path, anchor)
    assert report.line == 5 and "not the entry that was anchored" in report.problem


def test_cut_anywhere_it_is_repaired_and_says_so(tmp_path: Path) -> None:
    path = tmp_path / "audit.jsonl"
    anchor = write(path, 2)
    whole = path.read_bytes()
    first, last = whole.index(b"\n") + 1, whole[:-1].rindex(b"\n") + 1
    for size in range(len(whole)):
        path.write_bytes(whole[:size])
        if size < first:  # the first line is written in one step with its name: no kill leaves this
            with pytest.raises(LearningError, match="cannot be continued") as caught:
                Audit(path)
            assert caught.value.hint and path.read_bytes() == whole[:size]
            continue
        tail = size - whole[:size].rindex(b"\n") - 1
        lacks_newline = whole[size : size + 1] == b"\n"
        before = verify_audit(path)
        assert before.ok and before.torn == (0 if lacks_newline else tail)
        with Audit(path) as audit:
            assert audit.repaired == before.torn
            audit.append("feedback", actor="user")
            assert audit.verify().ok
            # Who cuts off what was anchored cannot pass it off as the work of a kill.
            assert audit.verify(anchor).ok == (size >= len(whole) - 1)
        entries = list(read_audit(path))
        kept = 1 + (size >= last - 1) + (size >= len(whole) - 1)
        if tail:
            note = "a newline was missing" if lacks_newline else f"dropped {tail} bytes"
            assert entries[kept].action == "repair" and note in entries[kept].note
        assert [entry.action for entry in entries[kept:]] == ["repair"] * bool(tail) + ["feedback"]


def test_a_damaged_end_is_not_continued(tmp_path: Path) -> None:
    path = tmp_path / "audit.jsonl"
    write(path)
    whole = path.read_bytes()
    for broken in (whole[:-1] + b"X", whole[:-3] + b"1}\n", whole + b"hello", whole + b"\n", whole + whole[:-1] + b" "):
        path.write_bytes(broken)
        with pytest.raises(LearningError, match="cannot be continued"):
            Audit(path)
        assert path.read_bytes() == broken
    path.write_bytes(b'{"hello": 1}\n')
    with pytest.raises(LearningError, match="does not begin as an audit log"):
        Audit(path)
    path.write_bytes(b"[" * 100_000 + b"\n")
    assert verify_audit(path).line == 1


def test_it_goes_on_where_it_was_also_after_long_lines(tmp_path: Path) -> None:
    path = tmp_path / "audit.jsonl"
    for n in range(3):
        with Audit(path) as audit:
            entry = audit.append("import", actor="user", note="x" * 100_000)
            assert entry.entry == n + 2 == audit.head.entry
            request = audit.request_hash("req-1")
    assert verify_audit(path).ok
    with Audit(path) as audit:
        assert audit.request_hash("req-1") == request, "the salt stays"


def test_what_cannot_be_audited_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "audit.jsonl"
    audit = Audit(path)
    size = path.stat().st_size
    for action in ("", "Publish", "two words", "start", "repair"):
        with pytest.raises(LearningError, match="no action"):
            audit.append(action, actor="x")
    with pytest.raises(LearningError, match="cannot be audited") as caught:
        audit.append("deep", actor=path)  # type: ignore[arg-type]
    assert caught.value.hint
    with pytest.raises(LearningError, match="cannot be audited"):
        audit.append("deep", actor="x", measured={"nats": "many"})  # type: ignore[dict-item]
    assert path.stat().st_size == size
    audit.close()
    audit.close()
    with pytest.raises(LearningError, match="is closed"):
        audit.append("deep", actor="x")
    for text in ("", "0:" + "0" * 64, "1:xyz", "1"):
        with pytest.raises(LearningError, match="no anchor"):
            Anchor.parse(text)
    with pytest.raises(LearningError, match="cannot read"):
        verify_audit(tmp_path / "missing")
