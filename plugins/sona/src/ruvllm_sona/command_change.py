"""``ruvllm sona rollback``, ``forget`` and ``import``: what changes a user's memory."""

from __future__ import annotations

from pathlib import Path

import click

from ruvllm_core.cli.app import App, pass_app
from ruvllm_core.errors import LearningError
from ruvllm_sona.command_place import open_place, pattern_option, place_options


@click.command("rollback")
@click.argument("version", type=click.IntRange(0))
@place_options
@pattern_option
@pass_app
def rollback(app: App, version: int, model: str | None, user: str, pattern: int) -> None:
    """Put VERSION of a user of MODEL back in force, bit for bit; 0 is the base model.

    Feedback given until now is not learned from again. Versions stay, so that this can be taken back.
    """
    place = open_place(app, model, user)
    place.versions(pattern)  # says so if there is no such pattern
    with place.tenant() as tenant:
        before = tenant.brain(pattern).number
        tenant.rollback(version, pattern)
    click.echo(f"version {before} → {version}{'' if version else ', the base model'}")


@click.command("forget")
@place_options
@click.option("--request", metavar="ID", help="Forget the feedback on one answer.")
@click.option("--all", "everything", is_flag=True, help="Forget all feedback.")
@click.option("--yes", "-y", is_flag=True, help="Do not ask.")
@pass_app
def forget(app: App, model: str | None, user: str, request: str | None, everything: bool, yes: bool) -> None:
    """Forget the feedback on one answer to a user of MODEL, or all of it, and everything learned from it.

    What was learned cannot be told apart by answers, so all versions are deleted, and what remains of the feedback is
    learned anew the next time that an engine runs. `history --feedback` lists requests. The audit log stays: it knows
    requests by their hashes alone.
    """
    if (request is not None) == everything:
        raise click.UsageError("either --request ID or --all says what to forget")
    if request == "":
        raise click.UsageError("--request needs the id of a request")
    place = open_place(app, model, user)
    with place.tenant() as tenant:
        rated = list(tenant.examples())
        gone = [one for one in rated if everything or one.request_id == request]
        if request and not gone:
            raise LearningError(
                f"no feedback on request {request} is remembered for {place.whose}",
                hint="`ruvllm sona history --feedback` lists those that are",
            )
        if not yes:
            what = f"feedback on {len(gone)} of {len(rated)} answers, and all versions of {place.whose}"
            click.confirm(f"forget {what}?", abort=True, err=True)
        dropped = tenant.forget(request or "")
    left = len(rated) - dropped
    rest = f"; that on the other {left} will be learned from anew the next time that an engine runs" if left else ""
    click.echo(f"forgotten: feedback on {dropped} of {len(rated)} answers, and all versions{rest}")


@click.command("import")
@click.argument("folder", type=click.Path(path_type=Path, file_okay=False))
@place_options
@pattern_option
@click.option("--force", is_flag=True, help="Also if it was made for other weights of this shape.")
@pass_app
def import_(app: App, folder: Path, model: str | None, user: str, pattern: int, force: bool) -> None:
    """Publish the LoRA adapter in FOLDER, as the PEFT library writes them, as a new version for a user of MODEL.

    It is in force at once and learning goes on from it. Whether it harms anything is not measured, as it is of what is
    learned here; `rollback` takes it back.
    """
    place = open_place(app, model, user, new=True)
    from ruvllm_core.decode.lora import FINAL_SITE
    from ruvllm_sona.frames import Record
    from ruvllm_sona.peft_export import check_deltas
    from ruvllm_sona.peft_import import import_peft

    spec, sources = place.model.spec, place.model.sources
    deltas = import_peft(folder, spec, sources, weights=place.model.weights, force=force)
    check_deltas(deltas, spec, sources)
    if FINAL_SITE in deltas:
        raise LearningError(
            f"{folder} changes the output projection, lm_head, where a user's latest feedback is kept",
            hint="train or export it without lm_head",
        )
    if place.folder.is_dir():
        place.versions(pattern)
    elif pattern:
        raise LearningError(f"there is no pattern {pattern}", hint="nothing was learned yet: leave --pattern out")
    with place.tenant() as tenant:
        brain = tenant.brain(pattern)
        before, covers = brain.number, brain.covers  # feedback that waits is learned on top of it
        number = brain.publish(deltas, {"imported": True}, covers, brain.life)
        brain.adopt(number, deltas, covers)
        brain.rebase(deltas)
        tenant.bank.find(pattern).version = str(number)
        tenant.log.append(Record("published", 0.0, version=number, covers=covers))
        tenant.save()
        tenant.audit.append(
            "import", actor="user", before=str(before), after=str(number), note=f"{len(deltas)} sites, not gated"
        )
    click.echo(f"version {before} → {number}: {len(deltas)} sites; nobody has measured whether it harms other answers")
