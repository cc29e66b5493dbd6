"""``ruvllm``: finds its subcommands through the `commands` hook and imports only the one that is called.

Exit codes: 0 done, 1 failed, 2 wrong usage, 130 interrupted.
"""

from __future__ import annotations

import contextlib
import os
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ruvllm_core import __version__
from ruvllm_core.cli.app import App, add_global_options, global_options
from ruvllm_core.errors import ConfigError, PluginError, RuvLLMError, near

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem

    from ruvllm_core.hookspecs import Offer


class CommandGroup(click.Group):
    """Subcommands by name from the registry. Listing and completing them imports none."""

    def invoke(self, ctx: click.Context) -> None:
        super().invoke(ctx)  # what a command returns is nobody's exit code

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(_offers(ctx))

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import one command. Raises `PluginConflict` or `PluginError` if it is claimed twice or broken."""
        registry = ctx.ensure_object(App).registry
        known = {entry.name for entry in registry.entries("commands")}
        if cmd_name.startswith("-"):
            return None
        try:
            command = registry.load("commands", cmd_name)
        except PluginError as error:
            if cmd_name in known or error.__cause__ is not None:
                raise
            everyday = "" if "run" in known else "plugins, run, chat and others come with the package ruvllm-cli\n"
            message = f"there is no command {cmd_name!r}{registry.not_in_use}\n{everyday}{near(cmd_name, known)}"
            raise click.UsageError(message, ctx) from None
        if not isinstance(command, click.Command):
            target = registry.entry("commands", cmd_name).offer.target
            raise PluginError(f"commands: {cmd_name!r} is no click command but a {type(command).__name__} ({target})")
        return add_global_options(command)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        # A --config after the subcommand decides too which plugins may offer it.
        for option, value in zip(args, [*args[1:], ""], strict=True):
            if option == "--":
                break
            name, equals, joined = option.partition("=")
            if name == "--config" and (joined or value):
                ctx.ensure_object(App).use_config(Path(joined if equals else value))
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        try:
            rows = [(name, offer.summary) for name, offer in _offers(ctx).items()]
        except ConfigError as error:  # help must be there for those with broken settings
            formatter.write_paragraph()
            formatter.write_text(
                f"Commands come from plugins, and are left out, as settings are wrong: {error.message}"
            )
            return
        with formatter.section("Commands"):
            formatter.write_dl(rows)

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem[str]]:
        from click.shell_completion import CompletionItem

        fitting = {name: offer for name, offer in _offers(ctx).items() if name.startswith(incomplete)}
        names = [CompletionItem(name, help=offer.summary) for name, offer in fitting.items()]
        return names + click.Command.shell_complete(self, ctx, incomplete)


def _offers(ctx: click.Context) -> dict[str, Offer]:
    return {entry.name: entry.offer for entry in ctx.ensure_object(App).registry.entries("commands")}


cli = CommandGroup(
    "ruvllm",
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    help="A local LLM engine made of plugins.",
    epilog="Settings: flags over environment RUVLLM_* over --config FILE over defaults.",
)
global_options(click.version_option(__version__, prog_name="ruvllm", message="%(prog)s %(version)s")(cli))


def main(args: Sequence[str] | None = None) -> None:
    """The console script. Ends the process with the exit code."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(AttributeError):  # a terminal that lacks a letter is no reason to fail
            stream.reconfigure(errors="replace")  # type: ignore[union-attr]
    app = App()
    code = _run(app, args)
    try:
        sys.stdout.flush()
    except OSError as error:
        if not code and not isinstance(error, BrokenPipeError):
            click.echo(_explain(error, app.debug), err=True)
        code = _nobody_listens()
    sys.exit(code)


def _run(app: App, args: Sequence[str] | None) -> int:
    try:
        return cli.main(args, prog_name="ruvllm", standalone_mode=False, obj=app) or 0
    except SystemExit as end:  # click's answer to a completion request, or to a pipe that was closed
        if isinstance(end.__context__, BrokenPipeError):
            return _nobody_listens()
        if isinstance(end.code, str):
            click.echo(end.code, err=True)
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except (click.Abort, KeyboardInterrupt):
        return 130
    except BrokenPipeError:
        return _nobody_listens()
    except Exception as error:
        if app.debug:
            traceback.print_exc()
        click.echo(_explain(error, app.debug), err=True)
        return 1


def _explain(error: Exception, debug: bool) -> str:
    if isinstance(error, RuvLLMError):
        return f"error: {error}"
    what = f"{type(error).__name__}: {error}".rstrip(": ")
    if isinstance(error, OSError):
        return f"error: {what}"
    return f"error: unexpected {what}" + ("" if debug else "\n  run it again with --debug for the traceback")


def _nobody_listens() -> int:
    """Whoever read our output has gone: say nothing, not even when Python flushes at exit."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 1


if __name__ == "__main__":
    main()
