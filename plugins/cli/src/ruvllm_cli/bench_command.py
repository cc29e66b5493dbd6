"""``ruvllm bench``: measure speed and memory."""

from __future__ import annotations

import os
import sys
from contextlib import closing

import click

from ruvllm_cli.options import model_options
from ruvllm_core.cli.app import App, pass_app
from ruvllm_core.cli.output import print_json, print_table


@click.group("bench")
def command() -> None:
    """Measure speed and memory; each benchmark prints a table and one JSON line."""


@command.command("e2e")
@click.argument("model")
@click.option("--prefill", type=click.IntRange(1), default=128, show_default=True, help="Prompt tokens.")
@click.option("--decode", type=click.IntRange(1), default=32, show_default=True, help="Generated tokens.")
@click.option("--depth", type=click.IntRange(0), default=0, show_default=True, help="Tokens in the cache before.")
@click.option("--sequences", type=click.IntRange(1), default=1, show_default=True, help="Side by side.")
@click.option("--repeats", type=click.IntRange(1), default=3, show_default=True, help="Medians of as many runs.")
@model_options
@click.option("--json", "as_json", is_flag=True, help="Print the JSON line only.")
@pass_app
def end_to_end(
    app: App, model: str, prefill: int, decode: int, depth: int, sequences: int, repeats: int, as_json: bool
) -> None:
    """Measure the whole of MODEL: loading it, reading a prompt, and generating.

    Token ids are arbitrary and the likeliest token is taken, so that sampling and text take no time. Speeds are in
    tokens a second over all sequences; peak_rss_mb is in MiB and counts the mapped model file.
    """
    from ruvllm_cli.bench import Workload, measure, peak_rss_mb

    work = Workload(prefill, decode, depth, sequences, repeats)
    app.set("model", model)
    if app.settings.max_context is None:
        app.set("max_context", work.capacity)
    from ruvllm_core.generate.load import load_parts

    settings = app.settings
    parts = load_parts(settings, app.registry)
    with closing(parts.model), closing(parts.decoder), closing(parts.backend):
        result = {
            **vars(parts.info),
            "path": str(parts.info.path),
            "threads": settings.threads or _threads(),
            **vars(work),
            **measure(parts, work, settings.prefill_chunk),
            "peak_rss_mb": peak_rss_mb(),
        }
    if not as_json:
        print_table("bench e2e", ("what", "value"), [(key, _shown(value)) for key, value in result.items()])
    print_json({"benchmark": "e2e", **result})


def _threads() -> int | None:
    """Threads of PyTorch where it does the work; a decoder that needs none of it follows the machine."""
    torch = sys.modules.get("torch")
    return torch.get_num_threads() if torch else os.cpu_count()


def _shown(value: object) -> str:
    return f"{value:.2f}" if isinstance(value, float) else str(value)
