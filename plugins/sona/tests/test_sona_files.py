"""Files: whole or absent, checked to the last byte, one writer, safe names."""

from __future__ import annotations

import hashlib
import os
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors
import safetensors.numpy
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

import ruvllm_sona.files as files
from ruvllm_core.errors import LearningError
from ruvllm_sona.files import (
    FolderLock,
    append_whole,
    folder_name,
    load_tensors,
    pack,
    read_metadata,
    save_tensors,
    unpack,
    write_atomic,
)

TENSORS = {
    "a": np.arange(6, dtype=np.float32).reshape(2, 3),
    "b": np.array([-1, 2], dtype=np.int32),
    "none": np.zeros((0, 4), np.float32),
    "one": np.array(1.5, dtype=np.float64),
}


def test_atomic_write_leaves_the_old_file_if_it_fails(tmp_path: Path) -> None:
    path = tmp_path / "f"
    write_atomic(path, b"old")

    def fails(file: Any) -> None:
        file.write(b"half of the new")
        raise RuntimeError("the writer broke")

    with pytest.raises(RuntimeError, match="the writer broke"):
        write_atomic(path, fails)
    assert path.read_bytes() == b"old"
    write_atomic(path, lambda file: file.write(b"new"))
    assert path.read_bytes() == b"new"
    assert list(tmp_path.iterdir()) == [path]


def test_bytes_are_on_the_disk_before_the_name_and_the_name_before_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = []
    fsync, rename = os.fsync, Path.replace

    def watch_fsync(fd: int) -> None:
        status = os.fstat(fd)
        steps.append("sync folder" if stat.S_ISDIR(status.st_mode) else f"sync {status.st_size} bytes")
        fsync(fd)

    def watch_rename(self: Path, target: Path) -> Path:
        steps.append("rename")
        return rename(self, target)

    monkeypatch.setattr(os, "fsync", watch_fsync)
    monkeypatch.setattr(Path, "replace", watch_rename)
    write_atomic(tmp_path / "f", b"content")
    assert steps == ["sync 7 bytes", "rename", "sync folder"]


def test_a_file_system_that_refuses_is_named(tmp_path: Path) -> None:
    with pytest.raises(LearningError, match=r"cannot write .*missing.f: it does not exist") as caught:
        write_atomic(tmp_path / "missing" / "f", b"")
    assert caught.value.hint
    with pytest.raises(LearningError, match="cannot read"):
        load_tensors(tmp_path / "missing")
    with pytest.raises(LearningError, match="cannot lock"):
        FolderLock(tmp_path / ("x" * 300))


def test_an_append_that_does_not_fit_is_taken_back(tmp_path: Path) -> None:
    resource = pytest.importorskip("resource")
    path = tmp_path / "f"
    fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    size = append_whole(fd, b"x" * 1000, 0, path)
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1500, old[1]))
    try:
        with pytest.raises(LearningError, match="only 500 of 700 bytes"):
            append_whole(fd, b"y" * 700, size, path)
        assert path.read_bytes() == b"x" * 1000
        assert append_whole(fd, b"y" * 500, size, path) == 1500
        with pytest.raises(LearningError, match="cannot append"):
            append_whole(fd, b"z", 1500, path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
        os.close(fd)
    assert path.read_bytes() == b"x" * 1000 + b"y" * 500


@settings(max_examples=60, deadline=None)
@given(
    tensors=st.dictionaries(
        st.text(max_size=8).filter(lambda name: name != "__metadata__"),
        st.sampled_from([np.float32, np.int64, np.uint8, np.bool_]).flatmap(
            lambda dtype: arrays.arrays(dtype, arrays.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=4))
        ),
        max_size=4,
    ),
    metadata=st.dictionaries(st.text(max_size=8), st.text(max_size=20), max_size=4),
)
@example({"sha256": np.zeros(2, np.float32)}, {"x": '"sha256":"' + "0" * 64 + '"', "\\": '"'})
def test_tensors_come_back_bit_for_bit(
    tmp_path_factory: pytest.TempPathFactory, tensors: Any, metadata: dict[str, str]
) -> None:
    metadata = {key: value for key, value in metadata.items() if key not in ("sha256", "writer")}
    path = tmp_path_factory.mktemp("tensors") / "f"
    save_tensors(path, tensors, metadata)
    found, values = load_tensors(path)
    assert values == metadata == read_metadata(path)
    assert found.keys() == tensors.keys()
    for name, value in tensors.items():
        assert found[name].dtype == value.dtype and found[name].shape == value.shape
        assert found[name].tobytes() == value.tobytes()
    theirs = safetensors.numpy.load_file(path)  # it is an ordinary safetensors file
    assert {name: value.tobytes() for name, value in theirs.items()} == {n: v.tobytes() for n, v in found.items()}


