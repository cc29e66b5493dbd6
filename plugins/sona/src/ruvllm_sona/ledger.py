"""How much one user may teach: feedback per minute, nats per hour and per day. It bounds what poisoning can do."""

from __future__ import annotations

import math
import os
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import numpy as np
import numpy.typing as npt

from ruvllm_core.errors import LearningError
from ruvllm_sona.files import read_bytes, refused, write_atomic

_MAGIC = b"RUVLEDG1"
# Length of each window in seconds, and the bins it is counted in; one more, because the newest has only begun.
_WINDOWS = {"hour": (3600, 60), "day": (86400, 96)}
_STATE = 2 + sum(bins + 1 for _, bins in _WINDOWS.values())
_SLOT = struct.Struct(f"<8sQ{_STATE}d")
_SUM = struct.Struct("<I")
_SLOT_SIZE = _SLOT.size + _SUM.size
# A clock that goes back by less than this stands still for us; by more, it was set, and time goes on from there.
_JITTER_S = 60.0


@dataclass(frozen=True)
class Limits:
    """How much one user may teach; infinity is no limit.

    Attributes:
        nats_per_hour, nats_per_day: predicted change of all updates, in any 3,600 and any 86,400 seconds.
        feedback_per_minute: how often feedback may come in the long run.
        burst: how many may come at once.
    """

    nats_per_hour: float
    nats_per_day: float
    feedback_per_minute: float
    burst: int

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not value > 0:
                raise LearningError(f"{name} is {value!r}", hint="a limit is above 0; infinity is no limit")
        if not isinstance(self.burst, int):
            raise LearningError(f"burst is {self.burst!r}", hint="a whole number, at least 1")


@dataclass(frozen=True)
class Refusal:
    """Why something is not allowed now, and after how many seconds it would be; infinity is never."""

    reason: str
    retry_s: float

    def __str__(self) -> str:
        return f"{self.reason}; again in {self.retry_s:.0f} s" if self.retry_s < math.inf else self.reason


@dataclass(frozen=True)
class Spent:
    """Nats of the last hour and day (at most a minute and 15 minutes more, for they are binned), and feedback left."""

    hour: float
    day: float
    feedback_left: int


