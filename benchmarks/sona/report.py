"""Tables and confidence intervals."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from sona.controls import ARMS, BASE
from sona.measures import Measured

_RESAMPLES = 10_000


def interval(values: Sequence[float], resamples: int = _RESAMPLES) -> tuple[float, float]:
    """95 % of the means of samples drawn with replacement (Efron's percentile bootstrap)."""
    rng = np.random.default_rng(0)
    drawn = rng.choice(np.asarray(values, np.float64), (resamples, len(values))).mean(1)
    low, high = np.percentile(drawn, [2.5, 97.5])
    return float(low), float(high)


def base_scores(rows: Sequence[Measured]) -> dict[tuple[str, int], float]:
    return {(row.cell.task_name, row.cell.seed): row.score for row in rows if row.cell.arm == BASE}


def summary(rows: Sequence[Measured]) -> list[dict[str, Any]]:
    """One entry for each arm and number of feedbacks: gains are points over the base model, cell by cell."""
    base = base_scores(rows)
    groups: Mapping[tuple[str, int], list[Measured]] = defaultdict(list)
    for row in rows:
        groups[row.cell.arm, row.feedback].append(row)
    found = []
    for arm, feedback in sorted(groups, key=lambda key: (list(ARMS).index(key[0]), key[1])):
        own = groups[arm, feedback]
        gains = [100 * (row.score - base[row.cell.task_name, row.cell.seed]) for row in own]
        tasks: dict[str, list[float]] = defaultdict(list)
        for row, gain in zip(own, gains, strict=True):
            tasks[row.cell.task_name].append(gain)
        found.append(
            {
                "arm": arm,
                "feedback": feedback,
                "cells": len(own),
                "score": float(np.mean([row.score for row in own])),
                "gain": float(np.mean(gains)),
                "gain_interval": interval(gains),
                "perplexity_percent": 100 * (float(np.mean([row.perplexity for row in own])) - 1),
                "perplexity_worst_percent": 100 * (max(row.perplexity for row in own) - 1),
                "kl": float(np.mean([row.kl for row in own])),
                "on_topic": float(np.mean([row.on_topic for row in own])),
                "gain_by_task": {task: float(np.mean(values)) for task, values in tasks.items()},
            }
        )
    return found


def print_tables(rows: Sequence[Measured]) -> None:
    """What the model does unasked, what each arm gained, and what each gained by task."""
    tasks = list(dict.fromkeys(row.cell.task_name for row in rows))
    base = base_scores(rows)
    print("| task | " + " | ".join(tasks) + " |\n| --- |" + " --- |" * len(tasks))
    means = [np.mean([score for (name, _), score in base.items() if name == task]) for task in tasks]
    print("| fulfilled by chance | " + " | ".join(f"{mean:.2f}" for mean in means) + " |\n")
    print("| arm | feedbacks | gain, points (95 %) | perplexity, mean (worst) | KL a token | on topic |")
    print("| --- | --- | --- | --- | --- | --- |")
    entries = summary(rows)
    for one in entries:
        low, high = one["gain_interval"]
        gain = "–" if one["arm"] == BASE else f"{one['gain']:+.1f} ({low:+.1f} to {high:+.1f})"
        worse = f"{one['perplexity_percent']:+.1f} % ({one['perplexity_worst_percent']:+.1f})"
        print(
            f"| {ARMS[one['arm']]} | {one['feedback']} | {gain} | {worse} | {one['kl']:.3f} | {one['on_topic']:.2f} |"
        )
    print("\n| gain, points | feedbacks | " + " | ".join(tasks) + " |\n| --- | --- |" + " --- |" * len(tasks))
    for one in entries:
        if one["arm"] != BASE:
            by_task = " | ".join(f"{one['gain_by_task'].get(task, 0.0):+.0f}" for task in tasks)
            print(f"| {ARMS[one['arm']]} | {one['feedback']} | {by_task} |")
