"""Entries of the audit log, and how each is chained to the one before it."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from ruvllm_core.errors import LearningError

_GENESIS = "0" * 64


@dataclass(frozen=True)
class Entry:
    """One line of the audit log.

    Attributes:
        entry: its number, from 1.
        time: seconds since 1970.
        actor: who did it: a loop's name, or a user's.
        action: a word, such as feedback, publish, reject, rollback, forget, import, merge, deep.
        before, after: versions; the same if nothing changed.
        predicted, measured: effects by name, such as ``nats``; a figure that is not finite is written as text.
        request: salted hash of the request it is about, or empty; never the request.
        note: anything else, but nothing a user wrote: entries outlive what they are about.
        prev, hash: of the chain.
    """

    entry: int
    time: float
    actor: str
    action: str
    before: str
    after: str
    predicted: Mapping[str, float | str]
    measured: Mapping[str, float | str]
    request: str
    note: str
    prev: str
    hash: str


@dataclass(frozen=True)
class Anchor:
    """The newest entry's number and hash, to be kept in another file; as text ``12:9f86…``."""

    entry: int
    hash: str

    def __str__(self) -> str:
        return f"{self.entry}:{self.hash}"

    @classmethod
    def parse(cls, text: str) -> Anchor:
        """Read what `str` gave. Raises `LearningError` for anything else."""
        if found := re.fullmatch(r"([1-9][0-9]*):([0-9a-f]{64})", text):
            return cls(int(found[1]), found[2])
        raise LearningError(f"{text!r} is no anchor of an audit log", hint="it looks like 12:9f86… with 64 digits")


def entry_after(
    head: Anchor | None,
    time: float,
    actor: str,
    action: str,
    before: str = "",
    after: str = "",
    predicted: Mapping[str, float] | None = None,
    measured: Mapping[str, float] | None = None,
    request: str = "",
    note: str = "",
) -> Entry:
    """The entry that follows `head`. Raises `LearningError` for what is neither text nor number."""
    try:
        entry = Entry(
            entry=head.entry + 1 if head else 1,
            time=float(time),
            actor=actor,
            action=action,
            before=before,
            after=after,
            predicted=_figures(predicted),
            measured=_figures(measured),
            request=request,
            note=note,
            prev=head.hash if head else _GENESIS,
            hash="",
        )
        return replace(entry, hash=_hash(vars(entry)))
    except (TypeError, ValueError) as error:
        raise LearningError(
            f"this cannot be audited: {error}", hint="versions and notes are text, figures are numbers"
        ) from error


def _figures(figures: Mapping[str, float] | None) -> dict[str, float | str]:
    return {
        name: float(value) if math.isfinite(value) else str(float(value)) for name, value in (figures or {}).items()
    }


def _canonical(values: Mapping[str, Any]) -> bytes:
    return json.dumps(values, sort_keys=True, separators=(",", ":"), allow_nan=False).encode("ascii")


def _hash(values: Mapping[str, Any]) -> str:
    return hashlib.sha256(_canonical({name: value for name, value in values.items() if name != "hash"})).hexdigest()


def line_of(entry: Entry) -> bytes:
    """An entry as it stands in the file, newline and all."""
    return _canonical(vars(entry)) + b"\n"


def parse_line(line: bytes) -> Entry | str:
    """The entry in a line, or what is wrong with it."""
    try:
        values = json.loads(line)
        entry = Entry(**values)
        if _canonical(values) != line:
            return "it is not written as entries are"
        return entry if _hash(values) == entry.hash else "its hash differs"
    except (ValueError, TypeError, AttributeError, RecursionError):
        return "it is no entry"


def follow(line: bytes, head: Anchor | None) -> Entry | str:
    """The entry in a line, which has to follow `head`, or be the first; or what is wrong with it."""
    entry = parse_line(line)
    if isinstance(entry, str):
        return entry
    if entry.prev != (head.hash if head else _GENESIS) or entry.entry != (head.entry + 1 if head else 1):
        return f"it is entry {entry.entry}, and does not follow the line before"
    return entry


def unfinished(tail: bytes) -> bool:
    """Whether this may be the beginning of an entry, and is no whole one with something after it."""
    text = tail.decode("ascii", "replace")
    start = '{"action":"'
    if not text.startswith(start[: len(text)]):
        return False
    try:
        json.JSONDecoder().raw_decode(text)
    except (ValueError, RecursionError):
        return True
    return False
