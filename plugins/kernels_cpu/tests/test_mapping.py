"""Pages of a mapped file leave the process, and nothing else does."""

from __future__ import annotations

import mmap
import sys
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from ruvllm_core.model.mapping import map_file
from ruvllm_kernels_cpu.mapping import release

PAGE = mmap.PAGESIZE
PAGES = 64


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "weights"
    path.write_bytes(np.random.default_rng(0).bytes(PAGES * PAGE + 100))
    return path


def resident(array: npt.NDArray[Any], path: Path) -> int:
    """Bytes of the mapping of `path` that are in this process's memory."""
    found, here = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if "-" in line.split()[0] and ":" not in line.split()[0]:
            here = line.endswith(str(path))
        elif here and line.startswith("Rss:"):
            found += int(line.split()[1]) * 1024
    return found


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize(
    ("start", "stop"), [(0, PAGES * PAGE), (1, 40 * PAGE - 1), (3 * PAGE, 9 * PAGE), (5 * PAGE, None)]
)
def test_whole_pages_of_a_file_leave_and_come_back(file: Path, start: int, stop: int | None) -> None:
    whole = np.frombuffer(map_file(file), np.uint8)
    expected = whole.tobytes()
    before = resident(whole, file)
    assert before >= PAGES * PAGE
    view = whole[start:stop]
    rows = view[: len(view) // 8 * 8].reshape(8, -1).view(np.int8) if stop else view  # as tensors are: views of views
    gone = release(rows)
    assert before - resident(whole, file) == gone // PAGE * PAGE + (PAGE if gone % PAGE else 0)
    end = start + rows.nbytes
    last = end if end == len(whole) else end // PAGE * PAGE
    assert gone == last - -(-start // PAGE) * PAGE > 0
    assert whole.tobytes() == expected


def test_nothing_else_is_touched(file: Path) -> None:
    with file.open("r+b") as opened:
        private = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_COPY)
        shared = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_WRITE)
    written = np.memmap(file, np.uint8, "c")
    arrays: list[npt.NDArray[Any]] = [np.frombuffer(private, np.uint8), np.frombuffer(shared, np.uint8), written]
    arrays += [np.zeros(8 * PAGE, np.uint8), np.frombuffer(mmap.mmap(-1, 8 * PAGE), np.uint8)]
    arrays.append(np.frombuffer(bytes(8 * PAGE), np.uint8))
    for array in arrays:
        if array.flags.writeable:
            array[:] = 7
            array.flags.writeable = False
        before = array.tobytes()
        assert release(array) == 0
        assert array.tobytes() == before
    mapped = np.frombuffer(map_file(file), np.uint8)
    assert release(mapped[: 8 * PAGE : 2]) == 0, "not one piece"
    assert release(mapped[10:PAGE]) == 0, "no whole page"
    assert release(mapped[:0]) == 0