class Ledger:
    """What one user has spent, in a file that a killed process leaves whole; its folder's `FolderLock` has to be held.

    Time is an argument everywhere, seconds since 1970. It need not be steady: a clock set back makes nothing free. What
    was allowed is in the file before the caller knows; only a machine that stops may lose the last half minute. Raises
    `LearningError` if the file is damaged: a budget that is lost would be a budget that is new.
    """

    def __init__(self, path: Path, limits: Limits) -> None:
        self.path = path
        self.limits = limits
        if path.exists():
            self._generation, state = _newest(path)
        else:
            self._generation, state = 0, np.zeros(_STATE)
            state[1] = limits.burst
            write_atomic(path, _slot(0, state) + bytes(_SLOT_SIZE))
        self._now = float(state[0])
        self._tokens = min(float(state[1]), float(limits.burst))
        self._bins = {}
        at = 2
        for name, (_, bins) in _WINDOWS.items():
            self._bins[name] = state[at : at + bins + 1]
            at += bins + 1
        try:
            self._fd = os.open(path, os.O_WRONLY)
        except OSError as error:
            raise refused("open", path, error) from error

    def allow(self, nats: float, now: float) -> Refusal | None:
        """Spend `nats`, the predicted change of one update; or why not, and then nothing is spent.

        Raises `LearningError` for a negative or infinite number, or if the disk does not take it.
        """
        if not 0.0 <= nats < math.inf:
            raise LearningError(f"{nats!r} nats cannot be spent", hint="a change is a finite number and not negative")
        self._advance(now)
        for name, limit in (("hour", self.limits.nats_per_hour), ("day", self.limits.nats_per_day)):
            if self._bins[name].sum() + nats > limit:
                return Refusal(
                    f"{nats:.3g} nats more than the {limit:g} of one {name} allow", self._wait(name, limit - nats)
                )
        for bins in self._bins.values():
            bins[0] += nats
        self._save()
        return None

    def feedback(self, now: float) -> Refusal | None:
        """Count one piece of feedback; or why it comes too soon, and then it does not count.

        Raises `LearningError` if the disk does not take it.
        """
        self._advance(now)
        rate = self.limits.feedback_per_minute
        if rate == math.inf:
            return None
        if self._tokens < 1.0 - 1e-9:
            return Refusal(f"feedback more often than {rate:g} times a minute", (1.0 - self._tokens) * 60.0 / rate)
        self._tokens = max(self._tokens - 1.0, 0.0)
        self._save()
        return None

    def spent(self, now: float) -> Spent:
        """What counts against the limits now."""
        self._advance(now)
        return Spent(float(self._bins["hour"].sum()), float(self._bins["day"].sum()), int(self._tokens))

    def close(self) -> None:
        """Put it on the disk and close the file. Closing twice is fine."""
        if self._fd >= 0:
            try:
                os.fsync(self._fd)
            except OSError as error:
                raise refused("sync", self.path, error) from error
            finally:
                os.close(self._fd)
                self._fd = -1

    def __enter__(self) -> Ledger:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def _advance(self, now: float) -> None:
        if self._fd < 0:
            raise LearningError(f"{self.path} is closed", hint="open it again: this came after the end")
        if not 0.0 <= now < math.inf:
            raise LearningError(f"{now!r} is no time", hint="seconds since 1970")
        if now < self._now - _JITTER_S:
            self._now = now  # ages stay as they were
        elapsed = max(now - self._now, 0.0)
        for name, (length, count) in _WINDOWS.items():
            width = length // count
            passed = min(int(max(now, self._now) // width) - int(self._now // width), count + 1)
            if passed:
                bins = self._bins[name]
                bins[passed:] = bins[: len(bins) - passed].copy()
                bins[:passed] = 0.0
        if elapsed:  # an unlimited rate times no time is no number
            self._tokens = min(
                self._tokens + elapsed * self.limits.feedback_per_minute / 60.0, float(self.limits.burst)
            )
        self._now += elapsed

    def _wait(self, name: str, room: float) -> float:
        """Seconds until at most `room` is counted in a window."""
        length, count = _WINDOWS[name]
        width = length // count
        into = self._now % width
        counted = np.cumsum(self._bins[name])
        for bins in range(1, count + 1):  # after so many bins, so many of the oldest have left
            if counted[count - bins] <= room:
                return bins * width - into
        return (count + 1) * width - into if room >= 0.0 else math.inf

    def _save(self) -> None:
        self._generation += 1
        state = np.concatenate([[self._now, self._tokens], *self._bins.values()])
        try:  # into the slot that is not the newest, which stays whole until this one is
            os.pwrite(self._fd, _slot(self._generation, state), self._generation % 2 * _SLOT_SIZE)
        except OSError as error:
            raise refused("write", self.path, error) from error


def _slot(generation: int, state: npt.NDArray[np.float64]) -> bytes:
    data = _SLOT.pack(_MAGIC, generation, *state.tolist())
    return data + _SUM.pack(zlib.crc32(data))


def _newest(path: Path) -> tuple[int, npt.NDArray[np.float64]]:
    """Generation and state of the newest whole slot."""
    data = read_bytes(path)
    found = []
    for start in (0, _SLOT_SIZE):
        slot = data[start : start + _SLOT_SIZE]
        if len(slot) == _SLOT_SIZE and _SUM.unpack_from(slot, _SLOT.size)[0] == zlib.crc32(slot[: _SLOT.size]):
            magic, generation, *state = _SLOT.unpack_from(slot)
            if magic == _MAGIC:
                found.append((generation, np.array(state)))
    if not found:
        raise LearningError(
            f"{path} is damaged, or no ledger", hint="restore it; or delete it, if this user may spend it all again"
        )
    return max(found, key=lambda slot: slot[0])
