"""``ruvllm bench``: measure speed and memory."""

from __future__ import annotations

import os
import sys
from contextlib import closing
from pathlib import Path
from typing import Any

import click

from ruvllm_cli.options import model_options
from ruvllm_core.cli.app import App, pass_app, setting
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
@click.option("--adapter-rank", type=click.IntRange(0), default=0, show_default=True, help="Measure what one costs.")
@click.option("--first-token", "start", is_flag=True, help="Time also `ruvllm run`, from its start to its first token.")
@model_options
@click.option("--json", "as_json", is_flag=True, help="Print the JSON line only.")
@pass_app
def end_to_end(app: App, /, model: str, start: bool, as_json: bool, **sizes: int) -> None:
    """Measure the whole of MODEL: loading it, reading a prompt, and generating.

    Token ids are arbitrary and the likeliest token is taken, so that sampling and text take no time. Speeds are in
    tokens a second over all sequences; peak_rss_mb is in MiB and counts the mapped model file; kv_bytes is what keys
    and values of the whole context take. With --adapter-rank every run is repeated with a random low-rank adapter at
    every linear matrix, and adapter_*_cost says how much longer that takes, as a share.
    """
    from ruvllm_cli.bench import Workload, measure, peak_rss_mb

    work = Workload(**sizes)
    app.set("model", model)
    started = _first_token(app, model, work.repeats) if start else {}
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
            **started,
        }
    if not as_json:
        print_table("bench e2e", ("what", "value"), [(key, _shown(value)) for key, value in result.items()])
    print_json({"benchmark": "e2e", **result})


@command.command("attention")
@click.option("--shape", "shapes", multiple=True, metavar="NAME", help="Heads of a model; may be repeated.")
@click.option("--prompt", "prompts", multiple=True, type=click.IntRange(1), help="Queries; may be repeated.")
@click.option("--depth", "depths", multiple=True, type=click.IntRange(0), help="Tokens before; may be repeated.")
@click.option("--kv", type=click.Choice(("f32", "f16", "bf16")), default="f32", show_default=True, help="Of the cache.")
@click.option("--repeats", type=click.IntRange(1), default=3, show_default=True, help="Medians of as many runs.")
@setting(
    "kernels", "--kernels", metavar="NAMES", help="Kernel providers, measured in turn; auto is the first that can run."
)
@setting("threads", "--threads", type=int, help="CPU threads; 0 follows the machine.")
@setting("device", "--device", help="auto, cpu, cuda, cuda:N or mps.")
@setting("dtype", "--dtype", help="Of queries: auto (float32), float32, bfloat16 or float16.")
@click.option("--json", "as_json", is_flag=True, help="Print the JSON line only.")
@pass_app
def attention(
    app: App, /, shapes: tuple[str, ...], prompts: tuple[int, ...], depths: tuple[int, ...], as_json: bool, **more: Any
) -> None:
    """Measure attention alone: the operation of a kernel provider, on random queries, keys and values.

    Without --shape all head shapes are measured: smollm2-135m, qwen2.5-0.5b, qwen2.5-1.5b, qwen2.5-7b, llama-3-8b,
    mistral-7b and phi-3-mini; without --prompt 1 and 256 queries, and without --depth 0 and 2048 tokens before them.
    Two products a query and key are counted for gflop_s; kv_gb_s is the speed at which keys and values are read once.
    A provider without an attention operation of its own is an error.
    """
    from ruvllm_cli.bench_attention import SHAPES, measure, open_side
    from ruvllm_core.protocols import DecoderOptions

    settings = app.settings
    usable = [entry.name for entry in app.registry.entries("kernels") if not entry.reason(settings.device)]
    names = usable[:1] if settings.kernels == "auto" else settings.kernels
    options = DecoderOptions(settings.dtype, settings.device, settings.metal_device, settings.threads)
    sides = [open_side(name, app.registry, options) for name in names]
    import torch

    if settings.threads:
        torch.set_num_threads(settings.threads)
    scheme = {"bfloat16": "bf16", "float16": "f16"}.get(settings.dtype, "f32")
    rows = list(measure(sides, shapes or tuple(SHAPES), prompts or (1, 256), depths or (0, 2048), dtype=scheme, **more))
    operations = {side.kernels: f"{side.name} on {side.device}" for side in sides}
    threads = settings.threads or torch.get_num_threads()
    if not as_json:
        title = "bench attention: " + ", ".join(f"{name} is {op}" for name, op in operations.items())
        print_table(title, list(rows[0]), [[_shown(value) for value in row.values()] for row in rows])
    head = {"operations": operations, "threads": threads, "dtype": scheme, **more}
    print_json({"benchmark": "attention", **head, "results": rows})


