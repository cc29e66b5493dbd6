"""Only memory whose pages are in a file for good may be let go."""

from __future__ import annotations

import mmap
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from ruvllm_core.model.mapping import map_file
from ruvllm_kernels_cpu.mapping import mapping_under

SIZE = 8 * mmap.PAGESIZE


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "weights"
    path.write_bytes(np.random.default_rng(0).bytes(SIZE))
    return path


def test_views_of_views_of_a_mapped_file_are_found(file: Path) -> None:
    mapping = map_file(file)
    whole = np.frombuffer(mapping, np.uint8)
    for view in (whole, whole[100:200], whole[: SIZE // 2].reshape(8, -1).view(np.int8)[3], memoryview(whole)[5:]):
        assert mapping_under(np.asarray(view)) is mapping


def test_nothing_else_is(file: Path) -> None:
    with file.open("r+b") as opened:
        private = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_COPY)
        shared = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_WRITE)
    arrays: list[npt.NDArray[Any]] = [np.frombuffer(private, np.uint8), np.frombuffer(shared, np.uint8)]
    arrays += [np.memmap(file, np.uint8, "c"), np.zeros(SIZE, np.uint8), np.frombuffer(bytes(SIZE), np.uint8)]
    arrays.append(np.frombuffer(mmap.mmap(-1, SIZE), np.uint8))
    for array in arrays:
        array.flags.writeable = False
        assert mapping_under(array) is None
