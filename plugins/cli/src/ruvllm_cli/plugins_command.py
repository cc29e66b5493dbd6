"""``ruvllm plugins``: what is installed, whether it works, and what would be selected here."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from ruvllm_core.cli.app import App, pass_app
from ruvllm_core.cli.output import print_json, print_table
from ruvllm_core.errors import RuvLLMError
from ruvllm_core.machine import kernels_device

if TYPE_CHECKING:
    from ruvllm_core.registry import Registry
    from ruvllm_core.settings import Settings


@click.command("plugins")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@pass_app
def command(app: App, as_json: bool) -> None:
    """List what every installed plugin offers, and what would be selected on this machine."""
    registry = app.registry
    report = {"plugins": registry.report(), "selected": selections(registry, app.settings)}
    if as_json:
        print_json(report)
    else:
        print_plugins(report)


def selections(registry: Registry, settings: Settings) -> dict[str, dict[str, Any]]:
    """For each thing that settings select: the names that win, and why the others lose or nothing can run.

    Imports no implementation; whether one loads is found out when it is used.
    """
    wanted: dict[str, list[str] | str] = {
        "backends": [settings.backend],
        "kernels": settings.kernels,
        "cache_policies": [settings.cache.policy],
        "learning_loops": settings.learning,
    }
    device = kernels_device(settings.kernels, settings.device)
    return {kind: _select(registry, kind, names, device) for kind, names in wanted.items()}


def _select(registry: Registry, kind: str, wanted: list[str] | str, device: str) -> dict[str, Any]:
    entries = registry.entries(kind)
    names = [entry.name for entry in entries] if wanted == "auto" else wanted
    several = kind == "learning_loops"  # all that can run; everywhere else the first is taken
    lost = {entry.name: "not asked for" for entry in entries if entry.name not in names}
    selected: list[str] = []
    error = None
    try:
        for name in names:
            if selected and not several:
                lost[name] = f"{selected[0]} comes first"
            elif reason := registry.entry(kind, name).reason(device):
                lost[name] = reason
            else:
                selected.append(name)
    except RuvLLMError as problem:
        error = str(problem)
    unable = "; ".join(f"{name}: {lost[name]}" for name in names if name in lost)
    failed = (unable and wanted != "auto") if several else not selected
    if failed and error is None:
        error = f"{kind}: nothing can run here ({unable or 'none is installed'})"
    return {"selected": selected, "lost": [{"name": n, "reason": r} for n, r in lost.items()], "error": error}


def print_plugins(report: dict[str, Any]) -> None:
    """The tables of ``ruvllm plugins`` and ``ruvllm doctor``."""
    columns = ("kind", "name", "status", "distribution", "version", "reason", "summary")
    print_table("Plugins", columns, [[row[column] or "" for column in columns] for row in report["plugins"]])
    rows = []
    for kind, one in report["selected"].items():
        rivals = "; ".join(f"{lost['name']}: {lost['reason']}" for lost in one["lost"])
        rows.append([kind, ", ".join(one["selected"]) or "none", one["error"] or rivals])
    print_table("Selected here", ("kind", "selected", "why not the others"), rows)
