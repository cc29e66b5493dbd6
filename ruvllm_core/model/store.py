"""The models that are here: `list_models`, and `remove_model`, which deletes nothing outside the cache folder."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from ruvllm_core.errors import ModelError, ModelNotFound, near
from ruvllm_core.model import smollm2
from ruvllm_core.model.hub import hub_dir, is_whole
from ruvllm_core.model.ref import ModelRef
from ruvllm_core.settings import Settings


@dataclass(frozen=True)
class ModelEntry:
    """A model on this disk.

    Attributes:
        name: what `resolve` and `remove_model` know it by.
        path: its GGUF file or folder.
        bytes: size on disk; files that two revisions share count for both.
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
    """All models of the cache folder, and smollm2 if its package is installed, by name."""
    entries: list[ModelEntry] = []
    package, copy = smollm2.installed(), smollm2.cached(settings.cache_dir)
    if package is not None:
        entries.append(ModelEntry("smollm2", package, package.stat().st_size, "gguf", "package"))
    if copy is not None:
        entries.append(ModelEntry("smollm2", copy, copy.stat().st_size, "gguf", "cache"))
    for repo in sorted(hub_dir(settings).glob("models--*--*")):
        entries += _of_repo(repo)
    return sorted(entries, key=lambda entry: (entry.name, entry.source))


def find_models(name: str, settings: Settings) -> list[ModelEntry]:
    """The entries that `remove_model` would delete.

    Raises `ModelNotFound` if there are none, and `ModelError` for a model that is not in the cache folder.
    """
    model = ModelRef.parse(name)
    if model.path is not None:
        raise ModelError(
            f"{name} is a file or folder of yours; only what was downloaded into {settings.cache_dir} is deleted"
        )
    entries = list_models(settings)
    if model.kind == "short":
        found = [entry for entry in entries if entry.name == name and entry.source == "cache"]
        if not found and any(entry.name == name for entry in entries):
            raise ModelError(
                f"{name} came with the installed package {smollm2.PACKAGE}", hint=f"pip uninstall {smollm2.PACKAGE}"
            )
    else:
        found = [entry for entry in entries if entry.source == "cache" and _matches(model, entry)]
    if not found:
        names = sorted({entry.name for entry in entries if entry.source == "cache"})
        raise ModelNotFound(f"no model {name} in {settings.cache_dir}", hint=near(name, names))
    return found


def remove_model(name: str, settings: Settings) -> list[ModelEntry]:
    """Delete what was downloaded of a model: a repository, one revision of it, or one GGUF file.

    Contents that another revision needs stay. Returns what was deleted; raises as `find_models` does, and `ModelError`
    if a link leads out of the cache folder.
    """
    found = find_models(name, settings)
    model = ModelRef.parse(name)
    try:
        if model.repo is None:
            for entry in found:
                _inside(entry.path, settings).unlink()
            return found
        repo = hub_dir(settings) / ("models--" + model.repo.replace("/", "--"))
        _inside(repo, settings)
        if model.file is None and model.revision is None:
            shutil.rmtree(repo)
        elif model.file is None:
            _remove_snapshots(repo, {entry.revision for entry in found if entry.revision}, settings)
        else:
            _remove_files(repo, [entry.path for entry in found], settings)
    except OSError as error:
        raise ModelError(f"cannot delete {name}: {error}") from None
    return found


def _of_repo(repo: Path) -> Iterator[ModelEntry]:
    name = repo.name.removeprefix("models--").replace("--", "/", 1)
    refs = {
        path.read_text(encoding="utf-8").strip(): path.relative_to(repo / "refs").as_posix()
        for path in sorted((repo / "refs").rglob("*"), reverse=True)
        if path.is_file()
    }
    snapshots = [path for path in sorted((repo / "snapshots").glob("*")) if path.is_dir()]
    if not snapshots:
        yield ModelEntry(name, repo, _size(repo.rglob("*")), "incomplete", "cache")
    for snapshot in snapshots:
        commit = snapshot.name
        branch = refs.get(commit, commit)
        full = name if branch == "main" else f"{name}@{branch}"
        files = [path for path in sorted(snapshot.rglob("*")) if path.is_file()]
        ggufs = [path for path in files if path.suffix.lower() == ".gguf"]
        for path in ggufs:
            inner = path.relative_to(snapshot).as_posix()
            yield ModelEntry(f"{full}:{inner}", path, path.stat().st_size, "gguf", "cache", commit)
        others = [path for path in files if path not in ggufs]
        if others and (is_whole(snapshot) or not ggufs):
            kind = "safetensors" if is_whole(snapshot) else "incomplete"
            yield ModelEntry(full, snapshot, _size(others), kind, "cache", commit)


def _matches(model: ModelRef, entry: ModelEntry) -> bool:
    listed = ModelRef.parse(entry.name)
    if listed.repo != model.repo:
        return False
    if model.file is not None and listed.file != model.file:
        return False
    if model.revision is None:
        # A file without a revision is that of the default branch, a repository without one all there is of it.
        return model.file is None or listed.revision is None
    return model.revision in (listed.revision or "main", entry.revision)


def _remove_snapshots(repo: Path, commits: set[str], settings: Settings) -> None:
    for commit in commits:
        snapshot = repo / "snapshots" / commit
        _remove_files(repo, [path for path in snapshot.rglob("*") if not path.is_dir()], settings)
        shutil.rmtree(_inside(snapshot, settings), ignore_errors=False)
    for ref in [path for path in (repo / "refs").rglob("*") if path.is_file()]:
        if ref.read_text(encoding="utf-8").strip() in commits:
            ref.unlink()
    if not any((repo / "snapshots").iterdir()):
        shutil.rmtree(repo)


def _remove_files(repo: Path, files: list[Path], settings: Settings) -> None:
    """Delete links of snapshots, and the blobs that no other link needs."""
    blobs = {path: _inside(path, settings) for path in files}
    for path in files:
        path.unlink()
    needed = {path.resolve() for path in (repo / "snapshots").rglob("*") if path.is_symlink()}
    for blob in set(blobs.values()) - needed:
        blob.unlink(missing_ok=True)


def _inside(path: Path, settings: Settings) -> Path:
    """`path` with links followed, if that is inside the cache folder. Raises `ModelError` otherwise."""
    target, root = path.resolve(), settings.cache_dir.resolve()
    if root not in target.parents:
        raise ModelError(f"{path} leads out of the cache folder, to {target}; nothing was deleted")
    return target


def _size(paths: Iterable[Path]) -> int:
    return sum(path.stat().st_size for path in paths if path.is_file())
