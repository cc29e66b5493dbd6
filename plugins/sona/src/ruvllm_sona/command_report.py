"""``ruvllm sona status`` and ``history``: what was learned, read beside whoever is learning."""

from __future__ import annotations

import contextlib
import json
import math
import time
from dataclasses import asdict
from datetime import datetime
from typing import TYPE_CHECKING, Any

import click

from ruvllm_core.cli.app import App, pass_app
from ruvllm_core.cli.output import print_json, print_table
from ruvllm_core.errors import LearningError
from ruvllm_sona.command_place import Place, as_json_option, open_place, place_options
from ruvllm_sona.files import LOG

if TYPE_CHECKING:
    from pathlib import Path

    from ruvllm_sona.audit import AuditReport
    from ruvllm_sona.chain import Entry
    from ruvllm_sona.records import Example


@click.command("status")
@place_options
@as_json_option
@pass_app
def status(app: App, model: str | None, user: str, as_json: bool) -> None:
    """What was learned for a user of MODEL: versions, feedback, budgets, and whether the audit log is whole."""
    found = overview(open_place(app, model, user))
    if as_json:
        print_json(found)
        return
    feedback, budget, audit = found["feedback"], found["budget"], found["audit"]
    mean = "" if feedback["mean_quality"] is None else f", mean quality {feedback['mean_quality']:.2f}"
    rows = [
        ("model", found["model"]),
        ("user", found["user"] or "(no name)"),
        ("feedback", f"{feedback['count']}{mean}"),
        ("waiting to be learned", feedback["pending"]),
        ("nats spent, last hour", f"{budget['nats_last_hour']:.1f} of {budget['nats_per_hour'] or 'any'}"),
        ("nats spent, last day", f"{budget['nats_last_day']:.1f} of {budget['nats_per_day'] or 'any'}"),
        ("feedback allowed now", budget["feedback_left"]),
        ("audit log", f"whole, {audit['entries']} entries" if audit["ok"] else f"BROKEN: {audit['problem']}"),
        ("held against forgetting", _held(found["holding"])),
        ("size", f"{found['bytes'] / 1e6:.1f} MB"),
        ("folder", found["folder"]),
    ]
    print_table("Learned", ("what", "value"), rows)
    cells = [
        (
            one["pattern"],
            f"{one['current']}{'' if one['current'] else ' (base model)'}",
            ", ".join(str(version["number"]) for version in one["versions"]) or "none",
            one["feedback"],
            f"{one['baseline']:.2f}",
            one["pending"],
        )
        for one in found["patterns"]
    ]
    print_table("Patterns", ("pattern", "in force", "versions kept", "feedback", "expected quality", "waiting"), cells)


@click.command("history")
@place_options
@click.option("--last", type=click.IntRange(1), metavar="N", help="The newest N alone.")
@click.option("--feedback", "rated", is_flag=True, help="The rated answers that are remembered, with their requests.")
@click.option("--verify", is_flag=True, help="Check the chain of hashes instead; exit code 1 if it is broken.")
@as_json_option
@pass_app
def history(app: App, model: str | None, user: str, last: int | None, rated: bool, verify: bool, as_json: bool) -> None:
    """What changed, when, by whom and with what effect, from the audit log; it outlives what is forgotten."""
    if rated and verify:
        raise click.UsageError("--feedback and --verify go apart: only the audit log is a chain")
    place = open_place(app, model, user)
    if rated:
        _print_feedback(examples(place)[-(last or 0) :], as_json)
        return
    from ruvllm_sona.audit import read_audit

    report = audit_report(place)
    if verify:
        _print_verified(place, report, as_json)
        return
    entries = list(read_audit(place.folder / "audit.jsonl"))[-(last or 0) :]
    if as_json:
        print_json([asdict(entry) for entry in entries])
    else:
        columns = ("entry", "time", "by", "action", "version", "predicted", "measured", "note")
        print_table("History", columns, [_row(entry) for entry in entries])
    if not report.ok:
        click.echo(f"warning: the log is broken at line {report.line}: {report.problem}", err=True)


