"""``ruvllm quantize``: write a model as a smaller GGUF file."""

from __future__ import annotations

import json
import time
from dataclasses import asdict
from pathlib import Path

import click

from ruvllm_core.errors import ModelNotFound
from ruvllm_core.registry import Registry
from ruvllm_core.settings import Settings, load_settings

from .source import Source, gguf_source


@click.command("quantize")
@click.argument("source", metavar="SRC", type=click.Path(path_type=Path))
@click.argument("destination", metavar="DST", type=click.Path(path_type=Path, dir_okay=False))
@click.option("--scheme", required=True, metavar="NAME", help="A scheme or recipe, such as q4_k_m or q8_0.")
@click.option("--allow-requantize", is_flag=True, help="Encode anew what is quantized already, at a loss.")
@click.option("--force", is_flag=True, help="Replace DST if it exists.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout.")
@click.pass_context
def command(
    context: click.Context,
    source: Path,
    destination: Path,
    scheme: str,
    allow_requantize: bool,
    force: bool,
    as_json: bool,
) -> None:
    """Write the model SRC as the GGUF file DST, quantized.

    SRC is a GGUF file, or a folder with a Hugging Face model (config.json, tokenizer.json, safetensors). DST appears
    only when it is complete.
    """
    from .convert import convert

    if destination.exists():
        if source.exists() and destination.samefile(source):
            raise click.UsageError("SRC and DST are the same file")
        if not force:
            raise click.UsageError(f"{destination} exists; use --force to replace it")
    if not destination.absolute().parent.is_dir():
        raise click.UsageError(f"there is no folder {destination.absolute().parent}")
    settings = context.find_object(Settings) or load_settings()
    quantizer = Registry.discover(settings).load("quantizers", scheme)
    started = time.perf_counter()
    opened = _open(source)
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn, TransferSpeedColumn

    columns = (BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress("{task.description}", *columns, console=Console(stderr=True), transient=as_json) as bar:
        task = bar.add_task(f"{source.name} → {scheme}", total=None)
        report = convert(
            opened,
            destination,
            quantizer,
            requantize=allow_requantize,
            progress=lambda done, total: bar.update(task, completed=done, total=total),
        )
    seconds = time.perf_counter() - started
    if as_json:
        summary = {"source": str(source), "destination": str(destination), "scheme": scheme}
        click.echo(json.dumps({**summary, **asdict(report), "seconds": round(seconds, 3)}))
        return
    counts = ", ".join(f"{count} {name}" for name, count in sorted(report.schemes.items()))
    click.echo(
        f"{destination}: {report.file_bytes / 1e6:.1f} MB, {report.bits_per_weight:.2f} bits a weight ({counts}), "
        f"{seconds:.1f} s"
    )


def _open(path: Path) -> Source:
    if not path.exists():
        raise ModelNotFound(f"no such file or folder: {path}", hint="check the path for typing errors")
    return gguf_source(path)
