"""Downloads from the Hugging Face hub: the files a model needs and no others, and what can go wrong on the way."""

from __future__ import annotations

import errno
import os
import re
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ruvllm_core.errors import ModelError, ModelNotFound
from ruvllm_core.log import get_logger
from ruvllm_core.model.hub import hub_dir, not_here, repo_dir, snapshot_folder
from ruvllm_core.model.ref import PICKLES, ModelRef, choose_gguf
from ruvllm_core.model.safetensors import INDEX_FILE, SINGLE_FILE
from ruvllm_core.settings import Settings

log = get_logger("download")
#: huggingface_hub goes on by itself after some failures, not after all (a reset connection is one).
_ATTEMPTS = 3
_MORE_SPACE = "delete models with ruvllm rm, or name another place with RUVLLM_CACHE_DIR"
# What `hf_tokenizer` and the families read, and what a missing tokenizer.json can be made of.
_TEXT_FILES = r"(config|generation_config|tokenizer_config|special_tokens_map)\.json|tokenizer\..+|chat_template\.jinja"


def download_model(model: ModelRef, settings: Settings, *, progress: bool = True, tokenizer_only: bool = False) -> Path:
    """Bring a hub model into the cache folder, as it is on the hub now: its GGUF file, or its folder.

    Files that are here already are not downloaded again. Until all are here, the revision's name stays with the commit
    it had. A failure leaves whole files only, or nothing. Raises `ModelNotFound` or `ModelError`.
    """
    from huggingface_hub import HfApi, hf_hub_download, utils

    bars: Any = utils  # it does not say that it exports their switches
    assert model.repo is not None
    endpoint, folder = os.environ.get("HF_ENDPOINT") or None, hub_dir(settings)
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
    silence = not progress and not bars.are_progress_bars_disabled()
    try:
        if silence:
            bars.disable_progress_bars()
        with _explained(model, settings):
            # One after the other in this thread: huggingface_hub's parallel downloads do not stop at Ctrl-C. The last
            # step has nothing left to download and lets the revision name the commit.
            for name, revision in [*((name, commit) for name in files), (files[0], model.revision)]:
                for attempt in range(1, _ATTEMPTS + 1):
                    try:
                        hf_hub_download(model.repo, name, revision=revision, cache_dir=folder, endpoint=endpoint)
                        break
                    except Exception as error:
                        if attempt == _ATTEMPTS or not _is_network(error):
                            raise
                        log.warning("connection lost, trying again", file=name, error=str(error))
                        time.sleep(1)
    finally:
        if silence:
            bars.enable_progress_bars()
        if not any(path.is_file() for part in ("blobs", "snapshots") for path in (repo / part).rglob("*")):
            shutil.rmtree(repo, ignore_errors=True)
    if snapshot_folder(model, settings) != snapshot:
        raise ModelError(f"{model.text} changed on the hub while it was downloaded", hint="try again")
    return snapshot / gguf if gguf is not None else snapshot


def _wanted(
    names: Sequence[str], model: ModelRef, settings: Settings, tokenizer_only: bool
) -> tuple[list[str], str | None]:
    """The files to download of a repository, and the GGUF file among them if that is the model."""
    texts = [name for name in names if re.fullmatch(_TEXT_FILES, name)]
    if tokenizer_only and model.file is None and any(name.startswith("tokenizer.") for name in texts):
        return texts, None
    shards = [name for name in names if re.fullmatch(r"(?!consolidated)[^/]*-of-[^/]*\.safetensors", name)]
    weights = [INDEX_FILE, *shards] if INDEX_FILE in names else [name for name in names if name == SINGLE_FILE]
    if model.file is None and "config.json" in texts and weights:
        return texts + weights, None
    gguf = choose_gguf(names, model.file, settings.quantization, model.text)
    if gguf is not None:
        return [gguf], gguf
    lacks = f"{model.text} has no GGUF file and no safetensors weights with a config.json"
    if any(name.endswith(PICKLES) for name in names):
        lacks += " but pickled ones, which can run code when they are read"
    raise ModelError(lacks, hint="it has: " + ", ".join(names[:8]) if names else "it is empty")


def _check_space(needed: int, model: ModelRef, settings: Settings) -> None:
    cache = settings.cache_dir
    free = shutil.disk_usage(next(folder for folder in (cache, *cache.parents) if folder.exists())).free
    if needed > free:
        there = f"{cache} has {free / 1e6:,.0f} MB free; nothing was downloaded"
        raise ModelError(f"no space for {model.text}: it needs {needed / 1e6:,.0f} MB, and {there}", hint=_MORE_SPACE)


@contextmanager
def _explained(model: ModelRef, settings: Settings) -> Iterator[None]:
    """Turn what huggingface_hub raises into `ModelNotFound` or `ModelError`; whatever it does not mean passes."""
    from huggingface_hub import errors as hf

    assert model.repo is not None
    name, repo = model.text, model.repo
    login = "log in with `hf auth login`, or put a token into HF_TOKEN"
    ask, check = f"ask for access at https://huggingface.co/{repo}, then {login}", f"check the name; else {login}"
    answers: dict[type[Exception], tuple[str, str | None]] = {
        hf.GatedRepoError: (f"{repo} is gated: its owner grants access by account", ask),
        hf.RevisionNotFoundError: (f"{repo} has no revision {model.revision}", None),
        hf.RepositoryNotFoundError: (f"there is no repository {repo} on the hub, or it is private", check),
        hf.HFValidationError: (f"{name} is no hub id that the hub allows", None),
    }
    try:
        yield
    except Exception as error:
        for kind, (message, hint) in answers.items():
            if isinstance(error, kind):
                raise ModelNotFound(message, hint=hint) from error
        why = (str(error).strip() or type(error).__name__).splitlines()[0]
        full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT)
        if full or "No space left on device" in str(error):
            for partial in (repo_dir(repo, settings) / "blobs").glob("*.incomplete"):
                partial.unlink(missing_ok=True)
            kept = "files that were whole are kept, the partial one is deleted"
            raise ModelError(
                f"the disk is full: {name} could not be stored in {hub_dir(settings)}; {kept}", hint=_MORE_SPACE
            ) from None
        if _is_network(error):
            raise not_here(model, settings, f"the hub cannot be reached ({why})") from error
        if isinstance(error, hf.HfHubHTTPError):
            status = getattr(getattr(error, "response", None), "status_code", None)
            hint = login if status in (401, 403) else "try again later"
            raise ModelNotFound(f"the hub answered {status} for {name}: {why}", hint=hint) from error
        if isinstance(error, OSError):
            raise ModelError(f"cannot download {name}: {why}", hint="try again") from error
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
