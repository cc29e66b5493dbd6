"""``ruvllm sona plot``: how learning goes, as a picture that may be live."""

from __future__ import annotations

import contextlib
import time
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ruvllm_core.cli.app import App, pass_app
from ruvllm_sona.command_place import Place, open_place, place_options

if TYPE_CHECKING:
    from ruvllm_sona.plot import Curve

_HIGHEST = 8  # rows of a curve


@click.command("plot")
@place_options
@click.option("--watch", type=click.FloatRange(0.1), metavar="SECONDS", help="Draw it anew as often, until Ctrl-C.")
@click.option("--out", type=click.Path(path_type=Path, dir_okay=False), metavar="FILE", help="To a .svg or .html file.")
@pass_app
def plot(app: App, model: str | None, user: str, watch: float | None, out: Path | None) -> None:
    """Draw how learning goes for a user of MODEL, over the feedback so far.

    Quality is what the user said, as a running mean; KL to the base model, loss on anchor texts and the largest
    relative change of a weight are what the gate measured of each published version. Where drafts were learned, how
    many of their tokens were right is drawn, too.
    """
    kind = out.suffix.lower() if out is not None else ""
    if out is not None and kind not in (".svg", ".html"):
        raise click.UsageError(f"{out} ends neither in .svg nor in .html")
    if out is not None and not out.absolute().parent.is_dir():
        raise click.UsageError(f"there is no folder {out.absolute().parent}")
    place = open_place(app, model, user)
    if watch is None:
        _once(place, out, None)
        return
    with contextlib.suppress(KeyboardInterrupt):
        _live(place, out, watch)


def _once(place: Place, out: Path | None, refresh_s: float | None) -> None:
    from ruvllm_sona.files import write_atomic
    from ruvllm_sona.plot import as_html, as_svg, as_text

    found = _curves(place)
    if out is None:
        click.echo(as_text(found, _width()))
        return
    title = f"What was learned for {place.whose}"
    page = as_svg(found, title) if out.suffix.lower() == ".svg" else as_html(found, title, refresh_s)
    write_atomic(out, page.encode())
    click.echo(str(out))


def _live(place: Place, out: Path | None, seconds: float) -> None:
    if out is not None:
        while True:
            _once(place, out, seconds)
            time.sleep(seconds)
    from rich.console import Console
    from rich.live import Live
    from rich.text import Text

    from ruvllm_sona.plot import as_text

    console = Console()
    with Live(console=console, auto_refresh=False, vertical_overflow="crop") as live:
        while True:
            found = _curves(place)
            height = min(max((console.height - 1) // len(found) - 2, 1), _HIGHEST)
            live.update(Text(as_text(found, _width(), height)), refresh=True)
            time.sleep(seconds)


def _curves(place: Place) -> tuple[Curve, ...]:
    from ruvllm_sona.acceptance import read_acceptance
    from ruvllm_sona.audit import read_audit
    from ruvllm_sona.command_report import examples
    from ruvllm_sona.drafting import ACCEPTANCE
    from ruvllm_sona.gate import GateConfig
    from ruvllm_sona.plot import curves

    own = place.settings
    limits = {"kl": own.max_kl, "mean_loss": own.max_loss, "relative_norm": GateConfig().max_relative_norm}
    return curves(
        examples(place), read_audit(place.folder / "audit.jsonl"), limits, read_acceptance(place.folder / ACCEPTANCE)
    )


def _width() -> int:
    from rich.console import Console

    return min(Console().width, 120)
