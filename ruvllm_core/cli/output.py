"""What commands print to stdout: JSON and tables."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import click


def print_json(value: Any) -> None:
    """One JSON document on one line of stdout, in ASCII, so that no terminal's encoding can spoil it."""
    click.echo(json.dumps(value))


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """A table on stdout; not cut to a width where stdout is no terminal."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    table = Table(*columns, title=title, title_justify="left", title_style="bold", box=SIMPLE_HEAD)
    for row in rows:
        table.add_row(*(str(cell) for cell in row))
    terminal = Console(markup=False, highlight=False)
    wide = Console(markup=False, highlight=False, width=1000)
    (terminal if terminal.is_terminal else wide).print(table)
