"""``ruvllm rm``: delete what was downloaded of a model."""

from __future__ import annotations

import json
from typing import Any

import click


@click.command("rm")
@click.argument("model")
@click.option("--yes", "-y", is_flag=True, help="Do not ask.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object: removed, freed_bytes.")
@click.pass_obj
def command(context: Any, model: str, yes: bool, as_json: bool) -> None:
    """Delete what was downloaded of MODEL: a repository, one revision of it, or one GGUF file.

    Files and folders of yours are never deleted.
    """
    from ruvllm_cli.list_command import as_object, describe_size
    from ruvllm_cli.store import find_models, remove_model

    if not yes:
        for entry in find_models(model, context.settings):
            click.echo(f"{entry.name}  {describe_size(entry.bytes)}  {entry.path}", err=True)
        click.confirm("delete?", abort=True, err=True)
    removed, freed = remove_model(model, context.settings)
    if as_json:
        click.echo(json.dumps({"removed": [as_object(entry) for entry in removed], "freed_bytes": freed}))
    else:
        click.echo(f"deleted {', '.join(entry.name for entry in removed)} ({describe_size(freed)})")
