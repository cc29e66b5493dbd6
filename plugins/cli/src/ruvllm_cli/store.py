"""The models that are here: `list_models`, and `remove_model`, which deletes nothing outside the cache folder."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from ruvllm_core.errors import ModelError, ModelNotFound, near
from ruvllm_core.model import smollm2
from ruvllm_core.model.hub import hub_dir, is_whole, read_ref, repo_dir, snapshot_folder
from ruvllm_core.model.ref import ModelRef
from ruvllm_core.settings import Settings


@dataclass(frozen=True)
class ModelEntry:
    """A model on this disk.

    Attributes:
        name: what `resolve` and `remove_model` know it by.
        path: its GGUF file or folder.
        bytes: its size; a file that two revisions share counts for both.
        format: ``gguf``, ``safetensors``, or ``incomplete`` (a download that was cut off, or a tokenizer alone).
        source: ``package`` (came with an installed package) or ``cache``.
        revision: commit of a hub model.
    """

    name: str
    path: Path
    bytes: int
    format: str
    source: str
    revision: str | None = None


def list_models(settings: Settings) -> list[ModelEntry]:
    """All models of the cache folder, and smollm2 if its package is installed, by name.

    Raises `ModelError` if the cache folder cannot be read.
    """
    entries = []
    try:
        for path, source in ((smollm2.installed(), "package"), (smollm2.cached(settings.cache_dir), "cache")):
            if path is not None:
                entries.append(ModelEntry("smollm2", path, path.stat().st_size, "gguf", source))
        for repo in hub_dir(settings).glob("models--*--*"):
            entries += _of_repo(repo)
    except OSError as error:
        raise ModelError(f"cannot read the cache folder {settings.cache_dir}: {error}") from None
    return sorted(entries, key=lambda entry: (entry.name, entry.source))


def find_models(name: str, settings: Settings) -> list[ModelEntry]:
    """The entries that `remove_model` would delete: all of a repository, one revision of it, or one GGUF file.

    Raises `ModelNotFound` if there are none, and `ModelError` for a model that is not in the cache folder.
    """
    model = ModelRef.parse(name)
    if model.path is not None:
        raise ModelError(
            f"{name} is a file or folder of yours; only what was downloaded into {settings.cache_dir} is deleted"
        )
    entries = list_models(settings)
    found = [entry for entry in entries if entry.source == "cache" and _is_meant(entry, model, settings)]
    if found:
        return found
    if any(entry.name == name for entry in entries):
        raise ModelError(
            f"{name} came with the installed package {smollm2.PACKAGE}", hint=f"pip uninstall {smollm2.PACKAGE}"
        )
    names = {entry.name for entry in entries if entry.source == "cache"}
    raise ModelNotFound(f"there is no model {name} in {settings.cache_dir}", hint=near(name, names))


def remove_model(name: str, settings: Settings) -> tuple[list[ModelEntry], int]:
    """Delete what `find_models` finds. Returns it, and the bytes that this frees.

    Contents that another revision needs stay. Raises as `find_models` does, and `ModelError`, before anything is
    deleted, if a link leads out of the cache folder.
    """
    found = find_models(name, settings)
    model = ModelRef.parse(name)
    folder = repo_dir(model.repo, settings) if model.repo else settings.cache_dir / "smollm2"
    before = _size(folder)
    try:
        if model.file is None and model.revision is None:
            shutil.rmtree(_inside(folder, settings))
        elif model.file is not None:
            _remove_files(folder, [entry.path for entry in found], settings)
        else:
            snapshot = folder / "snapshots" / str(found[0].revision)
            _remove_files(folder, [path for path in snapshot.rglob("*") if not path.is_dir()], settings)
    except OSError as error:
        raise ModelError(f"cannot delete {name}: {error}") from None
    return found, before - _size(folder)


def _of_repo(repo: Path) -> Iterator[ModelEntry]:
    name = repo.name.removeprefix("models--").replace("--", "/", 1)
    refs: dict[str, str] = {}
    for path in sorted((repo / "refs").rglob("*")):
        if path.is_file():
            ref = path.relative_to(repo / "refs").as_posix()
            commit = read_ref(path)
            refs[commit] = ref if ref == "main" else refs.get(commit, ref)
    snapshots = [path for path in (repo / "snapshots").glob("*") if path.is_dir()]
    if not snapshots:
        yield ModelEntry(name, repo, _size(repo), "incomplete", "cache")
    for snapshot in snapshots:
        commit = snapshot.name
        ref = refs.get(commit, commit)
        full = name if ref == "main" else f"{name}@{ref}"
        files = [path for path in sorted(snapshot.rglob("*")) if path.is_file()]
        ggufs = [path for path in files if path.suffix.lower() == ".gguf"]
        for path in ggufs:
            inner = path.relative_to(snapshot).as_posix()
            yield ModelEntry(f"{full}:{inner}", path, path.stat().st_size, "gguf", "cache", commit)
        if is_whole(snapshot) or not ggufs:
            size = sum(path.stat().st_size for path in files if path not in ggufs)
            if is_whole(snapshot):
                yield ModelEntry(full, snapshot, size, "safetensors", "cache", commit)
            else:  # a first download that was cut off has no ref yet
                yield ModelEntry(full if refs else name, snapshot, size, "incomplete", "cache", commit)


def _is_meant(entry: ModelEntry, model: ModelRef, settings: Settings) -> bool:
    if model.repo is None:
        return entry.name == model.text
    if model.file is None and model.revision is None:
        repo = repo_dir(model.repo, settings)
        return repo == entry.path or repo in entry.path.parents
    snapshot = snapshot_folder(model, settings)
    if snapshot is None or entry.revision != snapshot.name or snapshot.parent.parent not in entry.path.parents:
        return False
    return model.file is None or entry.path == snapshot / model.file


def _remove_files(repo: Path, files: list[Path], settings: Settings) -> None:
    """Delete links of snapshots and the blobs that no other link needs, then snapshots and refs that stand empty."""
    blobs = {_inside(path, settings) for path in files}
    for path in files:
        path.unlink()
    snapshots = repo / "snapshots"
    for blob in blobs - {path.resolve() for path in snapshots.rglob("*") if path.is_symlink()}:
        blob.unlink(missing_ok=True)
    for snapshot in list(snapshots.iterdir()):
        if not any(path.is_file() for path in snapshot.rglob("*")):
            shutil.rmtree(snapshot)
    for ref in [path for path in (repo / "refs").rglob("*") if path.is_file()]:
        if not (snapshots / read_ref(ref)).is_dir():
            ref.unlink()
    if not any(snapshots.iterdir()):
        shutil.rmtree(repo)


def _inside(path: Path, settings: Settings) -> Path:
    """`path` with links followed. Raises `ModelError` unless that is inside the cache folder."""
    target, root = path.resolve(), settings.cache_dir.resolve()
    if root not in target.parents:
        raise ModelError(f"{path} leads out of the cache folder, to {target}: nothing was deleted")
    return target


def _size(folder: Path) -> int:
    """Bytes of the files below `folder`; links count nothing."""
    files: Iterable[Path] = folder.rglob("*")
    return sum(path.lstat().st_size for path in files if path.is_file() and not path.is_symlink())
