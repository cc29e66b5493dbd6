"""``ruvllm pull``: download a model, or bring it up to date."""

from __future__ import annotations

import json
from typing import Any

import click


@click.command("pull")
@click.argument("model")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object: name, path, bytes, format.")
@click.pass_obj
def command(context: Any, model: str, as_json: bool) -> None:
    """Download MODEL, or bring it up to date.

    MODEL is a hub id (org/name[@revision][:file.gguf]) or smollm2.
    """
    from ruvllm_cli.list_command import describe_size
    from ruvllm_core.model.hub import resolve

    path = resolve(model, context.settings, refresh=True)
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    size = sum(file.stat().st_size for file in files)
    if as_json:
        kind = "gguf" if path.is_file() else "safetensors"
        click.echo(json.dumps({"name": model, "path": str(path), "bytes": size, "format": kind}))
    else:
        click.echo(f"{model}: {describe_size(size)} in {path}")
