"""``ruvllm list``: the models that are here."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from ruvllm_cli.store import ModelEntry


@click.command("list")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON array, an object for each model.")
@click.pass_obj
def command(context: Any, as_json: bool) -> None:
    """Models that are here, by the name that other commands know them by."""
    from ruvllm_cli.store import list_models

    entries = list_models(context.settings)
    if as_json:
        click.echo(json.dumps([as_object(entry) for entry in entries], indent=2))
        return
    if not entries:
        click.echo(f"no models in {context.settings.cache_dir}; get one with: ruvllm pull smollm2", err=True)
        return
    width = max(len(entry.name) for entry in entries)
    for entry in entries:
        line = f"{entry.name:{width}}  {describe_size(entry.bytes):>9}  {entry.format:11}  {entry.source:7}"
        click.echo(f"{line}  {(entry.revision or '')[:8]}".rstrip())


def describe_size(size: int) -> str:
    """`size` bytes in the unit that suits it, in powers of 1000."""
    value, unit = float(size), "B"
    for larger in ("kB", "MB", "GB", "TB"):
        if value < 999.5:
            break
        value, unit = value / 1000, larger
    return f"{size} B" if unit == "B" else f"{value:.1f} {unit}"


def as_object(entry: ModelEntry) -> dict[str, str | int | None]:
    """A model as JSON shows it."""
    return {**vars(entry), "path": str(entry.path)}
