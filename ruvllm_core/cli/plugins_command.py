"""``ruvllm plugins``: what is installed, whether it works, and what would be selected here."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from ruvllm_core.cli.app import App, pass_app
from ruvllm_core.cli.output import print_json, print_table
from ruvllm_core.errors import RuvLLMError

if TYPE_CHECKING:
    from ruvllm_core.registry import Registry
    from ruvllm_core.settings import Settings


@click.command("plugins")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@pass_app
def command(app: App, as_json: bool) -> None:
    """List what every installed plugin offers, and what would be selected on this machine."""
    registry = app.discover()
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
    }
    found = {kind: _select(registry, kind, preference) for kind, preference in wanted.items()}
    loops = settings.learning
    names = [entry.name for entry in registry.entries("learning_loops")] if loops == "auto" else loops
    each = [_select(registry, "learning_loops", [name]) for name in dict.fromkeys(names)]
    found["learning_loops"] = {
        "selected": [name for one in each for name in one["selected"]],
        "lost": [lost for one in each for lost in one["lost"]],
        "error": next((one["error"] for one in each if one["error"] and loops != "auto"), None),
    }
    return found


def _select(registry: Registry, kind: str, preference: list[str] | str) -> dict[str, Any]:
    try:
        chosen = registry.select(kind, preference)
    except RuvLLMError as error:
        lost = [(entry.name, entry.reason()) for entry in registry.entries(kind) if preference == [entry.name]]
        return {"selected": [], "lost": [{"name": n, "reason": r} for n, r in lost if r], "error": str(error)}
    lost = [*chosen.lost]
    if preference != "auto":
        lost += [(e.name, "not asked for") for e in registry.entries(kind) if e.name not in preference]
    return {"selected": [chosen.entry.name], "lost": [{"name": n, "reason": r} for n, r in lost], "error": None}


def print_plugins(report: dict[str, Any]) -> None:
    """The tables of ``ruvllm plugins`` and ``ruvllm doctor``."""
    columns = ("kind", "name", "status", "distribution", "version", "reason", "summary")
    kept = [row for row in report["plugins"] if row["kind"] != "commands" or row["distribution"] != "ruvllm-core"]
    print_table("Plugins", columns, [[row[column] or "" for column in columns] for row in kept])
    rows = []
    for kind, one in report["selected"].items():
        rivals = "; ".join(f"{lost['name']}: {lost['reason']}" for lost in one["lost"])
        rows.append([kind, ", ".join(one["selected"]) or "none", one["error"] or rivals])
    print_table("Selected here", ("kind", "selected", "why not the others"), rows)
