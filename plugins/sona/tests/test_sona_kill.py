"""``kill -9`` at any moment: nothing torn, nothing lost that was acknowledged.

This file is run as a program, too: it forks one warm writer after another, kills each, and looks at what is left. The
writer does all that a learning user's folder sees and says on a pipe what it was told is done.
"""

from __future__ import annotations

import json
import os
import random
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ruvllm_core.protocols import LowRank
from ruvllm_sona.audit import Anchor, Audit
from ruvllm_sona.files import FolderLock, load_tensors, save_tensors
from ruvllm_sona.frames import Record, feedback
from ruvllm_sona.ledger import Ledger, Limits
from ruvllm_sona.log import Log
from ruvllm_sona.records import Example
from ruvllm_sona.versions import Versions

LIMITS = Limits(1e9, 1e9, 1e9, 10**9)
NOW = 1e9
Say = Callable[[str, int], None]


def example(sequence: int) -> Example:
    ids = tuple(range(sequence, sequence + 50 + sequence % 50))
    return Example(f"req-{sequence}", ids, ids[::3], sequence % 11 / 10, time=float(sequence))


def trace(sequence: int) -> tuple[Any, Any]:
    return np.full((2, 576), sequence, np.float32), np.full((576, 2), -sequence, np.float32)


def deltas(number: int) -> dict[str, LowRank]:
    random_state = np.random.default_rng(number)
    shapes = {f"layers.{n}.mlp.down": (300, 200) for n in range(6)}
    return {
        site: LowRank(
            random_state.normal(size=(1, columns)).astype("f"), random_state.normal(size=(rows, 1)).astype("f"), number
        )
        for site, (rows, columns) in shapes.items()
    }


def learn(folder: Path, say: Say, rounds: int, rng: random.Random) -> None:
    """What happens in a user's folder, in small; `say` is what somebody was told is done."""
    with (
        FolderLock(folder),
        Log(folder / "log.bin", flush_s=0.002) as log,
        Audit(folder / "audit.jsonl") as audit,
        Ledger(folder / "ledger.bin", LIMITS) as ledger,
    ):
        versions = Versions(folder / "versions", keep=4)
        for _ in range(rounds):
            for _ in range(rng.randint(1, 6)):
                assert ledger.feedback(NOW) is None
                assert ledger.allow(1.0, NOW) is None
                say("spent", round(ledger.spent(NOW).hour))
                n = log.last + 1
                assert log.append(feedback(example(n), trace(n))) == n
                say("logged", n)
                say("audited", audit.append("feedback", actor="test", request_id=f"req-{n}").entry)
            number = max((version.number for version in versions.kept()), default=0) + 1
            assert versions.publish(deltas(number), {"covers": n}) == number
            say("published", number)
            log.append(Record("published", 1.0, version=number, covers=n))
            say("logged", n + 1)
            audit.append("publish", actor="test", after=str(number), measured={"nats": 0.1})
            anchor = audit.anchor()
            save_tensors(folder / "state.safetensors", {"n": np.array(n)}, {"anchor": str(anchor)})
            say("saved", n)
            if rng.random() < 0.3:
                versions.rollback(rng.choice(versions.kept()).number)
            if rng.random() < 0.3:
                victim = rng.randint(1, n)
                say("forgetting", victim)
                log.rewrite(lambda record, victim=victim: record.sequence == victim)  # type: ignore[misc]
                say("forgotten", victim)


def check(folder: Path, told: dict[str, set[int]]) -> dict[str, int]:
    """That a killed writer's folder holds all it said; how often it had to be repaired."""
    with FolderLock(folder):
        assert not list(folder.rglob("*.part"))
        with Log(folder / "log.bin") as log:
            assert all(damage.torn for damage in log.damage)
            found = {record.sequence: record for record in log.records()}
            for sequence, record in found.items():
                if record.example is not None:
                    assert record.example == Example(**{**vars(example(sequence)), "sequence": sequence})
                    assert record.trace is not None
                    for got, expected in zip(record.trace, trace(sequence), strict=True):
                        np.testing.assert_array_equal(got, expected)
            lost = told["logged"] - told["forgetting"] - found.keys()
            assert not lost, f"acknowledged records {lost} are lost"
            assert not told["forgotten"] & found.keys()
            assert log.last >= max(told["logged"], default=0)
            torn = len(log.damage)
        versions = Versions(folder / "versions", keep=4)
        kept = versions.kept()
        assert max((version.number for version in kept), default=0) >= max(told["published"], default=0)
        for version in kept:
            for site, delta in deltas(version.number).items():
                got = versions.load(version.number)[site]
                np.testing.assert_array_equal(got.a, delta.a)
                np.testing.assert_array_equal(got.b, delta.b)
                assert got.scale == delta.scale
        assert versions.current == 0 or any(version.current for version in kept)
        anchor = None
        state = folder / "state.safetensors"
        if told["saved"] or state.exists():
            tensors, metadata = load_tensors(state)
            assert int(tensors["n"]) >= max(told["saved"], default=0)
            anchor = Anchor.parse(metadata["anchor"])
        with Audit(folder / "audit.jsonl") as audit:
            report = audit.verify(anchor)
            assert report.ok, report
            assert audit.head.entry >= max(told["audited"], default=0)
            repaired = audit.repaired
        with Ledger(folder / "ledger.bin", LIMITS) as ledger:
            assert ledger.spent(NOW).hour >= max(told["spent"], default=0)
    return {"torn_logs": torn, "torn_audits": int(repaired > 0), "records": len(found)}


KINDS = ("spent", "logged", "audited", "published", "saved", "forgetting", "forgotten")