def test_strided_arrays_are_stored_as_they_look(tmp_path: Path) -> None:
    base = np.arange(24, dtype=np.float32).reshape(4, 6)
    views = {"t": base.T, "strided": base[::2, ::3], "back": base[::-1], "fortran": np.asfortranarray(base)}
    found, _ = unpack(pack(views, {}))
    for name, view in views.items():
        np.testing.assert_array_equal(found[name], view)


def test_any_flipped_or_missing_byte_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "f"
    save_tensors(path, TENSORS, {"version": "3"})
    whole = path.read_bytes()
    for at in range(len(whole)):
        for broken in (whole[:at], whole[:at] + bytes([whole[at] ^ 1 << at % 8]) + whole[at + 1 :]):
            path.write_bytes(broken)
            with pytest.raises(LearningError) as caught:
                load_tensors(path)
            assert str(path) in caught.value.message and caught.value.hint
    path.write_bytes(whole + b"\0")
    with pytest.raises(LearningError, match="damaged"):
        load_tensors(path)


def test_the_checksum_is_sha256_of_the_file_without_it(tmp_path: Path) -> None:
    path = tmp_path / "f"
    save_tensors(path, TENSORS)
    with safetensors.safe_open(path, framework="numpy") as file:
        digest = file.metadata()["sha256"]
    blank = path.read_bytes().replace(digest.encode(), b"0" * 64)
    assert hashlib.sha256(blank).hexdigest() == digest


def test_foreign_files_and_values_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "f"
    safetensors.numpy.save_file(TENSORS, path)
    with pytest.raises(LearningError, match="not written by this program"):
        load_tensors(path)
    with pytest.raises(LearningError, match="may not hold sha256"):
        save_tensors(path, {}, {"sha256": "x"})
    with pytest.raises(LearningError, match="'c' is of type complex64"):
        save_tensors(path, {"c": np.zeros(2, np.complex64)})
    with pytest.raises(LearningError, match="cannot be stored"):
        save_tensors(path, {}, {"name": "\ud800"})
    path.write_bytes(b"\xff" * 64)
    for read in (read_metadata, load_tensors):
        with pytest.raises(LearningError, match="damaged"):
            read(path)


@given(st.text(max_size=300))
@example("../../etc/passwd")
@example("")
@example("..")
@example("/")
@example("CON")
@example("a\0b")
@example("\ud800")
def test_any_text_is_a_safe_folder_name(text: str) -> None:
    name = folder_name(text)
    assert len(name) <= 65 and set(name) <= set("abcdefghijklmnopqrstuvwxyz0123456789-")
    assert name == folder_name(text)
    assert not name.startswith("-")


def test_names_that_look_alike_get_folders_of_their_own(tmp_path: Path) -> None:
    names = ["Ann", "ann", "ann ", "an-n", "a/n/n", "á", "a\u0301", "", "unnamed", "x" * 40, "x" * 41]
    assert len({folder_name(name) for name in names}) == len(names)
    assert folder_name("Ann Lee").startswith("ann-lee-")
    for name in names:
        (tmp_path / folder_name(name)).mkdir()
    with pytest.raises(LearningError, match="has to be text"):
        folder_name(None)  # type: ignore[arg-type]


HOLDER = """
import sys
from pathlib import Path
from ruvllm_sona.files import FolderLock
lock = FolderLock(Path(sys.argv[1]))
print("locked", flush=True)
sys.stdin.read()
"""


def test_two_processes_do_not_write_one_folder(tmp_path: Path) -> None:
    folder = tmp_path / "user"
    (folder / "versions").mkdir(parents=True)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(folder)],
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "locked\n"
        with pytest.raises(LearningError, match=f"in use by process {holder.pid}") as caught:
            FolderLock(folder)
        assert "end the other one" in str(caught.value)
        left = [folder / ".state.17-1.part", folder / "versions" / ".current.17-2.part"]
        for path in left:
            path.write_bytes(b"half")
        mine = folder / "kept.part"
        mine.write_bytes(b"no leftover of ours")
        holder.kill()
        holder.wait()
    with FolderLock(folder), pytest.raises(LearningError, match=f"in use by process {os.getpid()}"):
        FolderLock(folder)
    assert not any(path.exists() for path in left) and mine.exists()
    FolderLock(folder).close()


def test_without_flock_a_leftover_lock_has_to_be_deleted_by_hand(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "fcntl", None)
    lock = FolderLock(tmp_path / "u")
    with pytest.raises(LearningError, match="or was by a process that was killed") as caught:
        FolderLock(tmp_path / "u")
    assert f"delete {tmp_path / 'u' / '.lock'}" in str(caught.value)
    lock.close()
    lock.close()
    FolderLock(tmp_path / "u").close()


def test_a_users_folder_is_his_own(tmp_path: Path) -> None:
    with FolderLock(tmp_path / "model" / "user"):
        assert (tmp_path / "model" / "user").stat().st_mode & 0o077 == 0
