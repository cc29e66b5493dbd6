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

from ruvllm_cli.plugins_command import print_plugins, selections
from ruvllm_core import __version__
from ruvllm_core.cli.app import App, pass_app
from ruvllm_core.cli.output import print_json, print_table
from ruvllm_core.errors import RuvLLMError
from ruvllm_core.machine import usable_cpus
from ruvllm_core.settings import ENV_PREFIX

_PACKAGES = (
    *("torch", "numpy", "tokenizers", "safetensors", "huggingface_hub", "jinja2", "pydantic", "pydantic-settings"),
    *("pluggy", "click", "rich", "structlog", "psutil"),
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
        "settings": _sources(app),
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


def _sources(app: App) -> list[dict[str, Any]]:
    """Every setting: name, value, and where it comes from (``flag``, ``environment``, the file, ``default``)."""
    variables = {name.upper() for name in os.environ}
    if variables & {name for name, *_ in app.registry.variables}:  # a variable of a plugin's own
        variables.add(ENV_PREFIX + "PLUGINS")
    rows = []
    for name, value in app.settings.model_dump(mode="json").items():
        own = (ENV_PREFIX + name).upper()
        if name in app.flags:
            source = "flag"
        elif any(variable == own or variable.startswith(own + "__") for variable in variables):
            source = "environment"
        else:
            source = str(app.config) if name in app.settings.model_fields_set else "default"
        rows.append({"name": name, "value": value, "source": source})
    return rows


def _cpu() -> dict[str, Any]:
    rows = (line.partition(":") for line in _read("/proc/cpuinfo").splitlines())
    facts = {key.strip().lower(): value.strip() for key, _, value in rows}
    flags = facts.get("flags", facts.get("features", "")).split()
    return {
        "model": facts.get("model name") or platform.processor() or platform.machine(),
        "features": [name for name in _CPU_FEATURES if name in flags],
        "logical_cores": os.cpu_count(),
        "usable_cores": usable_cpus(),
    }


def _memory() -> dict[str, int]:
    import psutil

    from ruvllm_core.machine import available_memory

    # What a control group leaves, where that is less.
    return {"total_bytes": psutil.virtual_memory().total, "available_bytes": available_memory()}


def _gpus() -> dict[str, Any]:
    try:
        import torch
    except Exception as error:
        return {"devices": [], "reason": f"torch cannot be imported: {type(error).__name__}: {error}"}
    cuda = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    devices: list[dict[str, Any]] = [
        {"device": f"cuda:{index}", "name": gpu.name, "memory_bytes": gpu.total_memory}
        for index, gpu in enumerate(cuda)
    ]
    if torch.backends.mps.is_available():
        devices.append({"device": "mps", "name": platform.processor()})
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
    machine = ("ruvllm", "python", "os", "cpu", "memory", "gpu", "packages", "cache_dir")
    print_table("This machine", ("what", "found"), [(name, _shown(report[name])) for name in machine])
    changed = [one for one in report["settings"] if one["source"] != "default"]
    print_table("Settings that are not defaults", ("name", "value", "from"), [list(one.values()) for one in changed])
    print_plugins(report)
    print_table("Problems", ("problem",), [[problem] for problem in report["problems"]] or [["none"]])


def _shown(value: Any) -> str:
    if isinstance(value, dict):
        parts = {k: f"{v / 2**30:.1f} GiB" if k.endswith("_bytes") and v else _shown(v) for k, v in value.items()}
        return ", ".join(f"{name.removesuffix('_bytes')}: {part}" for name, part in parts.items() if part)
    return " ".join(map(_shown, value)) if isinstance(value, list) else "" if value is None else str(value)
