"""Finds and loads the compiled library."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import importlib.metadata
import sys
from pathlib import Path
from types import ModuleType

import ruvllm_kernels_cpu
from ruvllm_core.errors import ConfigError, PluginError
from ruvllm_kernels_cpu import abi

DISTRIBUTION = "ruvllm-kernels-cpu"
ISAS = ("auto", "generic", "avx2", "avx512")
NAME = "libruvllm_cpu.dylib" if sys.platform == "darwin" else "libruvllm_cpu.so"


def locate(package: ModuleType, distribution: str, name: str) -> Path | None:
    """The library of a package; of an editable install it is in site-packages while the sources are elsewhere."""
    folders = [Path(folder) for folder in package.__path__]
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        folders.append(Path(str(importlib.metadata.distribution(distribution).locate_file(package.__name__))))
    return next((folder / name for folder in folders if (folder / name).is_file()), None)


def find() -> Path | None:
    """Our own compiled library."""
    return locate(ruvllm_kernels_cpu, DISTRIBUTION, NAME)


def missing() -> str | None:
    """Why there is no library to load, or None."""
    if sys.byteorder != "little":
        return "needs a little-endian processor"
    if find() is None:
        return f"{NAME} is not built: install the package {DISTRIBUTION} with pip, which needs a C++ compiler"
    return None


@functools.cache
def load() -> ctypes.CDLL:
    """The library, its functions declared. Raises `PluginError` if it is not there or of another version."""
    reason, path = missing(), find()
    if reason or path is None:
        raise PluginError(f"kernels cpu: {reason}")
    try:
        library = ctypes.CDLL(str(path))
        abi.declare(library)
    except (OSError, AttributeError) as error:
        raise PluginError(f"{path}: {error}", hint=f"reinstall {DISTRIBUTION}") from error
    if (version := library.rv_abi_version()) != abi.VERSION:
        raise PluginError(
            f"{path} has interface {version}, the Python code {abi.VERSION}", hint=f"reinstall {DISTRIBUTION}"
        )
    return library


def kernels(isa: str) -> ctypes.c_void_p:
    """The table of kernels that `isa` (one of `ISAS`) selects. Raises `ConfigError` if the processor lacks it."""
    if isa.startswith("neon"):
        raise ConfigError(f"isa {isa}: kernels cpu have no NEON code", hint="use kernels neon, of ruvllm-kernels-neon")
    if isa not in ISAS:
        raise ConfigError(f"isa {isa!r} is none of {', '.join(ISAS)}")
    found = load().rv_kernels(isa.encode())
    if found is None:
        raise ConfigError(f"isa {isa}: this processor has not got it", hint="use isa auto")
    return ctypes.c_void_p(found)


def name(table: ctypes.c_void_p) -> str:
    """What a table of kernels calls itself."""
    return str(load().rv_kernels_name(table).decode())
