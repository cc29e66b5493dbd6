"""Versions: bit for bit back, at any time, and one step from one to the next."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from ruvllm_core.errors import LearningError
from ruvllm_core.protocols import LowRank
from ruvllm_sona.versions import Versions


@pytest.fixture(autouse=True)
def _no_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hundreds of files are written here, and none has to outlive the machine."""
    monkeypatch.setattr(os, "fsync", lambda fd: None)


FLOATS = st.floats(width=32, allow_nan=False, allow_infinity=False)


@st.composite
def delta(draw: st.DrawFn) -> LowRank:
    rank, columns, rows = (draw(st.integers(1, 4)) for _ in range(3))
    scale = draw(st.floats(allow_nan=False, allow_infinity=False))
    a = draw(arrays.arrays(np.float32, (rank, columns), elements=FLOATS))
    return LowRank(a, draw(arrays.arrays(np.float32, (rows, rank), elements=FLOATS)), scale)


def deltas(seed: int) -> dict[str, LowRank]:
    random = np.random.default_rng(seed)
    return {
        site: LowRank(random.normal(size=(1, 5)).astype("f"), random.normal(size=(7, 1)).astype("f"), 0.5 + seed)
        for site in ("final", "layers.0.mlp.down")
    }


def same(found: dict[str, LowRank], expected: dict[str, LowRank]) -> bool:
    assert found.keys() == expected.keys()
    return all(
        (x.a.tobytes(), x.b.tobytes(), x.a.shape, x.b.shape, x.a.dtype, x.scale)
        == (y.a.tobytes(), y.b.tobytes(), y.a.shape, y.b.shape, y.a.dtype, y.scale)
        for x, y in ((found[site], expected[site]) for site in expected)
    )


@settings(max_examples=50, deadline=None)
@given(st.dictionaries(st.text(max_size=12), delta(), min_size=1, max_size=3))
def test_deltas_come_back_bit_for_bit(tmp_path_factory: pytest.TempPathFactory, found: dict[str, LowRank]) -> None:
    folder = tmp_path_factory.mktemp("versions")
    metadata = {"time": 1.5, "covers": 7, "measured": {"kl": 0.1}, "text": "é\u2028"}
    assert Versions(folder).publish(found, metadata) == 1
    again = Versions(folder)
    assert same(again.load(1), found)
    (version,) = again.kept()
    assert (version.number, version.current, version.metadata) == (1, True, metadata)
    assert version.size == (folder / "000001.safetensors").stat().st_size


def test_rollback_is_exact_and_numbers_are_never_used_twice(tmp_path: Path) -> None:
    folder = tmp_path / "versions"
    versions = Versions(folder)
    assert versions.current == 0 and versions.load(0) == {} and versions.kept() == []
    for n in (1, 2, 3):
        assert versions.publish(deltas(n)) == n == versions.current
    stored = {path.name: path.read_bytes() for path in folder.glob("*.safetensors")}
    for number in (1, 3, 0, 2):
        versions.rollback(number)
        assert Versions(folder).current == number
        assert number == 0 or same(versions.load(versions.current), deltas(number))
    assert {path.name: path.read_bytes() for path in folder.glob("*.safetensors")} == stored
    assert versions.publish(deltas(4)) == 4
    versions.rollback(1)
    versions.remove([3, 4])
    assert [version.number for version in versions.kept()] == [1, 2]
    assert Versions(folder).publish(deltas(5)) == 5
    for number in (0, 5):
        with pytest.raises(LearningError, match="cannot be removed") as caught:
            versions.remove([1, number])
        assert caught.value.hint
    assert [version.number for version in versions.kept()] == [1, 2, 5]


