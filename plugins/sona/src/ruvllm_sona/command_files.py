"""``ruvllm sona export`` and ``merge``: what was learned, for other programs."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import click

from ruvllm_core.cli.app import App, pass_app
from ruvllm_core.cli.output import print_json
from ruvllm_core.errors import LearningError
from ruvllm_sona.command_place import Place, as_json_option, open_place, pattern_option, place_options

_BITS = 8.0  # with fewer, rounding eats most of a change as small as those that are learned
_version_option = click.option("--version", "number", type=click.IntRange(0), metavar="N", help="Not the one in force.")


@click.command("export")
@click.argument("folder", type=click.Path(path_type=Path, file_okay=False))
@place_options
@_version_option
@pattern_option
@click.option("--base-model", metavar="ID", help="Hub id or folder of the model, for PEFT to find it; else MODEL.")
@pass_app
def export(
    app: App, folder: Path, model: str | None, user: str, number: int | None, pattern: int, base_model: str | None
) -> None:
    """Write the version in force for a user of MODEL into FOLDER, as a LoRA adapter of the PEFT library.

    The preview of feedback that no version has learned from yet is no part of it.
    """
    place = open_place(app, model, user)
    from ruvllm_sona.peft_export import export_peft

    number, deltas = place.deltas(pattern, number)
    opened = place.model
    export_peft(
        deltas, opened.spec, opened.sources, folder, base_model=base_model or place.name, weights=opened.weights
    )
    click.echo(f"{folder}: version {number}, {len(deltas)} sites")


@click.command("merge")
@click.argument("destination", type=click.Path(path_type=Path, dir_okay=False))
@place_options
@_version_option
@pattern_option
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
    scheme: str | None,
    force: bool,
    as_json: bool,
) -> None:
    """Write the GGUF file of MODEL as DESTINATION, with what was learned for a user added to its weights.

    Learned changes are small: rounding to the 4 bits of a usual file eats 94 % of one. So changed tensors that had
    fewer than 8 bits become q8_0, unless --scheme says otherwise. What rounding ate, and what error it added, is
    printed; f16 adds next to none.
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

    number, deltas = place.deltas(pattern, number)
    chosen = _scheme(place, list(deltas)) if scheme is None else None if scheme == "keep" else scheme
    report = merge_gguf(place.model.path, deltas, destination, registry=place.registry, scheme=chosen)
    if as_json:
        tensors = [asdict(tensor) for tensor in report.touched]
        print_json({"version": number, "lost": report.lost, "file_bytes": report.file_bytes, "tensors": tensors})
    else:
        click.echo(f"{destination}: version {number}, {report.file_bytes / 1e6:.1f} MB, {report}")


def _scheme(place: Place, sites: list[str]) -> str | None:
    """q8_0 if a tensor to be changed has fewer bits; None, which leaves each its own, otherwise."""
    from ruvllm_core.model.quant import SCHEMES

    weights = place.model.weights
    few = any(site in weights and SCHEMES[weights[site].scheme].bits_per_weight < _BITS for site in sites)
    return "q8_0" if few else None