def overview(place: Place) -> dict[str, Any]:
    """What ``status --json`` prints. Raises `LearningError` for a damaged file."""
    rated = examples(place)
    covers, patterns, owners = _learned(place, rated)
    waiting = [owner for owner, one in zip(owners, rated, strict=True) if one.sequence > covers.get(owner, 0)]
    report = audit_report(place)
    return {
        "model": place.name,
        "user": place.user,
        "folder": str(place.folder),
        "patterns": [{**one, "pending": waiting.count(one["pattern"])} for one in patterns],
        "feedback": {
            "count": len(rated),
            "mean_quality": sum(one.quality for one in rated) / len(rated) if rated else None,
            "pending": len(waiting),
        },
        "budget": _budget(place),
        "holding": held_here(place),
        "bytes": _size(place.folder),
        "audit": {**_checked(report), "ok": report.ok},
    }


def examples(place: Place) -> list[Example]:
    """All rated answers in the log, oldest first."""
    from dataclasses import replace

    from ruvllm_sona.log import read_log

    records = read_log(place.folder / LOG)
    return [replace(one.example, sequence=one.sequence) for one in records if one.example is not None]


def audit_report(place: Place) -> AuditReport:
    """Of the whole chain, which has to hold the entry that was the newest when the state was saved."""
    from ruvllm_sona.audit import verify_audit
    from ruvllm_sona.chain import Anchor
    from ruvllm_sona.files import read_metadata

    path, anchor = place.folder / "state.safetensors", None
    if path.exists():
        anchor = Anchor.parse(json.loads(read_metadata(path)["state"])["audit"])
    return verify_audit(place.folder / "audit.jsonl", anchor)


def _learned(place: Place, rated: list[Example]) -> tuple[dict[int, int], list[dict[str, Any]], list[int]]:
    """Up to which feedback each pattern has learned, what is known of each, and the pattern of each rated answer."""
    from ruvllm_sona.files import read_metadata
    from ruvllm_sona.patterns import SHARED
    from ruvllm_sona.pooled import Pooler

    bank, brains = place.bank(), dict[str, Any]()
    if (path := place.folder / "state.safetensors").exists():
        brains = json.loads(read_metadata(path)["state"])["brains"]
    covers: dict[int, int] = {}
    found: list[dict[str, Any]] = []
    for pattern in place.patterns():
        if pattern not in bank.patterns:  # its prompts have become another pattern's
            continue
        versions = place.versions(pattern)
        current, kept = versions.current, versions.kept()
        if (meta := brains.get(str(pattern))) is not None:
            covers[pattern] = int(meta["covers"])
            if meta["number"] != current:  # published since the state was saved
                published = {one.number: one.metadata for one in kept}
                covers[pattern] = max(covers[pattern], int(published.get(current, {}).get("covers", 0)))
        one = bank.patterns[pattern]
        numbers = [{"number": v.number, "bytes": v.size, "covers": v.metadata.get("covers", 0)} for v in kept]
        counts = {"feedback": one.count, "baseline": one.baseline}
        found.append({"pattern": pattern, "current": current, "versions": numbers, **counts})
    if len(bank.patterns) == 1:
        found[0]["feedback"] = len(rated)  # the saved count may be behind
        return covers, found, [SHARED] * len(rated)
    pooler = Pooler(place.model.weights["embed"], place.tokenizer)
    routed = [bank.route(pooler(one.prompt_ids)) for one in rated]
    return covers, found, [SHARED if pattern is None else pattern.id for pattern in routed]


def _budget(place: Place) -> dict[str, Any]:
    from ruvllm_sona.ledger import Ledger, Limits

    own, path = place.settings, place.folder / "ledger.bin"
    limits = Limits(own.nats_per_hour, own.nats_per_day, own.feedback_per_minute, own.burst)
    hour, day, left = 0.0, 0.0, own.burst
    if path.exists():  # opening one that is there changes nothing
        with Ledger(path, limits) as ledger:
            spent = ledger.spent(time.time())
        hour, day, left = spent.hour, spent.day, spent.feedback_left
    bounds = {
        name: value if math.isfinite(value) else None
        for name, value in (("nats_per_hour", own.nats_per_hour), ("nats_per_day", own.nats_per_day))
    }
    return {"nats_last_hour": hour, "nats_last_day": day, **bounds, "feedback_left": left}