def test_the_oldest_go_but_never_the_current_one(tmp_path: Path) -> None:
    versions = Versions(tmp_path, keep=3)
    numbers: list[list[int]] = []
    for n in range(1, 7):
        versions.publish(deltas(n))
        numbers.append([version.number for version in versions.kept()])
    assert numbers == [[1], [1, 2], [1, 2, 3], [2, 3, 4], [3, 4, 5], [4, 5, 6]]
    versions.rollback(4)
    assert [version.current for version in versions.kept()] == [True, False, False]
    with pytest.raises(LearningError, match="there is no version 3") as caught:
        versions.rollback(3)
    assert caught.value.hint == "there are 0, 4, 5, 6"
    versions.rollback(0)
    versions.publish(deltas(7))
    assert [version.number for version in Versions(tmp_path, keep=3).kept()] == [5, 6, 7]


def test_what_was_killed_before_the_pointer_moved_does_not_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    versions = Versions(tmp_path)
    point = Versions._point

    def killed(self: Versions, current: int, highest: int) -> None:
        if highest:
            raise KeyboardInterrupt
        point(self, current, highest)

    for first in (True, False):
        before = versions.current
        with monkeypatch.context() as patch:
            patch.setattr(Versions, "_point", killed)
            with pytest.raises(KeyboardInterrupt):
                versions.publish(deltas(9))
        again = Versions(tmp_path)
        assert again.current == before and len(again.kept()) == before
        with pytest.raises(LearningError, match="there is no version"):
            again.load(before + 1)
        assert again.publish(deltas(before + 1)) == before + 1
        assert same(again.load(before + 1), deltas(before + 1)), first


def test_damage_is_named_and_nothing_falls_back_to_the_base_model(tmp_path: Path) -> None:
    versions = Versions(tmp_path)
    versions.publish(deltas(1))
    versions.publish(deltas(2))
    pointer, path = tmp_path / "current", tmp_path / "000001.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[:-1])
    with pytest.raises(LearningError, match="is damaged"):
        versions.rollback(1)
    assert versions.current == 2
    path.write_bytes(content)
    good = pointer.read_bytes()
    for bad in (
        b"",
        b"3",
        b"{}",
        b'{"current":3,"highest":2}',
        b'{"current":-1,"highest":2}',
        b'{"current":true}',
        b"\xff",
    ):
        pointer.write_bytes(bad)
        for use in (lambda: versions.current, lambda: Versions(tmp_path), lambda: versions.publish(deltas(3))):
            with pytest.raises(LearningError, match="current is damaged") as caught:
                use()
            assert caught.value.hint
    pointer.unlink()
    with pytest.raises(LearningError, match="is missing"):
        Versions(tmp_path)
    pointer.write_bytes(good)
    assert json.loads(good) == {"current": 2, "highest": 2} and same(Versions(tmp_path).load(2), deltas(2))


A, B = np.zeros((1, 4), np.float32), np.zeros((6, 1), np.float32)


@pytest.mark.parametrize(
    ("found", "metadata", "problem"),
    [
        ({}, {}, "without deltas"),
        ({"x": LowRank(A.astype(np.float64), B)}, {}, "float64"),
        ({"x": LowRank(A, B.T)}, {}, "the delta at x"),
        ({"x": LowRank(A[0], B)}, {}, "the delta at x"),
        ({"x": LowRank(A, np.full_like(B, np.nan))}, {}, "not finite"),
        ({"x": LowRank(A, B, float("inf"))}, {}, "not finite"),
        ({"x": LowRank(A, B)}, {"kl": float("nan")}, "metadata"),
        ({"x": LowRank(A, B)}, {"path": Path()}, "metadata"),
        ({"\ud800": LowRank(A, B)}, {}, "cannot be stored"),
    ],
)
def test_senseless_versions_are_refused(tmp_path: Path, found: Any, metadata: Any, problem: str) -> None:
    versions = Versions(tmp_path)
    with pytest.raises(LearningError, match=problem) as caught:
        versions.publish(found, metadata)
    assert caught.value.hint and versions.current == 0 and versions.kept() == []
    with pytest.raises(LearningError, match="0 versions cannot be kept"):
        Versions(tmp_path, keep=0)
