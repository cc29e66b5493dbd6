"""Two stages: strengths are chosen on one seed, and what was chosen is measured on others."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from forgetting import arms
from forgetting.arms import Arm, Cell
from forgetting.lockstep import Fleet, Training
from forgetting.report import Row, Summary, choose, summarize, table
from forgetting.subject import Subject
from forgetting.tasks import Task, load

#: Replay has twice as many texts to a step.
_TOGETHER = ((arms.NONE, arms.DAMPED, arms.DIRECTIONS, arms.EWC, arms.L2, arms.FACTORS), (arms.REPLAY,))


@dataclass(frozen=True)
class Plan:
    """What is run; `grids` are the strengths that each way chooses from."""

    model: str
    data: Path
    tasks: int
    each: int
    longest: int
    orders: int
    seeds: int
    grids: dict[str, tuple[float, ...]]
    replay: tuple[int, ...]
    least: float
    device: str
    dtype: str
    at_once: int
    training: Training


def run(plan: Plan, say: Callable[[str], None]) -> dict[str, Any]:
    """Prints tables as they come; returns all rows and summaries."""
    subject = Subject.load(plan.model, plan.device, plan.dtype)
    tasks = load(plan.data, subject.tokenizer, tasks=plan.tasks, each=plan.each, longest=plan.longest)
    if subject.network.device.type == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = True
    sequences = arms.orders(len(tasks), plan.orders)
    memory: dict[Arm, int] = {}
    say(f"{len(tasks)} tasks, orders {sequences}")

    def learn(chosen: Sequence[Arm], seeds: Sequence[int]) -> list[Row]:
        cells = [Cell(arm, order, seed) for arm in chosen for order in sequences for seed in seeds]
        rows = [row for ways in _TOGETHER for row in _learn(subject, tasks, cells, ways, plan, memory, say)]
        return sorted(rows, key=lambda row: chosen.index(row.cell.arm))

    without = Arm(arms.NONE)
    replays = [Arm(arms.REPLAY, kept=kept) for kept in plan.replay]
    strengths = [Arm(way, strength) for way, grid in plan.grids.items() for strength in grid]
    tried = learn([without, *strengths], [0])
    base = [row for row in tried if row.cell.arm == without]
    print(table("Seed 0, all strengths: here they are chosen", summarize(tried, base), memory), flush=True)
    picked = {way: choose(tried, base, way, plan.least) for way in plan.grids}
    for way, arm in picked.items():
        rule = f"least forgetting of those that learn at least {100 * plan.least:.0f} % of without"
        print(f"- {arms.LABELS[way]}: {rule}: {'none does' if arm is None else f'λ = {arm.strength:g}'}")
    print(flush=True)
    final = learn([without, *(arm for arm in picked.values() if arm), *replays], range(1, plan.seeds + 1))
    base = [row for row in final if row.cell.arm == without]
    found = summarize(final, base)
    print(table(f"Seeds 1 to {plan.seeds}, {plan.orders} orders: here it is measured", found, memory), flush=True)
    print(_memory(found, memory, tasks), flush=True)
    return {
        "tasks": [one.name for one in tasks],
        "training": asdict(plan.training),
        "chosen_on_seed_0": {way: arm.strength if arm else None for way, arm in picked.items()},
        "summary": [{**asdict(one), "memory_bytes": memory.get(one.arm, 0)} for one in found],
        "rows": [row.plain() for row in [*tried, *final]],
    }


def _learn(
    subject: Subject, tasks: Sequence[Task], cells: Sequence[Cell], ways: Sequence[str], plan: Plan,
    memory: dict[Arm, int], say: Callable[[str], None],
) -> list[Row]:  # fmt: skip
    own = [cell for cell in cells if cell.arm.way in ways]
    found: list[Row] = []
    rows = max(1, plan.at_once // (2 if arms.REPLAY in ways else 1))
    for first in range(0, len(own), rows):
        fleet = Fleet(subject, tasks, own[first : first + rows], plan.training)
        fleet.learn(say)
        for n, cell in enumerate(fleet.cells):
            found.append(Row(cell, fleet.accuracy[n], fleet.moved[n]))
            guard = next(guard for part, guard in fleet.guards if part.start <= n < part.stop)
            memory[cell.arm] = _replayed(tasks, cell) if cell.arm.way == arms.REPLAY else guard.kept
    return found


def _memory(found: Sequence[Summary], memory: dict[Arm, int], tasks: Sequence[Task]) -> str:
    """What the bytes of a penalty would hold of texts: replay of equal memory is replay of so many."""
    each = sum(2 * float(one.train.lengths.float().mean()) + 1 for one in tasks) / len(tasks)
    lines = [
        f"- {one.arm.label}: its bytes hold {round(memory[one.arm] / each / max(1, len(tasks) - 1)):,} texts of each "
        f"earlier task; there are {len(tasks[0].train)} to learn from"
        for one in found
        if one.arm.strength
    ]
    return "\n".join(lines)


def _replayed(tasks: Sequence[Task], cell: Cell) -> int:
    """Bytes of the kept texts as token ids of two bytes and a label of one."""
    used = 0
    for n in cell.order[:-1]:
        lengths = tasks[n].train.lengths
        used += round(min(cell.arm.kept, len(lengths)) * (2 * float(lengths.float().mean()) + 1))
    return used
