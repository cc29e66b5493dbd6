"""The frames of a log, and the records in them.

A log is a row of frames: marker, length, CRC-32, sequence (each little-endian), and a payload, which is a safetensors
file of its own. The CRC covers all but the marker. The first frame holds no record: its sequence is the last number
given out when the file was made, so that no number is used twice after records were dropped.
"""

from __future__ import annotations

import os
import struct
import sys
import zlib
from array import array
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, BinaryIO, Literal, NamedTuple, cast, get_args

import numpy as np
import numpy.typing as npt

from ruvllm_core.errors import LearningError
from ruvllm_core.protocols import FloatArray
from ruvllm_sona.files import pack, refused, unpack
from ruvllm_sona.records import Example

Kind = Literal["feedback", "published", "forget", "rollback"]

# Neither UTF-8 text nor token ids below _TOKENS can hold these four bytes, so nobody can say them to the engine in the
# hope that a damaged log is taken up again inside his words.
_TOKENS = 2**24
_MARKER = b"\xff\xfeRV"
_FRAME = struct.Struct("<4sIIQ")
_LARGEST = 2**30


@cache
def start_payload() -> bytes:
    """That of the first frame. Made when asked for: it takes a library that an engine without feedback never needs."""
    return pack({}, {"kind": "start", "format": "1"})


@dataclass(frozen=True, eq=False)
class Record:
    """One thing that happened to a user's memory.

    Attributes:
        time: seconds since 1970; of feedback, its example's.
        example: of feedback, the answer and the verdict. `Log.append` sets its sequence.
        trace: of feedback, the eligibility of the final site, float32 ``[r, C]`` and ``[C, r]``, if there was one.
        version: the number that was published, or rolled back to.
        covers: of a publication, the last sequence whose feedback it has learned from.
        request_id: of ``forget``, what was forgotten; empty is everything.
        sequence: its number in the log, from 1; 0 before it is in one.
    """

    kind: Kind
    time: float
    example: Example | None = None
    trace: tuple[FloatArray, FloatArray] | None = None
    version: int = 0
    covers: int = 0
    request_id: str = ""
    sequence: int = 0


class Span(NamedTuple):
    """Where a whole frame lies."""

    sequence: int
    start: int
    stop: int


def feedback(example: Example, trace: tuple[FloatArray, FloatArray] | None = None) -> Record:
    """The record of one piece of feedback."""
    return Record("feedback", example.time, example=example, trace=trace)


def open_log(path: Path) -> BinaryIO:
    """Open for reading. Raises `LearningError` if that cannot be."""
    try:
        return path.open("rb")
    except OSError as error:
        raise refused("read", path, error) from error


def read_span(file: BinaryIO, start: int, stop: int) -> bytes:
    """Bytes of a file from `start` up to `stop`, or up to its end."""
    file.seek(start)
    return file.read(stop - start)


def frame(sequence: int, payload: bytes) -> bytes:
    """The bytes of one frame."""
    return _FRAME.pack(_MARKER, len(payload), _crc(sequence, payload), sequence) + payload


def _crc(sequence: int, payload: bytes) -> int:
    return zlib.crc32(payload, zlib.crc32(struct.pack("<QI", sequence, len(payload))))


def _frame_at(file: BinaryIO, start: int, size: int, after: int) -> Span | None:
    """The whole frame that begins at `start` and has a sequence above `after`, if there is one."""
    header = read_span(file, start, start + _FRAME.size)
    if len(header) < _FRAME.size:
        return None
    marker, length, crc, sequence = _FRAME.unpack(header)
    stop = start + _FRAME.size + length
    if marker != _MARKER or stop > size or sequence <= after or _crc(sequence, file.read(length)) != crc:
        return None
    return Span(sequence, start, stop)


def _next_marker(file: BinaryIO, start: int, size: int) -> int:
    """Where the next marker from `start` on begins, or `size`."""
    while start < size:
        chunk = read_span(file, start, start + 2**20)
        if (at := chunk.find(_MARKER)) >= 0:
            return start + at
        start += max(len(chunk) - len(_MARKER) + 1, 1)
    return size


def scan(file: BinaryIO, path: Path) -> tuple[list[Span], list[tuple[int, int]]]:
    """The start and every whole record of a log, and what lies between them and is neither."""
    size = os.fstat(file.fileno()).st_size
    start = _frame_at(file, 0, size, -1)
    if start is None or _fields(file, start, path)[1].get("kind") != "start":
        start = Span(0, 0, 0)
    spans = [start]
    gaps = []
    at = start.stop
    while at < size:
        last = spans[-1].sequence if len(spans) > 1 else 0
        if span := _frame_at(file, at, size, last):
            spans.append(span)
            at = span.stop
            continue
        begin = at
        at = _next_marker(file, begin + 1, size)
        while at < size and not _frame_at(file, at, size, last):
            at = _next_marker(file, at + 1, size)
        gaps.append((begin, at))
    if start.stop == 0 and len(spans) == 1:
        raise LearningError(
            f"{path} is no log of feedback, or nothing of it is whole",
            hint="restore it from a backup, or move it away to begin a new one",
        )
    return spans, gaps


