"""Finds and loads the compiled library, which exists on ARM64 only."""

from __future__ import annotations

import ctypes
import functools
import platform
import sys
from pathlib import Path

import ruvllm_kernels_cpu.library as cpu
import ruvllm_kernels_neon
from ruvllm_core.errors import ConfigError, PluginError

DISTRIBUTION = "ruvllm-kernels-neon"
NAME = "libruvllm_neon.dylib" if sys.platform == "darwin" else "libruvllm_neon.so"
MACHINES = ("aarch64", "arm64")
#: What ``isa`` may be: the best that the processor has, or a level in the order of the C interface.
LEVELS = {"auto": -1, "neon": 0, "neon-dotprod": 1, "neon-i8mm": 2}


def find() -> Path | None:
    """The compiled library."""
    return cpu.locate(ruvllm_kernels_neon, DISTRIBUTION, NAME)


def missing() -> str | None:
    """Why the kernels cannot run here, or None."""
    if (machine := platform.machine().lower()) not in MACHINES:
        return f"needs an ARM64 processor, this one is {machine or 'unknown'}"
    if reason := cpu.missing():
        return reason
    if find() is None:
        return f"{NAME} is not built: install the package {DISTRIBUTION} with pip, which needs a C++ compiler"
    return None


@functools.cache
def load() -> ctypes.CDLL:
    """The library, its functions declared. Raises `PluginError` if it cannot run here or is of another version."""
    reason, path = missing(), find()
    if reason or path is None:
        raise PluginError(f"kernels neon: {reason}")
    try:
        library = ctypes.CDLL(str(path))
        for name, result, arguments in (
            ("rvneon_abi_version", ctypes.c_int32, []),
            ("rvneon_kernels", ctypes.c_void_p, [ctypes.c_void_p, ctypes.c_int32]),
            ("rvneon_attention", ctypes.c_int32, [ctypes.c_void_p]),
        ):
            function = getattr(library, name)
            function.restype, function.argtypes = result, arguments
    except (OSError, AttributeError) as error:
        raise PluginError(f"{path}: {error}", hint=f"reinstall {DISTRIBUTION}") from error
    if (built := library.rvneon_abi_version()) != (needed := cpu.load().rv_abi_version()):
        raise PluginError(
            f"{path} was built for interface {built} of {cpu.DISTRIBUTION}, which has {needed}",
            hint=f"reinstall {DISTRIBUTION}",
        )
    return library


def kernels(isa: str) -> ctypes.c_void_p:
    """The table of kernels that `isa` (a key of `LEVELS`) selects. Raises `ConfigError` if the processor lacks it."""
    if isa not in LEVELS:
        raise ConfigError(f"isa {isa!r} is none of {', '.join(LEVELS)}")
    found = load().rvneon_kernels(cpu.kernels("generic"), LEVELS[isa])
    if found is None:
        raise ConfigError(f"isa {isa}: this processor has not got it", hint="use isa auto")
    return ctypes.c_void_p(found)
