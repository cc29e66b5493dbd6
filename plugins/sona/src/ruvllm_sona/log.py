"""The write-ahead log: whatever was acknowledged is in it, also after ``kill -9``; everything else can be made anew."""

from __future__ import annotations

import bisect
import itertools
import os
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, NoReturn

from ruvllm_core.errors import LearningError
from ruvllm_sona.files import append_whole, write_atomic
from ruvllm_sona.frames import Record, Span, decode, encode, frame, open_log, read_span, scan, start_payload


@dataclass(frozen=True)
class Damage:
    """Bytes of a log that were no record: the unfinished end of a killed process's last write, or worse.

    Attributes:
        torn: they were at the end, so nothing that was acknowledged to a living process is lost.
        aside: a file with a copy of them; `Log.rewrite` deletes it, for it may hold what is to be forgotten.
    """

    offset: int
    size: int
    torn: bool
    aside: Path


class Log:
    """The log of one user, open for writing; its folder's `FolderLock` has to be held.

    Opening drops what is no whole record, copies it aside and reports it in `damage`. Every method may be called from
    any thread. Raises `LearningError` if the file is no log or cannot be read.

    Args:
        flush_s: how long after a write a thread of its own begins to put it on the disk.

    Attributes:
        damage: what was found broken and dropped; empty after an orderly end.
        slowest_sync_s: longest time between a write and the moment it was on the disk.
    """

    def __init__(self, path: Path, flush_s: float = 0.025) -> None:
        self.path = path
        self.slowest_sync_s = 0.0
        self._flush_s = flush_s
        self._size = 0
        self._lock = threading.Lock()
        self._wake = threading.Condition(self._lock)
        self._sync_lock = threading.Lock()
        self._flusher: threading.Thread | None = None
        self._unsynced: float | None = None
        self._closed = False
        self._failure: OSError | None = None
        if not path.exists():
            write_atomic(path, frame(0, start_payload()))
        with open_log(path) as file:
            self._spans, gaps = scan(file, path)
            self.damage = tuple(self._set_aside(file, gaps))
        if len(gaps) == 1 and self.damage[0].torn:
            os.truncate(path, gaps[0][0])
        elif gaps:
            self._spans = self._replace(self._spans)
        self._reopen()

    @property
    def last(self) -> int:
        """The last sequence given out, also if its record was dropped since; 0 if there was none."""
        return max(self._spans[0].sequence, self._spans[-1].sequence)

    def __len__(self) -> int:
        return len(self._spans) - 1

    def append(self, record: Record) -> int:
        """Add a record; its sequence. It survives the end of this process once this returns, and that of the machine
        once it is synced. Raises `LearningError` if the record makes no sense or the disk does not take it."""
        payload = encode(record)
        with self._lock:
            self._check()
            sequence = self.last + 1
            data = frame(sequence, payload)
            size = append_whole(self._fd, data, self._size, self.path)
            self._spans.append(Span(sequence, self._size, size))
            self._size = size
            if self._unsynced is None:
                self._unsynced = time.monotonic()
                if self._flusher is None:
                    self._flusher = threading.Thread(target=self._flush, name="ruvllm-sona-log", daemon=True)
                    self._flusher.start()
                self._wake.notify()
        return sequence

    def sync(self) -> None:
        """Put everything appended so far on the disk. Raises `LearningError`, now and ever after, if that fails."""
        with self._lock:
            self._check()
        self._put_down()

    def _put_down(self) -> None:
        with self._sync_lock:
            with self._lock:
                if self._unsynced is None:
                    return
                since, self._unsynced = self._unsynced, None
                fd = os.dup(self._fd)  # appends go on meanwhile, and a rewrite may close the file
            try:
                os.fsync(fd)
                self.slowest_sync_s = max(self.slowest_sync_s, time.monotonic() - since)
            except OSError as error:  # the system may have thrown the bytes away: a second try would lie
                self._failure = error
                self._fail()
            finally:
                os.close(fd)

    def records(self, after: int = 0) -> Iterator[Record]:
        """Records whose sequence is above `after`, oldest first, as the log is when the first one is asked for."""
        with self._lock:
            self._check()
            spans = self._spans[bisect.bisect_right(self._spans, after, lo=1, key=lambda span: span.sequence) :]
            file = open_log(self.path)
        with file:
            for span in spans:
                yield decode(file, span, self.path)

    def rewrite(self, drop: Callable[[Record], bool]) -> int:
        """Drop every record that `drop` says, in one step: the file is the old one or the new one; how many went.

        Numbers stay as they are. Copies of damaged bytes are deleted, too. Appending waits meanwhile, and `drop` must
        not use the log. Raises `LearningError` if the file system refuses; then nothing has changed.
        """
        with self._sync_lock, self._lock:
            self._check()
            with open_log(self.path) as file:
                kept = [span for span in self._spans[1:] if not drop(decode(file, span, self.path))]
            dropped = len(self) - len(kept)
            if dropped:
                self._spans = self._replace([self._spans[0]._replace(sequence=self.last), *kept])
                os.close(self._fd)
                self._reopen()
                self._unsynced = None
            for aside in self.path.parent.glob(f"{self.path.name}.damaged-*"):
                aside.unlink()
            return dropped

    def close(self) -> None:
        """Sync, end the thread, close the file. Closing twice is fine."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            self._wake.notify()
        if self._flusher is not None:
            self._flusher.join()
        try:
            self._put_down()
        finally:
            os.close(self._fd)

    def __enter__(self) -> Log:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def _check(self) -> None:
        if self._closed:
            raise LearningError(f"{self.path} is closed", hint="open it again: this came after the end")
        if self._failure is not None:
            self._fail()

    def _fail(self) -> NoReturn:
        raise LearningError(
            f"{self.path} cannot be put on the disk: {self._failure}",
            hint="check the disk, then start the engine anew; the last feedback may be lost if the machine stops",
        ) from self._failure

    def _flush(self) -> None:
        while True:
            with self._wake:
                self._wake.wait_for(lambda: self._unsynced is not None or self._closed)
                self._wake.wait_for(lambda: self._closed, self._flush_s)
                if self._closed:
                    return
            try:
                self.sync()
            except LearningError:  # the next append says so
                return

    def _reopen(self) -> None:
        self._fd = os.open(self.path, os.O_WRONLY | os.O_APPEND)
        self._size = os.fstat(self._fd).st_size

    def _replace(self, spans: list[Span]) -> list[Span]:
        """Make the file hold these frames alone, the first of which is the start; where they lie now."""
        start = frame(spans[0].sequence, start_payload())
        moved = [Span(spans[0].sequence, 0, len(start))]
        for span in spans[1:]:
            moved.append(Span(span.sequence, moved[-1].stop, moved[-1].stop + span.stop - span.start))

        def copy(new: BinaryIO) -> None:
            new.write(start)
            with open_log(self.path) as old:
                for span in spans[1:]:
                    new.write(read_span(old, span.start, span.stop))

        write_atomic(self.path, copy)
        return moved

    def _set_aside(self, file: BinaryIO, gaps: list[tuple[int, int]]) -> Iterator[Damage]:
        size = os.fstat(file.fileno()).st_size
        for start, stop in gaps:
            names = (self.path.with_name(f"{self.path.name}.damaged-{number}") for number in itertools.count(1))
            aside = next(name for name in names if not name.exists())
            write_atomic(aside, read_span(file, start, stop))
            yield Damage(start, stop - start, stop == size, aside)


def read_log(path: Path, after: int = 0) -> Iterator[Record]:
    """Whole records above `after` of a log that another process may be writing; changes nothing.

    Raises `LearningError` if the file is no log or cannot be read.
    """
    with open_log(path) as file:
        spans, _ = scan(file, path)
        for span in spans[1:]:
            if span.sequence > after:
                yield decode(file, span, path)
