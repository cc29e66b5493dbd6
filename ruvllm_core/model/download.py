"""Downloads from the Hugging Face hub: the files a model needs and no others, and what can go wrong on the way."""

from __future__ import annotations

import errno
import os
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from ruvllm_core.errors import ModelError, ModelNotFound, RuvLLMError
from ruvllm_core.log import get_logger
from ruvllm_core.model.hub import SAFETENSORS_INDEX, TOKENIZER_FILES, hub_dir, not_here, repo_dir, snapshot_folder
from ruvllm_core.model.ref import ModelRef, choose_gguf
from ruvllm_core.settings import Settings

log = get_logger("download")
#: huggingface_hub goes on by itself after some failures, not after all (a reset connection is one).
_ATTEMPTS = 3
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


def download_model(model: ModelRef, settings: Settings, *, progress: bool = True, tokenizer_only: bool = False) -> Path:
    """Bring a hub model into the cache folder, as it is on the hub now: its GGUF file, or its folder.

    Files that are here already are not downloaded again. Until all are here, the revision's name stays with the commit
    it had. A failure leaves whole files only, or nothing. Raises `ModelNotFound` or `ModelError`.
    """
    from huggingface_hub import HfApi, hf_hub_download

    assert model.repo is not None
    endpoint = os.environ.get("HF_ENDPOINT") or None
    with _explained(model, settings):
        info = HfApi(endpoint=endpoint).model_info(model.repo, revision=model.revision, files_metadata=True)
    offered = {sibling.rfilename: sibling for sibling in info.siblings or ()}
    files, gguf = _wanted(sorted(offered), model, settings, tokenizer_only)
    commit, repo = str(info.sha), repo_dir(model.repo, settings)
    snapshot = repo / "snapshots" / commit
    needed = 0
    for name in files:
        lfs = offered[name].lfs
        blob = lfs.sha256 if lfs is not None else offered[name].blob_id
        if not (snapshot / name).is_file() and not (repo / "blobs" / str(blob)).is_file():
            needed += offered[name].size or 0
    _check_space(needed, model, settings)
    try:
        with _explained(model, settings), _bars(progress):
            # One after the other in this thread: huggingface_hub's parallel downloads do not stop at Ctrl-C. The last
            # step has nothing left to download and lets the revision name the commit.
            for name, revision in [*((name, commit) for name in files), (files[0], model.revision)]:
                for attempt in range(_ATTEMPTS):
                    try:
                        hf_hub_download(
                            model.repo, name, revision=revision, cache_dir=hub_dir(settings), endpoint=endpoint
                        )
                        break
                    except Exception as error:
                        if attempt == _ATTEMPTS - 1 or not _is_network(error):
                            raise
                        log.warning("connection lost, trying again", file=name, error=_brief(error))
                        time.sleep(1)
    finally:
        if not any(path.is_file() for part in ("blobs", "snapshots") for path in (repo / part).rglob("*")):
            shutil.rmtree(repo, ignore_errors=True)
    if snapshot_folder(model, settings) != snapshot:
        raise ModelError(f"{model.text} changed on the hub while it was downloaded", hint="try again")
    return snapshot / gguf if gguf is not None else snapshot


def _wanted(
    names: Sequence[str], model: ModelRef, settings: Settings, tokenizer_only: bool
) -> tuple[list[str], str | None]:
    """The files to download of a repository, and the GGUF file among them if that is the model."""
    texts = [name for name in names if name in _TEXT_FILES]
    if tokenizer_only and model.file is None and any(name in TOKENIZER_FILES for name in texts):
        return texts, None
    weights = [name for name in names if name.endswith(".safetensors") and "/" not in name]
    if SAFETENSORS_INDEX in names:
        shards = [name for name in weights if "-of-" in name and not name.startswith("consolidated")]
        weights = [SAFETENSORS_INDEX, *shards]
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
            raise not_here(model, settings, f"the hub cannot be reached ({_brief(error)})") from error
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

    if isinstance(error, (hf.LocalEntryNotFoundError, ConnectionError, TimeoutError)):
        return True
    libraries = {kind.__module__.partition(".")[0] for kind in type(error).__mro__}
    return not isinstance(error, hf.HfHubHTTPError) and not libraries.isdisjoint(
        ("httpx", "httpx2", "httpcore", "httpcore2", "requests", "urllib3")
    )


def _disk_full(error: BaseException) -> bool:
    full = (errno.ENOSPC, errno.EDQUOT)
    return getattr(error, "errno", None) in full or "No space left on device" in str(error)


def _drop_partial(repo: Path) -> None:
    for partial in (repo / "blobs").glob("*.incomplete"):
        partial.unlink(missing_ok=True)


def _brief(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
