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
    return {**found, "learning_loops": _select_all(registry, "learning_loops", settings.learning)}


def _select(registry: Registry, kind: str, preference: list[str] | str) -> dict[str, Any]:
    """The first of `preference` that can run."""
    others = [
        (e.name, "not asked for") for e in registry.entries(kind) if preference != "auto" and e.name not in preference
    ]
    try:
        chosen = registry.select(kind, preference)
    except RuvLLMError as error:
        return _found([], others, str(error))
    return _found([chosen.entry.name], chosen.lost + others)


def _select_all(registry: Registry, kind: str, names: list[str] | str) -> dict[str, Any]:
    """All of `names`, where ``auto`` is whatever can run."""
    selected, lost = [], []
    for entry in registry.entries(kind):
        reason = "not asked for" if names != "auto" and entry.name not in names else entry.reason()
        if reason:
            lost.append((entry.name, reason))
        else:
            selected.append(entry.name)
    try:
        for name in names if names != "auto" else []:
            registry.select(kind, [name])
    except RuvLLMError as error:
        return _found(selected, lost, str(error))
    return _found(selected, lost)


def _found(selected: list[str], lost: list[tuple[str, str]], error: str | None = None) -> dict[str, Any]:
    return {"selected": selected, "lost": [{"name": name, "reason": why} for name, why in lost], "error": error}


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
