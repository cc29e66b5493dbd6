"""Ways not to forget, and the cells of a run."""

from __future__ import annotations

from dataclasses import dataclass

NONE, DAMPED, DIRECTIONS, EWC = "none", "damped", "directions", "ewc"
L2, FACTORS, REPLAY = "l2", "factors", "replay"
LABELS = {
    NONE: "without",
    DAMPED: "EWC++, directions of ΔW, damped",
    DIRECTIONS: "EWC++, directions of ΔW",
    EWC: "EWC++, numbers of ΔW",
    L2: "L2 to the anchor, of ΔW",
    FACTORS: "EWC++, numbers of A and B apart",
    REPLAY: "replay",
}


@dataclass(frozen=True)
class Arm:
    """Attributes: which way, λ of a penalty, and how many texts of each earlier task are kept for replay."""

    way: str
    strength: float = 0.0
    kept: int = 0

    @property
    def label(self) -> str:
        if self.way == REPLAY:
            return f"{LABELS[REPLAY]}, {self.kept} texts a task"
        return LABELS[self.way] + (f", λ = {self.strength:g}" if self.strength else "")


@dataclass(frozen=True)
class Cell:
    """One adapter that learns all tasks in one order, under one arm.

    `seed` is of where the adapter starts and of the texts it sees: the same for every arm.
    """

    arm: Arm
    order: tuple[int, ...]
    seed: int


def orders(tasks: int, count: int) -> list[tuple[int, ...]]:
    """Different orders in which every task is early in one and late in another: rotations by a stride."""
    base = list(range(tasks))
    found = []
    for n in range(count):
        turn = (2 * n) % tasks
        one = base[turn:] + base[:turn]
        found.append(tuple(one if n % 2 == 0 else one[::-1]))
    if len(set(found)) < count:
        raise SystemExit(f"there are no {count} orders of {tasks} tasks here")
    return found
