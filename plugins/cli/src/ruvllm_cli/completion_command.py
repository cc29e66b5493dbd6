"""``ruvllm completion``: what a shell needs to complete subcommands and options."""

from __future__ import annotations

import click


@click.command("completion")
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def command(shell: str) -> None:
    """Print SHELL's completion script.

    bash: put `eval "$(ruvllm completion bash)"` into ~/.bashrc. zsh: the same with zsh, into ~/.zshrc.
    fish: `ruvllm completion fish > ~/.config/fish/completions/ruvllm.fish`.
    """
    from click.shell_completion import get_completion_class

    from ruvllm_core.cli.main import cli

    completer = get_completion_class(shell)
    assert completer is not None  # click has all three
    click.echo(completer(cli, {}, "ruvllm", "_RUVLLM_COMPLETE").source())
