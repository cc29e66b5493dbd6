"""``ruvllm doctor``: this machine, what is installed, and what would be selected here and why."""

from __future__ import annotations

import os
import platform
import shutil
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import click

from ruvllm_core import __version__
from ruvllm_core.cli.app import App, pass_app
from ruvllm_core.cli.output import print_json, print_table
from ruvllm_core.cli.plugins_command import print_plugins, selections
from ruvllm_core.errors import RuvLLMError

_PACKAGES = (
    "torch",
    "numpy",
    "tokenizers",
    "safetensors",
    "huggingface_hub",
    "jinja2",
    "pydantic",
    "pydantic-settings",
    "pluggy",
    "click",
    "rich",
    "structlog",
    "psutil",
)
# Instruction sets that kernels can make use of, as Linux spells them.
_CPU_FEATURES = (
    *("avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512_vnni", "avx512_bf16", "avx_vnni", "amx_int8", "amx_bf16"),
    *("asimd", "asimdhp", "asimddp", "i8mm", "bf16", "sve"),
)


@click.command("doctor")
@click.option("--no-gpu", is_flag=True, help="Do not look for GPUs, which takes importing torch.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@pass_app
def command(app: App, no_gpu: bool, as_json: bool) -> None:
    """Describe this machine and what would run on it.

    Exit code 1 if there is a problem that keeps models from running. Plugins are found and selected without importing
    torch; it is imported afterwards, to ask it for GPUs.
    """
    settings, registry = app.settings, app.registry
    report: dict[str, Any] = {
        "ruvllm": __version__,
        "python": {"version": platform.python_version(), "executable": sys.executable},
        "os": platform.platform(),
        "cpu": _cpu(),
        "memory": _memory(),
        "packages": {name: _version(name) for name in _PACKAGES},
        "cache_dir": _folder(settings.cache_dir),
        "settings": app.sources(),
        "plugins": registry.report(),
        "selected": selections(registry, settings),
    }
    problems = [str(one["error"]) for one in report["selected"].values() if one["error"]]
    problems += [f"package {name} is not installed" for name, found in report["packages"].items() if found is None]
    try:
        registry.check_settings()
    except RuvLLMError as error:
        problems.append(str(error))
    report["problems"] = problems
    report["gpu"] = None if no_gpu else _gpus()
    if as_json:
        print_json(report)
    else:
        _print(report)
    if problems:
        raise click.exceptions.Exit(1)


def _cpu() -> dict[str, Any]:
    import psutil

    lines = _read("/proc/cpuinfo").splitlines()
    facts = {
        key.strip().lower(): value.strip() for key, colon, value in (line.partition(":") for line in lines) if colon
    }
    flags = set(facts.get("flags", facts.get("features", "")).split())
    affinity = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "model": facts.get("model name") or platform.processor() or platform.machine(),
        "machine": platform.machine(),
        "features": [name for name in _CPU_FEATURES if name in flags],
        "logical_cores": os.cpu_count(),
        "physical_cores": psutil.cpu_count(logical=False),
        "usable_cores": affinity,
        "cgroup_limit": _cgroup_cores(),
    }


def _cgroup_cores() -> float | None:
    """Cores that the control group allows (version 2, then 1), None for no limit."""
    quota, _, period = _read("/sys/fs/cgroup/cpu.max").partition(" ")
    if not quota:
        quota, period = (_read(f"/sys/fs/cgroup/cpu/cpu.cfs_{name}_us") for name in ("quota", "period"))
    try:
        return float(quota) / float(period) if float(quota) > 0 else None
    except (ValueError, ZeroDivisionError):  # "max", or no control groups here
        return None


def _memory() -> dict[str, int | None]:
    import psutil

    memory = psutil.virtual_memory()
    files = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")
    limits = [int(text) for text in map(_read, files) if text.isdigit() and int(text) < memory.total]
    return {
        "total_bytes": memory.total,
        "available_bytes": memory.available,
        "cgroup_limit_bytes": min(limits, default=None),
    }


def _gpus() -> dict[str, Any]:
    try:
        import torch
    except Exception as error:
        return {"devices": [], "reason": f"torch cannot be imported: {type(error).__name__}: {error}"}
    devices = []
    for index in range(torch.cuda.device_count()):
        facts = torch.cuda.get_device_properties(index)
        devices.append({"device": f"cuda:{index}", "name": facts.name, "memory_bytes": facts.total_memory})
    if torch.backends.mps.is_available():
        devices.append({"device": "mps", "name": platform.processor() or "Apple GPU", "memory_bytes": None})
    return {"devices": devices, "reason": None if devices else f"torch {torch.__version__} sees none"}


def _folder(path: Path) -> dict[str, Any]:
    there = next(folder for folder in (path, *path.absolute().parents) if folder.is_dir())
    return {
        "path": str(path),
        "exists": path.is_dir(),
        "writable": os.access(there, os.W_OK),
        "free_bytes": shutil.disk_usage(there).free,
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _read(file: str) -> str:
    try:
        return Path(file).read_text().strip()
    except OSError:  # not this kind of system
        return ""


def _print(report: dict[str, Any]) -> None:
    cpu, memory, cache, gpu = (report[key] for key in ("cpu", "memory", "cache_dir", "gpu"))
    limit, cores = memory["cgroup_limit_bytes"], cpu["cgroup_limit"]
    if gpu is None:
        gpus = "not looked for"
    else:
        gpus = ", ".join(f"{one['device']} {one['name']}" for one in gpu["devices"]) or gpu["reason"]
    rows = [
        ("ruvllm", report["ruvllm"]),
        ("python", "{version} at {executable}".format(**report["python"])),
        ("system", report["os"]),
        ("cpu", f"{cpu['model']}: {' '.join(cpu['features']) or cpu['machine']}"),
        ("cores", f"{cpu['usable_cores']} usable of {cpu['logical_cores']}" + (f", cgroup {cores:g}" if cores else "")),
        ("memory", f"{_gib(memory['available_bytes'])} free of {_gib(limit or memory['total_bytes'])}"),
        ("gpu", gpus),
        ("packages", ", ".join(f"{name} {found or 'MISSING'}" for name, found in report["packages"].items())),
        (
            "models in",
            f"{cache['path']}, {_gib(cache['free_bytes'])} free" + ("" if cache["writable"] else ", READ-ONLY"),
        ),
    ]
    print_table("This machine", ("what", "found"), rows)
    changed = [one for one in report["settings"] if one["source"] != "default"]
    print_table("Settings that are not defaults", ("name", "value", "from"), [list(one.values()) for one in changed])
    print_plugins(report)
    print_table("Problems", ("problem",), [[problem] for problem in report["problems"]] or [["none"]])


def _gib(count: int) -> str:
    return f"{count / 2**30:.1f} GiB"
