"""``ruvllm run``: answer one prompt, or a file of prompts."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ruvllm_cli.batch import Job, answers_file, generation_row, read_jobs, run_jobs, with_system
from ruvllm_cli.options import model_options, read_text, sampling_options, sampling_params, speculation_options
from ruvllm_cli.progress import progress
from ruvllm_core.cli.app import App, pass_app, setting
from ruvllm_core.cli.output import print_json
from ruvllm_core.errors import ConfigError, RequestError

if TYPE_CHECKING:
    from ruvllm_core.generate.engine import Engine


@click.command("run")
@click.argument("model", required=False)
@click.argument("prompt", required=False)
@click.option("--prompt-file", type=click.Path(path_type=Path), help="A text; or a prompt a line, if it is .jsonl.")
@setting("run.output", "--output", "-o", type=click.Path(path_type=Path), help="JSONL file for the answers.")
@setting("run.system", "--system", metavar="TEXT", help="System message.")
@setting("run.raw", "--raw", is_flag=True, help="The prompt as it is, without the chat template.")
@model_options
@speculation_options
@sampling_options
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object when done.")
@pass_app
def command(app: App, model: str | None, prompt: str | None, prompt_file: Path | None, as_json: bool) -> None:
    """Answer PROMPT with MODEL, writing the text as it comes.

    Without PROMPT (or with -), the prompt is that of --prompt-file, of the configuration file, or stdin, less one
    newline at its end. Each line of a .jsonl file is an object with "prompt" or "messages", and perhaps "id" and
    "params" (which override the sampling options); answers go to --output or stdout in the same form and order. If
    some fail, their rows have "error", and the exit code is 1.
    """
    if model:
        app.set("model", model)
    if app.settings.run.raw and app.settings.run.system:
        raise click.UsageError("--raw leaves out the chat template, which --system needs")
    jobs, many = _jobs(app, prompt, prompt_file)
    with ExitStack() as stack:
        output = app.settings.run.output
        write = stack.enter_context(answers_file(output)) if output else None
        from ruvllm_core.generate.engine import Engine

        engine = stack.enter_context(Engine.load(settings=app.settings, registry=app.registry))
        if not many and not write:
            _answer(engine, jobs[0], template=not app.settings.run.raw, as_json=as_json)
            return
        rows: list[Any] = []
        add = write or (rows.append if as_json else print_json)
        with progress("answering", len(jobs), hidden=add is print_json and sys.stdout.isatty()) as advance:
            try:
                failed = run_jobs(engine, jobs, lambda row: (add(row), advance())[0], template=not app.settings.run.raw)
            except KeyboardInterrupt:
                if output:
                    click.echo(f"interrupted: the answers that were finished are in {output}", err=True)
                raise
        summary = {"prompts": len(jobs), "failed": failed, **_about(engine)}
        if as_json:
            print_json({**summary, "output": str(output)} if output else {**summary, "answers": rows})
        elif output:
            click.echo(f"{len(jobs) - failed} of {len(jobs)} answers are in {output}", err=True)
    if failed:
        raise click.exceptions.Exit(1)


def _jobs(app: App, prompt: str | None, prompt_file: Path | None) -> tuple[Sequence[Job], bool]:
    """What to answer, and whether it is a batch."""
    settings, asked = app.settings, app.settings.run
    if prompt is not None and prompt_file is not None:
        raise click.UsageError("PROMPT and --prompt-file are both given")
    texts: list[str]
    if prompt is not None and prompt != "-":
        texts = [prompt]
    elif prompt is None and prompt_file is None and asked.prompts:
        if asked.prompt_file:
            raise ConfigError("run.prompts and run.prompt_file are both set", hint="leave one out")
        texts = asked.prompts
    elif prompt is None and (file := prompt_file or asked.prompt_file):
        if file.suffix == ".jsonl":
            _keep_apart(file, asked.output)
            return read_jobs(file, settings), True
        texts = [read_text(file).removesuffix("\n")]
    elif prompt is None and sys.stdin.isatty():
        raise click.UsageError(f'no prompt: try  ruvllm run {settings.model} "Why is the sky blue?"')
    else:
        texts = [read_text(None).removesuffix("\n")]
    if not all(texts):
        raise RequestError("the prompt is empty")
    params = sampling_params(settings)
    return [Job(i, with_system(text, settings), params) for i, text in enumerate(texts)], len(texts) > 1


def _keep_apart(file: Path, output: Path | None) -> None:
    if output is not None and output.exists() and file.exists() and output.samefile(file):
        raise click.UsageError(f"--output would overwrite the prompts in {file}")


def _answer(engine: Engine, job: Job, *, template: bool, as_json: bool) -> None:
    stream = engine.stream(job.prompt, job.params, template=template)
    text = ""
    try:
        for event in stream:
            text = event.text or text
            if not as_json:
                click.echo(event.text, nl=False)
        answer = stream.result()
    except BaseException:
        stream.cancel()
        if text and not as_json:
            click.echo()
        raise
    if as_json:
        row = generation_row(answer)
        row["timings"]["load_s"] = engine.info.load_s
        print_json({**row, **_about(engine)})
    elif not text.endswith("\n"):
        click.echo()


def _about(engine: Engine) -> dict[str, str]:
    info = engine.info
    return {"model": info.model, "backend": info.backend, "kernels": info.kernels, "cache": info.cache}
