"""The audit log: what changed, by whom, with what effect; each entry names the hash of the one before it.

One line is one entry: JSON with sorted keys and no spaces, whose ``hash`` is the SHA-256 of the same JSON without it,
and whose ``prev`` is the ``hash`` of the line before. Every byte of a line is checked, so a line changed, removed,
added or moved shows. Two things do not show by the file alone:

- Lines missing at the end. That is what an `Anchor` is for: a caller keeps the newest entry's number and hash in
  another file, and `verify_audit` then wants that very entry in the chain. What came after it can still be cut off.
- A chain computed anew from some line on. There is no secret in it, so whoever may write both this file and the one
  with the anchor can invent a history. An anchor kept on another machine shows that, too.

An unfinished last line is no tampering: a process killed inside its one write leaves the beginning of an entry without
the newline that every finished one has. Nobody was told of such an entry and no anchor names it, so it is dropped, and
a ``repair`` entry says how long it was. A whole entry that lacks nothing but the newline gets it. Anything after a
whole entry is tampering. Who cuts a finished last line into an unfinished one has removed it: the anchor shows that.
"""

from __future__ import annotations

import hashlib
import os
import re
import secrets
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from ruvllm_core.errors import LearningError
from ruvllm_sona.chain import Anchor, Entry, entry_after, follow, line_of, parse_line, unfinished
from ruvllm_sona.files import append_whole, read_bytes, refused, write_atomic

_SALT = re.compile("salt ([0-9a-f]{32})")


@dataclass(frozen=True)
class AuditReport:
    """What `verify_audit` found.

    Attributes:
        head: the last entry before the first problem; None if there is none.
        problem: what is wrong, and empty if nothing is.
        line: of the problem, from 1; 0 if there is none.
        torn: bytes of an unfinished last line, which are no problem.
    """

    head: Anchor | None
    problem: str = ""
    line: int = 0
    torn: int = 0

    @property
    def ok(self) -> bool:
        return not self.problem


class Audit:
    """The audit log of one user, open for writing; its folder's `FolderLock` has to be held.

    Opening repairs an unfinished last line and says so in an entry of its own; it looks at the first and the last entry
    alone (`verify` at all). Raises `LearningError` if the file is no audit log or its last entry is not whole.

    Args:
        now: the clock, seconds since 1970.

    Attributes:
        repaired: bytes of an unfinished entry that opening dropped.
    """

    def __init__(self, path: Path, now: Callable[[], float] = time.time) -> None:
        self.path = path
        self.repaired = 0
        self._now = now
        self._lock = threading.Lock()
        self._unsynced = False
        if not path.exists():
            first = entry_after(None, now(), "engine", "start", note=f"salt {secrets.token_hex(16)}")
            write_atomic(path, line_of(first))
        first_line, last_line, tail = _ends(path)
        first_entry = follow(first_line, None)
        salt = None if isinstance(first_entry, str) else _SALT.fullmatch(first_entry.note)
        if salt is None:
            raise _broken(path, "it does not begin as an audit log does")
        self._salt = bytes.fromhex(salt[1])
        if whole := tail and not isinstance(parse_line(tail), str):
            last_line = tail
        elif tail and not unfinished(tail):
            raise _broken(path, "something follows its last entry")
        last = parse_line(last_line)
        if isinstance(last, str):
            raise _broken(path, f"its last entry: {last}")
        self._head = Anchor(last.entry, last.hash)
        try:
            self._fd = os.open(path, os.O_WRONLY | os.O_APPEND)
            self._size = os.fstat(self._fd).st_size
            if tail and not whole:
                self.repaired = len(tail)
                self._size -= self.repaired
                os.ftruncate(self._fd, self._size)
        except OSError as error:
            raise refused("open", path, error) from error
        if whole:
            self._size = append_whole(self._fd, b"\n", self._size, path)
        if tail:
            what = (
                "a newline was missing" if whole else f"dropped {len(tail)} bytes of an entry that was never finished"
            )
            self._append(entry_after(self._head, now(), "engine", "repair", note=what))

    @property
    def head(self) -> Anchor:
        """The newest entry, which may not be on the disk yet."""
        return self._head

    def append(
        self,
        action: str,
        *,
        actor: str,
        before: str = "",
        after: str = "",
        predicted: Mapping[str, float] | None = None,
        measured: Mapping[str, float] | None = None,
        request_id: str = "",
        note: str = "",
    ) -> Entry:
        """Add an entry (see `Entry`), with one write, so that it survives the end of this process.

        Raises `LearningError` for an action that is no word, or if the disk does not take it.
        """
        if not re.fullmatch(r"[a-z][a-z_-]*", action) or action in ("start", "repair"):
            raise LearningError(
                f"{action!r} is no action to audit", hint="a word in small letters; start and repair are the log's own"
            )
        request = self.request_hash(request_id) if request_id else ""
        with self._lock:
            if self._fd < 0:
                raise LearningError(f"{self.path} is closed", hint="open it again: this came after the end")
            entry = entry_after(
                self._head, self._now(), actor, action, before, after, predicted or {}, measured or {}, request, note
            )
            self._append(entry)
        return entry

    def _append(self, entry: Entry) -> None:
        self._size = append_whole(self._fd, line_of(entry), self._size, self.path)
        self._head = Anchor(entry.entry, entry.hash)
        self._unsynced = True

    def request_hash(self, request_id: str) -> str:
        """What stands for a request in this log: who knows its id can find its entries, and in no other user's log."""
        return hashlib.sha256(self._salt + request_id.encode("utf-8", "surrogatepass")).hexdigest()

    def anchor(self) -> Anchor:
        """The newest entry, now on the disk, to be kept elsewhere. Raises `LearningError` if the disk refuses."""
        with self._lock:
            if self._unsynced:
                try:
                    os.fsync(self._fd)
                except OSError as error:
                    raise refused("sync", self.path, error) from error
                self._unsynced = False
            return self._head

    def verify(self, anchor: Anchor | None = None) -> AuditReport:
        """See `verify_audit`."""
        return verify_audit(self.path, anchor)

    def close(self) -> None:
        """Put everything on the disk and close the file. Closing twice is fine."""
        if self._fd >= 0:
            try:
                self.anchor()
            finally:
                os.close(self._fd)
                self._fd = -1

    def __enter__(self) -> Audit:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()


