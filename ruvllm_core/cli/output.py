"""What commands print: JSON and tables to stdout, progress to stderr."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
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


@contextmanager
def progress(description: str, total: int, *, hidden: bool = False) -> Iterator[Callable[[], None]]:
    """A progress bar on stderr, if that is a terminal; gives the function that advances it by one."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    # rich would send to the bar's stderr what is printed to stdout meanwhile.
    bar = Progress(
        *columns,
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
        disable=hidden or not console.is_terminal,
        redirect_stdout=False,
    )
    with bar:
        task = bar.add_task(description, total=total)
        yield lambda: bar.advance(task)
