"""What is counted, and the tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from forgetting.arms import Arm, Cell

_RESAMPLES = 10_000


@dataclass(frozen=True, eq=False)
class Row:
    """One cell, done.

    Attributes:
        accuracy: after each task, on each task in the order they were learned, ``[tasks, tasks]``; NaN before that.
        moved: norm of B after each task.
    """

    cell: Cell
    accuracy: npt.NDArray[np.float64]
    moved: npt.NDArray[np.float64]

    @property
    def learned(self) -> float:
        """Mean accuracy on each task right after it was learned."""
        return float(np.mean(np.diag(self.accuracy)))

    @property
    def forgotten(self) -> float:
        """Mean over all tasks but the last of the best accuracy there was before the last task, less that after it."""
        earlier = self.accuracy[:-1, :-1]
        return float(np.mean(np.nanmax(earlier, axis=0) - self.accuracy[-1, :-1]))

    @property
    def final(self) -> float:
        """Mean accuracy on all tasks at the end."""
        return float(np.mean(self.accuracy[-1]))

    def plain(self) -> dict[str, Any]:
        cell = self.cell
        return {
            "way": cell.arm.way, "strength": cell.arm.strength, "kept": cell.arm.kept, "order": cell.order,
            "seed": cell.seed, "accuracy": [[None if np.isnan(x) else round(float(x), 4) for x in row]
                                            for row in self.accuracy],
            "moved": [round(float(x), 3) for x in self.moved],
        }  # fmt: skip


@dataclass(frozen=True)
class Summary:
    """Means over the cells of an arm, and against those without anything, of the same orders and seeds.

    Attributes:
        learned_share: learning accuracy as a share of that without.
        change: of average forgetting, as a share: -0.5 is half as much; None where there is none.
        interval: 95 % of resampled cells (Efron's percentile bootstrap, pairs of cells) have a change between these;
            None if a sample without anything forgets nothing.
    """

    arm: Arm
    cells: int
    learned: float
    forgotten: float
    final: float
    learned_share: float
    change: float | None
    interval: tuple[float, float] | None


def summarize(rows: Sequence[Row], without: Sequence[Row]) -> list[Summary]:
    """One for each arm, in the order of `rows`."""
    base = {(row.cell.order, row.cell.seed): row for row in without}
    groups: dict[Arm, list[Row]] = {}
    for row in rows:
        groups.setdefault(row.cell.arm, []).append(row)
    found = []
    for arm, own in groups.items():
        others = [base[row.cell.order, row.cell.seed] for row in own]
        kept, lost = (np.array([row.forgotten for row in some]) for some in (own, others))
        learned, best = (float(np.mean([row.learned for row in some])) for some in (own, others))
        draws = np.random.default_rng(0).integers(0, len(own), (_RESAMPLES, len(own)))
        changes = _change(kept[draws].mean(1), lost[draws].mean(1))
        low, high = np.percentile(changes, [2.5, 97.5]).tolist()
        found.append(
            Summary(
                arm=arm,
                cells=len(own),
                learned=learned,
                forgotten=float(kept.mean()),
                final=float(np.mean([row.final for row in own])),
                learned_share=learned / best,
                change=float(_change(kept.mean(), lost.mean())) if lost.mean() > 0 else None,
                interval=(low, high) if np.isfinite([low, high]).all() else None,
            )
        )
    return found


def _change(forgotten: Any, without: Any) -> Any:
    return np.where(without > 0, forgotten / np.where(without > 0, without, 1.0) - 1.0, np.nan)


def choose(rows: Sequence[Row], without: Sequence[Row], way: str, least: float) -> Arm | None:
    """Of a way's strengths, the one that forgets least among those that learn at least that share; None if none does.

    If the accuracy at the end is better elsewhere, so be it: what is asked for is forgetting at a learning accuracy.
    """
    fit = [one for one in summarize(rows, without) if one.arm.way == way and one.learned_share >= least]
    return min(fit, key=lambda one: one.forgotten).arm if fit else None


def table(title: str, found: Sequence[Summary], memory: Mapping[Arm, int]) -> str:
    """Markdown; bytes are what an arm keeps of earlier tasks, after the last of them."""
    lines = [
        f"### {title}",
        "",
        "| arm | cells | learning accuracy | share of without | average forgetting, points | against without (95 %) "
        "| accuracy at the end | kept, bytes |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for one in found:
        against = "–" if one.change is None else f"{100 * one.change:+.0f} %"
        if one.interval is not None:
            against += f" ({100 * one.interval[0]:+.0f} to {100 * one.interval[1]:+.0f})"
        lines.append(
            f"| {one.arm.label} | {one.cells} | {100 * one.learned:.1f} % | {100 * one.learned_share:.1f} % "
            f"| {100 * one.forgotten:.1f} | {against} | {100 * one.final:.1f} % | {memory.get(one.arm, 0):,} |"
        )
    return "\n".join([*lines, ""])
