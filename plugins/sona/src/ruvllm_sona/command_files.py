"""``ruvllm sona export`` and ``merge``: what was learned, for other programs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ruvllm_core.cli.app import App, pass_app
from ruvllm_core.cli.output import print_json
from ruvllm_core.errors import LearningError
from ruvllm_sona.command_place import Place, as_json_option, open_place, pattern_option, place_options

if TYPE_CHECKING:
    from ruvllm_sona.pattern_merge import How
    from ruvllm_sona.sites import Deltas

_BITS = 8.0  # with fewer, rounding eats most of a change as small as those that are learned


def _which_options(command: Callable[..., None]) -> Callable[..., None]:
    """Whose adapter, which version or which merge of it: what `_chosen` takes."""
    version = click.option("--version", "number", type=click.IntRange(0), metavar="N", help="Not the one in force.")
    what = "All patterns merged into one, this way."
    how = click.option("--patterns", "how", type=click.Choice(("exact", "ties", "dare")), help=what)
    what = "Of what --patterns makes; else all that exact needs, 64 of ties and dare."
    rank = click.option("--rank", type=click.IntRange(1), metavar="N", help=what)
    return place_options(version(pattern_option(how(rank(command)))))


@click.command("export")
@click.argument("folder", type=click.Path(path_type=Path, file_okay=False))
@_which_options
@click.option("--base-model", metavar="ID", help="Hub id or folder of the model, for PEFT to find it; else MODEL.")
@pass_app
def export(
    app: App,
    folder: Path,
    model: str | None,
    user: str,
    number: int | None,
    pattern: int,
    how: How | None,
    rank: int | None,
    base_model: str | None,
) -> None:
    """Write the version in force for a user of MODEL into FOLDER, as a LoRA adapter of the PEFT library.

    The preview of feedback that no version has learned from yet is no part of it. For --patterns see `merge`.
    """
    place = open_place(app, model, user)
    from ruvllm_sona.peft_export import export_peft

    what, deltas, _ = _chosen(place, pattern, number, how, rank)
    opened = place.model
    export_peft(
        deltas, opened.spec, opened.sources, folder, base_model=base_model or place.name, weights=opened.weights
    )
    click.echo(f"{folder}: {what}, {len(deltas)} sites")


@click.command("merge")
@click.argument("destination", type=click.Path(path_type=Path, dir_okay=False))
@_which_options
@click.option(
    "--scheme", metavar="NAME", help="Of changed tensors; keep leaves each its own. Else q8_0 where it had fewer bits."
)
@click.option("--force", is_flag=True, help="Replace DESTINATION if it exists.")
@as_json_option
@pass_app
def merge(
    app: App,
    destination: Path,
    model: str | None,
    user: str,
    number: int | None,
    pattern: int,
    how: How | None,
    rank: int | None,
    scheme: str | None,
    force: bool,
    as_json: bool,
) -> None:
    """Write the GGUF file of MODEL as DESTINATION, with what was learned for a user added to its weights.

    Learned changes are small: rounding to the 4 bits of a usual file eats 94 % of one. So changed tensors that had
    fewer than 8 bits become q8_0, unless --scheme says otherwise. What rounding ate, and what error it added, is
    printed; f16 adds next to none.

    A file can hold one adapter. Where prompts of several patterns have their own, --patterns merges all that are in
    force, each for its share of the feedback: exact adds them up; ties (arXiv 2306.01708) and dare (arXiv 2311.03099)
    prune them first, so that they disturb each other less, which is meant for adapters of more than a few ranks, and
    how much of the result --rank has no room for is printed. What this does to answers is not measured; to have one
    adapter learn what all say, use `distill`.
    """
    if destination.exists() and not force:
        raise click.UsageError(f"{destination} exists; use --force to replace it")
    if not destination.absolute().parent.is_dir():
        raise click.UsageError(f"there is no folder {destination.absolute().parent}")
    place = open_place(app, model, user)
    if place.model.path.is_dir():
        raise LearningError(
            f"{place.model.path} is no GGUF file, and merging writes one from one",
            hint="`ruvllm quantize` makes one of it; or export the adapter, and merge it with PEFT",
        )
    from ruvllm_sona.gguf_merge import merge_gguf

    what, deltas, facts = _chosen(place, pattern, number, how, rank)
    chosen = _scheme(place, list(deltas)) if scheme is None else None if scheme == "keep" else scheme
    report = merge_gguf(place.model.path, deltas, destination, registry=place.registry, scheme=chosen)
    if as_json:
        tensors = [asdict(tensor) for tensor in report.touched]
        print_json({**facts, "lost": report.lost, "file_bytes": report.file_bytes, "tensors": tensors})
    else:
        click.echo(f"{destination}: {what}, {report.file_bytes / 1e6:.1f} MB, {report}")


def _chosen(
    place: Place, pattern: int, number: int | None, how: How | None, rank: int | None
) -> tuple[str, Deltas, dict[str, object]]:
    """What is to be written: its name, itself, and what is known of it."""
    if how is None:
        if rank is not None:
            raise click.UsageError("--rank is of what --patterns makes")
        number, deltas = place.deltas(pattern, number)
        return f"version {number}", deltas, {"version": number}
    if pattern or number is not None:
        raise click.UsageError("--patterns takes what is in force of all patterns: leave --pattern and --version out")
    from ruvllm_sona.pattern_merge import merge_patterns

    merged = merge_patterns(place, how, rank)
    return str(merged), merged.deltas, {"patterns": dict(merged.versions), "how": how, "cut": merged.cut}


def _scheme(place: Place, sites: list[str]) -> str | None:
    """q8_0 if a tensor to be changed has fewer bits; None, which leaves each its own, otherwise."""
    from ruvllm_core.model.quant import SCHEMES

    weights = place.model.weights
    few = any(site in weights and SCHEMES[weights[site].scheme].bits_per_weight < _BITS for site in sites)
    return "q8_0" if few else None
