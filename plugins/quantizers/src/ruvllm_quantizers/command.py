"""``ruvllm quantize``: write a model as a smaller GGUF file."""

from __future__ import annotations

import json
import time
from dataclasses import asdict
from pathlib import Path

import click

from ruvllm_core.cli.app import App, pass_app


@click.command("quantize")
@click.argument("source", metavar="SRC")
@click.argument("destination", metavar="DST", type=click.Path(path_type=Path, dir_okay=False))
@click.option("--scheme", required=True, metavar="NAME", help="A scheme or recipe, such as q4_k_m or q8_0.")
@click.option("--allow-requantize", is_flag=True, help="Encode anew what is quantized already, at a loss.")
@click.option("--force", is_flag=True, help="Replace DST if it exists.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout.")
@pass_app
def command(
    app: App, source: str, destination: Path, scheme: str, allow_requantize: bool, force: bool, as_json: bool
) -> None:
    """Write the model SRC as the GGUF file DST, quantized.

    SRC is a GGUF file, a folder with a Hugging Face model (config.json, tokenizer.json, safetensors), a hub id, or
    smollm2. DST appears only when it is complete.
    """
    from ruvllm_core.model.hub import resolve

    if destination.exists() and not destination.is_file():
        raise click.UsageError(f"{destination} is no file that could be replaced")
    if destination.exists() and not force:
        raise click.UsageError(f"{destination} exists; use --force to replace it")
    folder = destination.absolute().parent
    if not folder.is_dir():
        raise click.UsageError(f"there is no folder {folder}")
    quantizer = app.registry.load("quantizers", scheme)
    path = resolve(source, app.settings)
    if destination.exists() and destination.samefile(path):
        raise click.UsageError("SRC and DST are the same file")

    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn, TransferSpeedColumn

    from .convert import convert
    from .source import open_source

    started = time.perf_counter()
    opened = open_source(path, app.registry)
    console = Console(stderr=True)
    columns = (BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress("{task.description}", *columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task(f"{path.name} → {scheme}", total=None)
        report = convert(
            opened,
            destination,
            quantizer,
            requantize=allow_requantize,
            progress=lambda done, total: bar.update(task, completed=done, total=total),
        )
    seconds = time.perf_counter() - started
    if as_json:
        summary = {"source": str(path), "destination": str(destination), "scheme": scheme}
        click.echo(json.dumps({**summary, **asdict(report), "seconds": round(seconds, 3)}))
        return
    counts = ", ".join(f"{count} {name}" for name, count in sorted(report.schemes.items()))
    click.echo(
        f"{destination}: {report.file_bytes / 1e6:.1f} MB, {report.bits_per_weight:.2f} bits a weight ({counts}), "
        f"{seconds:.1f} s"
    )