def verify_audit(path: Path, anchor: Anchor | None = None) -> AuditReport:
    """Check the whole chain up to the first problem, and that `anchor` is part of it; changes nothing.

    Raises `LearningError` if the file cannot be read.
    """
    *lines, tail = read_bytes(path).split(b"\n")
    head: Anchor | None = None
    torn = 0
    for line in [*lines, tail] if tail else lines:
        number = head.entry + 1 if head else 1
        found = follow(line, head)
        if isinstance(found, Entry):
            head = Anchor(found.entry, found.hash)
            if anchor and anchor.entry == number and anchor != head:
                return AuditReport(head, "this is not the entry that was anchored", number)
        elif number > len(lines) and unfinished(line):
            torn = len(line)
        else:
            return AuditReport(head, found, number)
    if head is None:
        return AuditReport(None, "there is no entry", 1)
    if anchor and anchor.entry > head.entry:
        return AuditReport(head, f"entries up to {anchor.entry} are missing, which was anchored", head.entry + 1)
    return AuditReport(head, torn=torn)


def read_audit(path: Path) -> Iterator[Entry]:
    """Entries, oldest first, up to the first that is not whole; `verify_audit` says whether there is such a one.

    Raises `LearningError` if the file cannot be read.
    """
    head = None
    for line in read_bytes(path).split(b"\n"):
        found = follow(line, head)
        if isinstance(found, str):
            return
        head = Anchor(found.entry, found.hash)
        yield found


def _ends(path: Path) -> tuple[bytes, bytes, bytes]:
    """The first line, the last one that has a newline, and what follows it."""
    try:
        with path.open("rb") as file:
            first = file.readline()
            size = file.seek(0, os.SEEK_END)
            length = 2**16
            while True:
                file.seek(max(size - length, 0))
                *lines, tail = file.read().split(b"\n")
                if len(lines) > 1 or (lines and length >= size):
                    return first.removesuffix(b"\n"), lines[-1], tail
                if length >= size:
                    raise _broken(path, "it has no entry")
                length *= 4
    except OSError as error:
        raise refused("read", path, error) from error


def _broken(path: Path, reason: str) -> LearningError:
    return LearningError(
        f"{path} cannot be continued: {reason}",
        hint="somebody has changed it, or the disk is damaged: keep it, move it away, and a new one begins",
    )
