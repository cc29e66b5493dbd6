"""``ruvllm sona deep``: train on all that a user ever rated, here and now."""

from __future__ import annotations

import json
import os
from contextlib import closing
from pathlib import Path
from typing import Any

import click

from ruvllm_core.cli.app import App, pass_app
from ruvllm_core.cli.output import print_json
from ruvllm_sona.command_place import as_json_option, open_place, place_options

_NICE = 10


@click.command("deep")
@place_options
@as_json_option
@pass_app
def deep(app: App, model: str | None, user: str, as_json: bool) -> None:
    """Train an adapter of higher rank on all feedback of a user of MODEL, and publish it if it passes the gate.

    Takes minutes to hours, with low priority. Ctrl-C ends it; the next call goes on after the last finished round.
    """
    place = open_place(app, model, user)
    import torch

    from ruvllm_core.protocols import LearningContext
    from ruvllm_sona.audit import read_audit
    from ruvllm_sona.study import Study

    if app.settings.threads:
        torch.set_num_threads(app.settings.threads)
    if hasattr(os, "nice"):
        os.nice(_NICE)
    file = place.model
    decoder: Any = None  # the learning network computes for itself
    context = LearningContext(
        file.spec, decoder, place.name, place.state_dir, place.settings, file.weights, place.tokenizer
    )
    with place.tenant() as tenant, closing(Study(context, place.settings)) as study:
        watch, first = _Checkpoint(tenant.folder / "deep.safetensors"), tenant.audit.head.entry
        if watch.epoch:
            what = f"a training that was stopped has done {watch.epoch} of its rounds"
            click.echo(f"{what}: it goes on, unless feedback came since", err=True)
        try:
            for _ in study.deep(tenant):
                watch.look()
        except KeyboardInterrupt:
            watch.look()
            kept = "no round was done"
            if watch.epoch:
                kept = f"round {watch.epoch} is done and kept: the next call goes on after it"
            click.echo(f"stopped; {kept}", err=True)
            raise
        entries = [one for one in read_audit(tenant.folder / "audit.jsonl") if one.entry > first]
        number = tenant.brains[0].number
    done = next(one for one in entries if one.actor == "deep")
    published = done.action == "deep"
    if as_json:
        print_json({"published": published, "version": number, "measured": dict(done.measured), "reason": done.note})
    elif published:
        click.echo(f"version {done.before} → {done.after}")
    else:
        click.echo(f"nothing was published, version {number} stays in force: {done.note}")


class _Checkpoint:
    """Tells of every round that is put on the disk."""

    def __init__(self, path: Path) -> None:
        self._path, self._seen, self.epoch = path, 0, 0
        if path.exists():
            self._seen, self.epoch = path.stat().st_mtime_ns, self._read()["epoch"]

    def look(self) -> None:
        """Print a line if there is a new round."""
        try:
            changed = self._path.stat().st_mtime_ns
        except FileNotFoundError:
            return
        if changed != self._seen:
            found, self._seen = self._read(), changed
            self.epoch = int(found["epoch"])
            line = f"round {self.epoch}: good answers gained {found['margin']:+.4f} nats a token on bad ones"
            click.echo(f"{line}, best so far {found['best']:+.4f}", err=True)

    def _read(self) -> dict[str, Any]:
        from ruvllm_sona.files import read_metadata

        return dict(json.loads(read_metadata(self._path)["progress"]))