def held_here(place: Place) -> dict[str, Any]:
    """λ, and of each pattern when it was consolidated last, from how many answers, and the bytes that takes."""
    from ruvllm_sona.brain import HELD
    from ruvllm_sona.files import read_metadata

    found: list[dict[str, Any]] = []
    for path in sorted((place.folder / HELD).glob("*.safetensors")):
        try:
            facts = json.loads(read_metadata(path)["facts"])
            known = {name: facts[name] for name in ("time", "answers", "count")}
        except (LearningError, KeyError, TypeError, ValueError) as error:
            known = {"problem": error.message if isinstance(error, LearningError) else f"no {error}"}
        found.append({"pattern": int(path.stem), "bytes": path.stat().st_size, **known})
    return {"ewc": place.settings.ewc, "consolidate_every": place.settings.consolidate_every, "patterns": found}


def _held(holding: dict[str, Any]) -> str:
    parts = [f"λ {holding['ewc']:g}" if holding["ewc"] else "off"]
    for one in holding["patterns"]:
        when = f"DAMAGED: {one['problem']}" if "problem" in one else f"consolidated {_when(one['time'])}"
        parts.append(f"pattern {one['pattern']} {when}, {one['bytes'] / 1e6:.1f} MB")
    return "; ".join(parts if len(parts) > 1 else [*parts, "nothing was consolidated yet"])


def _size(folder: Path) -> int:
    total = 0
    for path in folder.rglob("*"):
        with contextlib.suppress(FileNotFoundError):  # whoever is learning has replaced it meanwhile
            total += path.stat().st_size if path.is_file() else 0
    return total


def _checked(report: AuditReport) -> dict[str, Any]:
    entries = report.head.entry if report.head else 0
    return {"entries": entries, "problem": report.problem, "line": report.line, "unfinished_bytes": report.torn}


def _print_verified(place: Place, report: AuditReport, as_json: bool) -> None:
    if as_json:
        print_json({"ok": report.ok, **_checked(report)})
        if not report.ok:
            click.get_current_context().exit(1)
    elif not report.ok:
        raise LearningError(
            f"{place.folder / 'audit.jsonl'} is broken at line {report.line}: {report.problem}",
            hint="somebody has changed it, or the disk is damaged; what stands before that line is as it was written",
        )
    else:
        click.echo(f"{_checked(report)['entries']} entries, and the chain is whole")


def _print_feedback(rated: list[Example], as_json: bool) -> None:
    if as_json:
        print_json(
            [
                {
                    "sequence": one.sequence,
                    "time": one.time,
                    "request": one.request_id,
                    "quality": one.quality,
                    "tokens": len(one.output_ids),
                    "version": one.adapter_version,
                }
                for one in rated
            ]
        )
        return
    rows = [
        (one.sequence, _when(one.time), one.request_id, f"{one.quality:g}", len(one.output_ids), one.adapter_version)
        for one in rated
    ]
    print_table("Feedback", ("number", "time", "request", "quality", "tokens", "given by version"), rows)


def _row(entry: Entry) -> tuple[object, ...]:
    version = entry.before if entry.before == entry.after else f"{entry.before or '–'} → {entry.after or '–'}"
    figures = (
        ", ".join(
            f"{name} {value:.3g}" if isinstance(value, float) else f"{name} {value}" for name, value in one.items()
        )
        for one in (entry.predicted, entry.measured)
    )
    return entry.entry, _when(entry.time), entry.actor, entry.action, version, *figures, entry.note


def _when(seconds: float) -> str:
    return datetime.fromtimestamp(seconds).strftime("%Y-%m-%d %H:%M:%S")