@command.command("kv")
@click.argument("model")
@click.option(
    "--policy",
    "policies",
    multiple=True,
    metavar="NAME[,SETTING=VALUE…]",
    help="A cache policy, with settings of its plugin; may be repeated. Without it, all that are installed.",
)
@click.option("--depth", "depths", multiple=True, type=click.IntRange(1), help="Tokens in the cache; may be repeated.")
@click.option("--decode", type=click.IntRange(1), default=16, show_default=True, help="Generated tokens.")
@click.option("--repeats", type=click.IntRange(1), default=3, show_default=True, help="Medians of as many runs.")
@click.option("--output", "-o", type=click.Path(path_type=Path), help="Write OUTPUT.png and OUTPUT.json.")
@model_options
@click.option("--json", "as_json", is_flag=True, help="Print the JSON line only.")
@pass_app
def kv(
    app: App,
    /,
    model: str,
    policies: tuple[str, ...],
    depths: tuple[int, ...],
    output: Path | None,
    as_json: bool,
    **sizes: int,
) -> None:
    """Measure memory and speed of cache policies with MODEL, as a sequence grows.

    Each policy holds one sequence of arbitrary tokens, which grows to each --depth (512, 2048 and 4096 if the model
    allows it); there, single tokens are generated and timed, the policies in turn. kv_mb is what keys and values in use
    take, in MiB. The picture needs matplotlib (pip install 'ruvllm-cli[plot]').
    """
    from ruvllm_cli import bench_kv
    from ruvllm_core.generate.load import load_parts

    if output is not None:
        bench_kv.check_plot()
    cases = [bench_kv.Case.parse(text) for text in policies or [e.name for e in app.registry.entries("cache_policies")]]
    for case in cases:
        app.registry.entry("cache_policies", case.policy)  # a misspelt one is found before gigabytes are read
    app.set("model", model)
    if depths and app.settings.max_context is None:
        app.set("max_context", max(depths) + sizes["decode"])
    settings = app.settings
    parts = load_parts(settings, app.registry)
    with closing(parts.model), closing(parts.decoder), closing(parts.backend):
        room = parts.info.max_context - sizes["decode"]
        depths = depths or tuple(depth for depth in (512, 2048, 4096) if depth <= room) or (max(room, 1),)
        rows = list(bench_kv.measure(parts, settings, app.registry, cases, depths, **sizes))
    about = {"model": parts.info.model, "scheme": parts.info.scheme, "kernels": parts.info.kernels, **sizes}
    result = {"benchmark": "kv", **about, "threads": settings.threads or _threads(), "results": rows}
    if not as_json:
        shown = [[_shown(value) for name, value in row.items() if not name.endswith("_runs")] for row in rows]
        print_table("bench kv", [name for name in rows[0] if not name.endswith("_runs")], shown)
    print_json(result)
    if output is not None:
        files = bench_kv.write(result, f"{parts.info.model}, {parts.info.scheme}, kernels {parts.info.kernels}", output)
        click.echo(f"written: {files[0]}, {files[1]}", err=True)


@command.command("lora")
@click.argument("model")
@click.option("--rank", type=click.IntRange(1), default=1, show_default=True, help="At every matrix of the layers.")
@click.option("--final-rank", type=click.IntRange(1), default=2, show_default=True, help="At the final site.")
@click.option("--prefill", type=click.IntRange(1), default=128, show_default=True, help="Prompt tokens.")
@click.option("--decode", type=click.IntRange(1), default=16, show_default=True, help="Generated tokens.")
@click.option("--repeats", type=click.IntRange(1), default=9, show_default=True, help="Medians of as many runs.")
@model_options
@click.option("--json", "as_json", is_flag=True, help="Print the JSON line only.")
@pass_app
def lora(app: App, /, model: str, rank: int, final_rank: int, as_json: bool, **sizes: int) -> None:
    """Measure what low-rank adapters cost MODEL: in its layers, at the final site, and at both.

    Adapters are random. Each run with one stands between two without; prefill_cost and decode_cost are how much longer
    it takes than those, as a share (in the table, in percent).
    """
    from ruvllm_cli import bench_lora
    from ruvllm_cli.bench import Workload
    from ruvllm_core.generate.load import load_parts

    work = Workload(**sizes)
    app.set("model", model)
    if app.settings.max_context is None:
        app.set("max_context", work.capacity)
    settings = app.settings
    parts = load_parts(settings, app.registry)
    with closing(parts.model), closing(parts.decoder), closing(parts.backend):
        rows = list(bench_lora.measure(parts, work, bench_lora.Ranks(rank, final_rank), settings.prefill_chunk))
    about = {"model": parts.info.model, "scheme": parts.info.scheme, "kernels": parts.info.kernels, **sizes}
    if not as_json:
        columns = ("adapter", "prefill_tok_s", "decode_tok_s", "prefill_cost", "decode_cost")
        shown = [
            [f"{row[name]:+.1%}" if name in row and "cost" in name else _shown(row.get(name, "")) for name in columns]
            for row in rows
        ]
        print_table("bench lora", columns, shown)
    threads = settings.threads or _threads()
    ranks = {"rank": rank, "final_rank": final_rank}
    print_json({"benchmark": "lora", **about, **ranks, "threads": threads, "results": rows})


def _first_token(app: App, model: str, repeats: int) -> dict[str, Any]:
    """The settings of this call reach the other process as they reached this one: in a file, and as options."""
    from ruvllm_cli.bench_start import first_token

    environment = {**os.environ, **dict(_variables(app.flags, "RUVLLM"))}
    options = ["--config", str(app.config)] if app.config else []
    return first_token(model, options, repeats=repeats, environment=environment)


def _variables(flags: dict[str, Any], prefix: str) -> list[tuple[str, str]]:
    found = []
    for name, value in flags.items():
        key = f"{prefix}{'_' if prefix == 'RUVLLM' else '__'}{name.upper()}"
        found += _variables(value, key) if isinstance(value, dict) else [(key, str(value))]
    return found


def _threads() -> int | None:
    """Threads of PyTorch where it does the work; a decoder that needs none of it follows the machine."""
    torch = sys.modules.get("torch")
    return torch.get_num_threads() if torch else os.cpu_count()


def _shown(value: object) -> str:
    return f"{value:.2f}" if isinstance(value, float) else str(value)
