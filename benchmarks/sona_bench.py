"""What feedback teaches, and what it harms: `python benchmarks/sona_bench.py --device cuda`, minutes on a large GPU.

Every cell is one wish (see `sona/tasks.py`) and one seed under one arm: it answers prompts one after the other at
temperature 0.8, each answer is judged 1 or 0, and that is all it ever hears. Cells of a kind learn in lockstep, with
the plugin's own network, loss and settings. Then held-out prompts about other topics are answered with the same luck as
the base model's, and perplexity on other text and the divergence on unrelated chats tell what else has changed. Arms
are in `sona/controls.py`. Prints tables and one JSON line; `--small` is a trial run that says nothing about learning.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

from sona import controls
from sona.run import Plan, run
from sona.tasks import MAX_TOKENS, TASKS

_SMALL = {"tasks": "no I", "seeds": 1, "feedback": "4", "held_out": 2, "max_tokens": 10, "windows": 1, "window": 32,
          "chats": 1}  # fmt: skip

_FLOATS = ("learning_rate", "leash", "text_leash", "saturation", "budget")
_SETTINGS = ("rank", "average", *_FLOATS)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--tasks", default=",".join(TASKS), help="of: " + ", ".join(TASKS))
    parser.add_argument("--arms", default=",".join(controls.DEFAULT), help="of: " + ", ".join(controls.ARMS))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--feedback", default="48,100,200", help="after how many to measure; the last ends learning")
    parser.add_argument("--held-out", type=int, default=200)
    parser.add_argument("--max-tokens", type=int, default=MAX_TOKENS)
    parser.add_argument("--text", type=Path, help="other text, English; left out, Python's language reference")
    parser.add_argument("--windows", type=int, default=24)
    parser.add_argument("--window", type=int, default=256)
    parser.add_argument("--chats", type=int, default=24)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="auto", help="of products with weights: auto, float32 or bfloat16")
    parser.add_argument("--at-once", type=int, default=1024, help="rows that are answered at once")
    parser.add_argument("--train-at-once", type=int, default=64, help="answers in one backward pass")
    learner = parser.add_argument_group("whole-network learning", "what is left out is as the plugin has it")
    learner.add_argument("--rank", type=int)
    learner.add_argument("--average", type=int)
    for name in _FLOATS:
        learner.add_argument(f"--{name.replace('_', '-')}", type=float)
    parser.add_argument("--out", type=Path, help="write the JSON here, too, with a row for every cell, kind by kind")
    parser.add_argument("--small", action="store_true", help="a trial run of a minute on two cores")
    args = parser.parse_args()
    if args.small:
        for name, value in _SMALL.items():
            setattr(args, name, value)
    arms = _chosen(args.arms, controls.ARMS, parser)
    if controls.LEASHED not in arms and (without := set(arms) & set(controls.FOLLOWERS)):
        parser.error(f"{', '.join(sorted(without))} cannot be run without {controls.LEASHED}, which it starts from")
    plan = Plan(
        model=args.model,
        tasks=_chosen(args.tasks, TASKS, parser),
        arms=arms,
        seeds=args.seeds,
        checkpoints=tuple(sorted({int(part) for part in args.feedback.split(",")})),
        held_out=args.held_out,
        max_tokens=args.max_tokens,
        text=args.text,
        windows=args.windows,
        window=args.window,
        chats=args.chats,
        device=args.device,
        dtype=args.dtype,
        at_once=args.at_once,
        train_at_once=args.train_at_once,
        learner={name: value for name in _SETTINGS if (value := getattr(args, name)) is not None},
    )
    began = time.perf_counter()

    def say(line: str) -> None:
        print(f"{time.perf_counter() - began:7.1f} s  {line}", file=sys.stderr, flush=True)

    def save(report: dict[str, Any]) -> None:
        report["seconds"] = round(time.perf_counter() - began, 1)
        if args.out is not None:
            args.out.write_text(_json(report), encoding="utf-8")

    report = run(plan, say, save)
    save(report)
    report.pop("rows")
    print(_json(report))


def _json(value: object) -> str:
    """JSON, which has no infinity: a limit that is none is null."""

    def plain(value: object) -> object:
        if isinstance(value, dict):
            return {key: plain(one) for key, one in value.items()}
        if isinstance(value, list | tuple):
            return [plain(one) for one in value]
        return None if value == float("inf") else value

    return json.dumps(plain(value), allow_nan=False)


def _chosen(given: str, known: object, parser: argparse.ArgumentParser) -> tuple[str, ...]:
    names = tuple(part.strip() for part in given.split(","))
    for name in names:
        if name not in known:  # type: ignore[operator]
            parser.error(f"{name!r} is none of: {', '.join(known)}")  # type: ignore[call-overload]
    return names


if __name__ == "__main__":
    main()
