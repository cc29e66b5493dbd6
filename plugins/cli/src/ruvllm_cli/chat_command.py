"""``ruvllm chat``: talk with a model."""

from __future__ import annotations

import contextlib
import sys

import click

from ruvllm_cli.chat import MULTI_LINE, Chat
from ruvllm_cli.options import model_options, sampling_options, sampling_params, speculation_options
from ruvllm_core.cli.app import App, pass_app, setting
from ruvllm_core.errors import ConfigError, PluginError, RuvLLMError


@click.command("chat")
@click.argument("model", required=False)
@setting("run.system", "--system", metavar="TEXT", help="System message.")
@click.option("--learn", is_flag=True, help="Learn from /good, /bad and /rate.")
@click.option("--user", metavar="NAME", default="", help="Whose answers these are: each user is learned from apart.")
@model_options
@speculation_options
@sampling_options
@pass_app
def command(app: App, model: str | None, learn: bool, user: str) -> None:
    """Talk with MODEL. Ctrl-C stops an answer, Ctrl-D ends; /help lists what else there is.

    Answers go to stdout and everything else to stderr; messages can be piped in, too. With --learn the last answer can
    be rated by /good, /bad or /rate 0.7, and the learning loops that are installed make use of it; without, none runs.
    """
    if model:
        app.set("model", model)
    if learn:
        _check_loops(app)
    else:
        app.set("learning", [])
    sampling_params(app.settings)  # nonsense is refused before a model is loaded
    terminal = sys.stdin.isatty()
    if terminal:
        with contextlib.suppress(ImportError):  # line editing, where Python has it
            import readline  # noqa: F401
    else:
        sys.stdin.reconfigure(encoding="utf-8", errors="replace")  # type: ignore[union-attr]
    from ruvllm_core.generate.engine import Engine

    with Engine.load(settings=app.settings, registry=app.registry) as engine:
        if learn and not engine.info.learning:
            raise PluginError("--learn: no learning loop can run here", hint="`ruvllm plugins` says what is wrong")
        chat = Chat(engine, app.settings, user)
        if terminal:
            click.echo(
                f"{engine.info.model}, {engine.info.max_context} tokens. /help, Ctrl-D ends. {MULTI_LINE}", err=True
            )
        while chat.open:
            try:
                text = _read("> " if terminal else "", "… " if terminal else "")
                chat.enter(text)
            except EOFError:
                break
            except KeyboardInterrupt:
                if not terminal:
                    raise
                click.echo(err=True)
            except RuvLLMError as error:
                click.echo(f"error: {error}", err=True)


def _check_loops(app: App) -> None:
    """Raise unless there is a learning loop that may run, before a model is loaded."""
    if app.settings.learning == []:
        raise ConfigError("--learn: the setting learning is an empty list", hint="leave it out, or name a loop there")
    if not app.registry.entries("learning_loops"):
        what = f"--learn: nothing that learns is installed{app.registry.not_in_use}"
        raise PluginError(what, hint="pip install ruvllm-sona")


def _read(prompt: str, more: str) -> str:
    """A message of one line or several (see `MULTI_LINE`). Raises `EOFError` if there is none."""
    text = _ask(prompt)
    block = text.startswith('"""')
    if block:
        text = text[3:]
    try:
        while not text.rstrip().endswith('"""') if block else text.endswith("\\"):
            text = (text if block else text[:-1]) + "\n" + _ask(more)
    except EOFError:
        return text
    return text.rstrip()[:-3].strip("\n") if block else text


def _ask(prompt: str) -> str:
    if sys.stdout.isatty():
        return input(prompt)
    click.echo(prompt, nl=False, err=True)  # `input` would put it among the answers
    return input()
