"""``ruvllm sona distill``: have one adapter say what several do, or what a larger model does."""

from __future__ import annotations

import os
from contextlib import closing
from typing import TYPE_CHECKING

import click

from ruvllm_core.cli.app import App, pass_app
from ruvllm_core.cli.output import print_json
from ruvllm_sona.command_place import as_json_option, open_place, place_options

if TYPE_CHECKING:
    from ruvllm_sona.distill import DistillProgress
    from ruvllm_sona.distilling import LargeTeacher

_NICE = 10


@click.command("distill")
@place_options
@click.option("--teacher", metavar="MODEL", help="A model with the same vocabulary; else what all patterns learned.")
@click.option("--steps", type=click.IntRange(1), default=100, show_default=True, help="Of training, 4 answers each.")
@as_json_option
@pass_app
def distill(app: App, model: str | None, user: str, teacher: str | None, steps: int, as_json: bool) -> None:
    """Train the adapter that all prompts of a user of MODEL share to say what its teachers would, and publish it.

    It answers prompts of rated answers itself, and comes nearer to what the teachers would have said there. Teachers
    are the adapters of all patterns, each for the prompts that it answers; or another model. Patterns keep their own.
    It is published if it has come nearer on prompts held out, and passes the gate.

    Takes minutes to hours, with low priority. Ctrl-C ends it; the same call goes on after the last 10 steps.
    """
    place = open_place(app, model, user)
    import torch

    from ruvllm_core.generate.load import load_parts
    from ruvllm_core.protocols import LearningContext
    from ruvllm_sona.distill import DistillProgress
    from ruvllm_sona.study import Study

    if app.settings.threads:
        torch.set_num_threads(app.settings.threads)
    if hasattr(os, "nice"):
        os.nice(_NICE)
    with place.tenant() as tenant:
        large = _large(app, teacher) if teacher else None
        file, alone = place.model, app.settings.model_copy(update={"learning": [], "speculative": "off"})
        parts = load_parts(alone, place.registry)  # the student answers with the kernels that serve requests
        context = LearningContext(
            file.spec, parts.decoder, place.name, place.state_dir, place.settings, file.weights, place.tokenizer
        )
        first, kept = tenant.audit.head.entry, 0
        last: DistillProgress | None = None
        with closing(parts.decoder), closing(parts.backend), closing(Study(context, place.settings)) as study:
            try:
                for found in study.distill(tenant, large, steps):
                    if not isinstance(found, DistillProgress):
                        continue
                    if last is None and found.step > 1:
                        click.echo(f"a distillation that was stopped goes on at step {found.step}", err=True)
                    last = found
                    if found.state is not None:
                        kept = found.step
                        click.echo(_line(found), err=True)
            except KeyboardInterrupt:
                what = f"step {kept} is kept: the next call goes on after it" if kept else "no 10 steps were done"
                click.echo(f"stopped; {what}", err=True)
                raise
        said, number = tenant.said("distill", first), tenant.brains[0].number
    assert said is not None and last is not None
    published = said.action == "distill"
    if as_json:
        figures = {"before": last.before, "after": last.after, "measured": dict(said.measured)}
        print_json({"published": published, "version": number, **figures, "reason": said.note})
    elif published:
        click.echo(f"version {said.before} → {said.after}")
    else:
        click.echo(f"nothing was published, version {number} stays in force: {said.note}")


def _line(found: DistillProgress) -> str:
    line = f"step {found.step}: {found.kl:.4f} nats a token from the teacher"
    if found.after is not None:
        line += f"; on prompts held out {found.before:.4f} before, {found.after:.4f} now"
    return line


def _large(app: App, name: str) -> LargeTeacher:
    from ruvllm_core.model.hub import resolve
    from ruvllm_core.model.loader import open_model
    from ruvllm_sona.distilling import LargeTeacher

    file = open_model(resolve(name, app.settings), app.registry)
    file.check_finite()
    return LargeTeacher(name, file.spec, file.weights, file.tokenizer())
