"""Write the reference part of docs/cli.md from the commands themselves; `make format` runs it."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from pathlib import Path

import click

PAGE = Path(__file__).resolve().parent.parent / "docs" / "cli.md"
START = "<!-- from here on written by scripts/cli_reference.py -->\n"
COMMON = {"--debug", "--log-level", "--config", "--help"}


def commands() -> Iterator[tuple[str, click.Command]]:
    """Every command of ``ruvllm`` as ``run`` or ``bench e2e``, by name."""
    from ruvllm_core.cli.app import App
    from ruvllm_core.cli.main import cli

    context = click.Context(cli, info_name="ruvllm", obj=App())
    for name in sorted(cli.list_commands(context)):
        command = cli.get_command(context, name)
        assert command is not None
        yield name, command
        if isinstance(command, click.Group):
            yield from ((f"{name} {nested}", command.commands[nested]) for nested in sorted(command.commands))


def options(command: click.Command) -> list[click.Option]:
    """Its own options, those that every command has left out."""
    return [p for p in command.params if isinstance(p, click.Option) and not COMMON & set(p.opts)]


def reference() -> str:
    """A section for each command: usage, help, options."""
    parts = []
    for name, command in commands():
        context = click.Context(command, info_name=name)
        arguments = [p.make_metavar(context) for p in command.params if isinstance(p, click.Argument)]
        group = ["COMMAND"] if isinstance(command, click.Group) else []
        parts.append(f"### ruvllm {name}\n\n    {' '.join(['ruvllm', name, '[OPTIONS]', *arguments, *group])}\n")
        parts.append(_paragraphs(command.help or ""))
        if rows := [_row(option, context) for option in options(command)]:
            parts.append("| option | meaning |\n| --- | --- |\n" + "\n".join(rows) + "\n")
    return "\n".join(parts)


def _paragraphs(text: str) -> str:
    text = inspect.cleandoc(text.replace("\b\n", "")).partition("\f")[0]
    return text.replace("<", "\\<") + "\n"


def _row(option: click.Option, context: click.Context) -> str:
    names = ", ".join(f"`{name}`" for name in sorted(option.opts + option.secondary_opts, key=len))
    values = "" if option.is_flag or option.count else f" {option.make_metavar(context)}"
    default = f" (default {option.default})" if option.show_default else ""
    cells = (f"{names}{values}", f"{option.help or ''}{default}")
    return "| " + " | ".join(cell.replace("|", "\\|").replace("<", "\\<") for cell in cells) + " |"


def main() -> None:
    written, marker, _ = PAGE.read_text(encoding="utf-8").partition(START)
    if not marker:
        raise SystemExit(f"{PAGE} lacks the line {START!r}")
    PAGE.write_text(written + START + "\n" + reference(), encoding="utf-8")


if __name__ == "__main__":
    main()