def murder(folder: Path, told: dict[str, set[int]], delay: float | None, body: Callable[[Say], None]) -> bool:
    """Fork a writer, note what it says, kill it; whether it was killed.

    That is `delay` seconds after its start, or if negative, so long after its first word; None lets it end.
    """
    write = os.write
    out, into = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(out)
        status = 1
        try:
            body(lambda kind, n: write(into, f"{kind} {n}\n".encode()) and None)
            status = 0
        except BaseException:
            import traceback

            traceback.print_exc()
        finally:
            os._exit(status)
    os.close(into)
    said, end = b"", time.monotonic() + (60 if delay is None or delay < 0 else delay)
    while (left := end - time.monotonic()) > 0:
        if select.select([out], [], [], left)[0]:
            if not (piece := os.read(out, 65536)):
                break
            if not said and delay is not None and delay < 0:
                end = time.monotonic() - delay
            said += piece
    os.kill(child, signal.SIGKILL)
    while piece := os.read(out, 65536):
        said += piece
    os.close(out)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0, "the writer failed by itself"
    for line in said.decode().splitlines():
        kind, n = line.split()
        told[kind].add(int(n))
    return os.WIFSIGNALED(status)


def random_moments(folder: Path, kills: int, seed: int) -> dict[str, Any]:
    """Kill a writer that never ends after 1 to 50 ms, 20 times in the same folder, then in a new one."""
    rng = random.Random(seed)
    total = {"kills": 0, "torn_logs": 0, "torn_audits": 0, "acknowledged": 0}
    began = time.monotonic()
    for n in range(kills):
        home = folder / str(n // 20)
        if n % 20 == 0:
            told: dict[str, set[int]] = {kind: set() for kind in KINDS}
        before = sum(map(len, told.values()))
        child_seed = rng.random()
        killed = murder(
            home,
            told,
            rng.uniform(0.001, 0.05) * (-1) ** n,
            lambda say, home=home, seed=child_seed: learn(home, say, 10**9, random.Random(seed)),  # type: ignore[misc]
        )
        left = check(home, told) if home.exists() else {"torn_logs": 0, "torn_audits": 0}
        total["kills"] += killed
        total["torn_logs"] += left["torn_logs"]
        total["torn_audits"] += left["torn_audits"]
        total["acknowledged"] += sum(map(len, told.values())) - before
    return {**total, "seconds": round(time.monotonic() - began, 1)}


def every_step(folder: Path) -> dict[str, Any]:
    """Kill a writer at its first step that changes the disk, at its second, and so on; a write is left half done."""
    began, step, torn_logs, torn_audits = time.monotonic(), 0, 0, 0
    history: dict[str, set[int]] = {kind: set() for kind in KINDS}
    murder(folder / "history", history, None, lambda say: learn(folder / "history", say, 2, random.Random(1)))
    killed = True
    while killed:
        step += 1
        home = folder / str(step)
        shutil.copytree(folder / "history", home)
        told = {kind: set(numbers) for kind, numbers in history.items()}

        def body(say: Say, home: Path = home, step: int = step) -> None:
            left = step

            def counted(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
                def call(*arguments: Any, **options: Any) -> Any:
                    nonlocal left
                    left -= 1
                    if left == 0:
                        if name in ("write", "pwrite"):
                            fd, data, *where = arguments
                            real(fd, data[: len(data) // 2], *where)
                        os.kill(os.getpid(), signal.SIGKILL)
                    # A kill does not empty the system's memory: the disk need not be waited for.
                    return None if name == "fsync" else real(*arguments, **options)

                return call

            for owner, names in ((os, ("write", "pwrite", "fsync", "ftruncate")), (Path, ("replace", "unlink"))):
                for name in names:
                    setattr(owner, name, counted(name, getattr(owner, name)))
            learn(home, say, 3, random.Random(5))

        killed = murder(home, told, None, body)
        left = check(home, told)
        torn_logs += left["torn_logs"]
        torn_audits += left["torn_audits"]
    return {
        "steps": step - 1,
        "torn_logs": torn_logs,
        "torn_audits": torn_audits,
        "seconds": round(time.monotonic() - began, 1),
    }


def run_as_program(*arguments: object) -> dict[str, Any]:
    """Forking needs a process without threads of its own, which a test run is not."""
    pytest.importorskip("fcntl")
    ended = subprocess.run(
        [sys.executable, __file__, *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert ended.returncode == 0, ended.stderr
    found: dict[str, Any] = json.loads(ended.stdout)
    return found


def test_killed_at_any_step_nothing_is_lost(tmp_path: Path) -> None:
    found = run_as_program("every_step", tmp_path)
    assert found["steps"] > 50
    assert found["torn_logs"] > 2 and found["torn_audits"] > 2, "half a write has to be among the steps"


@pytest.mark.parametrize("kills", [40, pytest.param(200, marks=pytest.mark.slow)])
def test_killed_at_random_moments_nothing_is_lost(tmp_path: Path, kills: int) -> None:
    if kills > 40 and "SONA_KILLS" not in os.environ:
        pytest.skip("200 kills run with SONA_KILLS=1 in the environment")
    found = run_as_program("random_moments", tmp_path, kills, 11)
    assert found["kills"] == kills
    assert found["acknowledged"] >= kills / 2, "writers that did nothing prove nothing"


if __name__ == "__main__":
    job, where, *numbers = sys.argv[1:]
    jobs: dict[str, Callable[..., dict[str, Any]]] = {"every_step": every_step, "random_moments": random_moments}
    sys.stdout.write(json.dumps(jobs[job](Path(where), *map(int, numbers))))