def _fields(file: BinaryIO, span: Span, path: Path) -> tuple[dict[str, npt.NDArray[Any]], dict[str, str]]:
    payload = read_span(file, span.start + _FRAME.size, span.stop)
    try:
        return unpack(payload)
    except LearningError as error:
        raise _strange(path, span.sequence, error) from error


def decode(file: BinaryIO, span: Span, path: Path) -> Record:
    """The record in a frame. Raises `LearningError` if it is one of a kind not known here."""
    tensors, values = _fields(file, span, path)
    try:
        kind = values["kind"]
        if kind not in get_args(Kind):
            raise ValueError(f"kind {kind!r}")
        at = float(values["time"])
        if kind != "feedback":
            return Record(
                cast(Kind, kind),
                at,
                version=int(values["version"]),
                covers=int(values["covers"]),
                request_id=values["request_id"],
                sequence=span.sequence,
            )
        example = Example(
            values["request_id"],
            tuple(tensors["prompt_ids"].tolist()),
            tuple(tensors["output_ids"].tolist()),
            float(values["quality"]),
            float(values["temperature"]),
            span.sequence,
            values["adapter_version"],
            at,
        )
        trace = (tensors["trace_a"], tensors["trace_b"]) if "trace_a" in tensors else None
    except (KeyError, ValueError) as error:
        raise _strange(path, span.sequence, error) from error
    return Record("feedback", at, example=example, trace=trace, sequence=span.sequence)


def _strange(path: Path, sequence: int, error: Exception) -> LearningError:
    return LearningError(
        f"{path}: record {sequence} is whole but not understood: {error}", hint="was it written by a newer version?"
    )


def encode(record: Record) -> bytes:
    """A record's payload. Raises `LearningError` if it makes no sense."""
    if record.kind not in get_args(Kind):
        raise _senseless(f"kind {record.kind!r}", "one of " + ", ".join(get_args(Kind)))
    if (record.kind == "feedback") != (record.example is not None):
        raise _senseless(f"a record of kind {record.kind!r}", "feedback has an example, and nothing else has")
    values = {"kind": record.kind, "time": _number("time", record.time)}
    example = record.example
    if example is None:
        if min(record.version, record.covers) < 0:
            raise _senseless(f"version {record.version}, covering {record.covers}", "neither is negative")
        values.update(version=str(record.version), covers=str(record.covers), request_id=record.request_id)
        return pack({}, values)
    if example.time != record.time:
        raise _senseless(f"time {record.time}", f"the time of its example is {example.time}")
    values.update(
        request_id=example.request_id,
        adapter_version=example.adapter_version,
        quality=_number("quality", example.quality, 1.0),
        temperature=_number("temperature", example.temperature),
    )
    tensors: dict[str, npt.NDArray[Any]] = {
        "prompt_ids": _ids("prompt_ids", example.prompt_ids),
        "output_ids": _ids("output_ids", example.output_ids),
    }
    if record.trace is not None:
        a, b = record.trace
        fits = a.ndim == b.ndim == 2 and a.shape[0] == b.shape[1] and a.dtype == b.dtype == np.float32
        if not fits or not (np.isfinite(a).all() and np.isfinite(b).all()):
            raise _senseless(
                f"a trace of {a.dtype} {a.shape} and {b.dtype} {b.shape}", "it is float32 [r, C] and [C, r], and finite"
            )
        tensors.update(trace_a=a, trace_b=b)
    payload = pack(tensors, values)
    if len(payload) > _LARGEST:
        raise _senseless(f"a record of {len(payload)} bytes", f"the most is {_LARGEST}")
    return payload


def _number(name: str, value: float, most: float = sys.float_info.max) -> str:
    if not 0.0 <= value <= most:  # not a number is none of this, either
        raise _senseless(f"{name} {value!r}", f"it is between 0 and {most:g}")
    return repr(float(value))


def _ids(name: str, ids: tuple[int, ...]) -> npt.NDArray[np.int32]:
    try:
        found = np.frombuffer(array("i", ids), np.int32)
    except (OverflowError, TypeError) as error:
        raise _senseless(f"{name}: {error}", "token ids are whole numbers") from None
    if len(found) and not (found.min() >= 0 and found.max() < _TOKENS):
        raise _senseless(f"{name}: tokens {found.min()} to {found.max()}", f"token ids are from 0 to {_TOKENS - 1}")
    return found


def _senseless(what: str, remedy: str) -> LearningError:
    return LearningError(f"the log cannot keep {what}", hint=remedy)
