"""From a model's name to its files: local ones, those downloaded before, or a download from the Hugging Face hub.

A model that is here, whole, is used without asking the network; `resolve` with ``refresh=True`` looks for a newer
revision. Downloads go through huggingface_hub into ``cache_dir/hub``, in its layout (``refs`` name commits,
``snapshots`` link to ``blobs``; a blob gets its name only when it is whole). ``HF_TOKEN``, ``HF_ENDPOINT`` and
``HF_HUB_OFFLINE`` mean what they mean to huggingface_hub.
"""

from __future__ import annotations

import os
from pathlib import Path

from ruvllm_core.errors import ModelError, ModelNotFound
from ruvllm_core.model import smollm2
from ruvllm_core.model.ref import ModelRef, choose_gguf, names_quantization, resolve_local
from ruvllm_core.model.safetensors import INDEX_FILE, read_index
from ruvllm_core.settings import Settings


def resolve(
    ref: str | Path | ModelRef,
    settings: Settings,
    *,
    download: bool = True,
    progress: bool = True,
    refresh: bool = False,
) -> Path:
    """The GGUF file or Hugging Face folder that `ref` names, downloaded if need be.

    Args:
        ref: a hub id, a path, or ``smollm2``.
        settings: says where downloads are kept, whether the network may be asked, and, where a repository or folder
            has several GGUF files, by `quantization` which one is meant.
        download: whether the network may be asked for what is not here; with `refresh`, also for a newer revision.
        progress: show bars on stderr.

    Raises `ModelNotFound` if there is no such model or it cannot be got, `ModelError` if it is ambiguous or unusable
    or the disk is full.
    """
    model = ModelRef.parse(ref)
    if model.path is not None:
        return resolve_local(model.path, settings.quantization)
    may_download = download and not is_offline(settings)
    if model.kind == "short":
        here = smollm2.installed() or smollm2.cached(settings.cache_dir)
    else:
        here = None if refresh and may_download else _cached_model(model, settings, may_download)
    if here is not None:
        return here
    if not may_download:
        raise not_here(model, settings, "downloads are off" if not download else "offline mode is on")
    if model.kind == "short":
        return smollm2.fetch(settings.cache_dir, progress=progress)
    return _download(model, settings, progress, tokenizer_only=False)


def resolve_tokenizer_files(ref: str | Path | ModelRef, settings: Settings, *, progress: bool = True) -> Path:
    """The folder that holds the tokenizer and config of `ref`, or its GGUF file; weights only if they are one with it.

    Raises as `resolve` does.
    """
    model = ModelRef.parse(ref)
    if model.path is not None:
        return resolve_local(model.path, settings.quantization, tokenizer_only=True)
    if model.kind == "hub" and model.file is None:
        snapshot = snapshot_folder(model, settings)
        if snapshot is not None and any(path.is_file() for path in snapshot.glob("tokenizer.*")):
            return snapshot
        if not is_offline(settings):
            return _download(model, settings, progress, tokenizer_only=True)
    return resolve(model, settings, progress=progress)


def is_offline(settings: Settings) -> bool:
    """Whether `settings` or huggingface_hub's own variable forbid the network."""
    return settings.offline or os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")


def hub_dir(settings: Settings) -> Path:
    """Where downloads from the hub are kept."""
    return settings.cache_dir / "hub"


def repo_dir(repo: str, settings: Settings) -> Path:
    """Where downloads of one repository are kept."""
    return hub_dir(settings) / ("models--" + repo.replace("/", "--"))


def snapshot_folder(model: ModelRef, settings: Settings) -> Path | None:
    """The folder of the downloaded revision that `model` names, whole or not; None if nothing of it is here."""
    assert model.repo is not None
    repo = repo_dir(model.repo, settings)
    commit = model.revision or "main"
    pointer = repo / "refs" / commit
    if pointer.is_file():
        commit = read_ref(pointer)
    folder = repo / "snapshots" / commit
    return folder if folder.is_dir() else None


def read_ref(file: Path) -> str:
    """The commit that a file of ``refs`` names."""
    return file.read_text(encoding="ascii", errors="replace").strip()


def is_whole(folder: Path) -> bool:
    """Whether a snapshot has a config and all the safetensors files that its index names."""
    names = {entry.name for entry in folder.iterdir()}
    if "config.json" not in names:
        return False
    if INDEX_FILE in names:
        try:
            return set(read_index(folder / INDEX_FILE).values()) <= names
        except ModelError:
            return True  # the reader of the index says what is wrong with it
    return any(name.endswith(".safetensors") for name in names)


def _cached_model(model: ModelRef, settings: Settings, may_download: bool) -> Path | None:
    """What was downloaded of `model`, if it is whole."""
    folder = snapshot_folder(model, settings)
    if folder is None:
        return None
    names = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
    if model.file is not None:
        return folder / model.file if model.file in names else None
    if is_whole(folder):
        return folder
    tag = settings.quantization
    if may_download and tag and not any(names_quantization(name, tag) for name in names):
        return None  # the repository may have the file that is meant
    gguf = choose_gguf(names, None, tag, model.text)
    return folder / gguf if gguf is not None else None


def not_here(model: ModelRef, settings: Settings, why: str) -> ModelNotFound:
    """The error that says `why` a model cannot be had, and which ones can."""
    here = []
    for ref in sorted(hub_dir(settings).glob("models--*--*/refs/*")):
        snapshot = ref.parent.parent / "snapshots" / read_ref(ref)
        if snapshot.is_dir() and (is_whole(snapshot) or any(snapshot.rglob("*.gguf"))):
            name = "/".join(ref.parent.parent.name.split("--", 2)[1:])
            here.append(name if ref.name == "main" else f"{name}@{ref.name}")
    if smollm2.installed() or smollm2.cached(settings.cache_dir):
        here.append("smollm2")
    return ModelNotFound(
        f"{model.text} is not here, and {why}",
        hint="models that are here: " + ", ".join(here) if here else "no models are here",
    )


def _download(model: ModelRef, settings: Settings, progress: bool, *, tokenizer_only: bool) -> Path:
    from ruvllm_core.model.download import download_model

    return download_model(model, settings, progress=progress, tokenizer_only=tokenizer_only)
