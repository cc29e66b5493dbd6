"""The arms that learn nothing: the model as it is, told what is wanted, or asked several times."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sona.controls import BASE, BEST_OF, CHOICES, INSTRUCTION
from sona.measures import HeldOut, Measured, held_out_luck, judged
from sona.tasks import prompts

if TYPE_CHECKING:
    from sona.run import Plan


def base_texts(plan: Plan, held_out: HeldOut, draw: int = 0) -> list[list[str]]:
    """The base model's held-out answers, for each seed."""
    asked = [[one.text for one in prompts("held-out", plan.held_out, seed)] for seed in range(plan.seeds)]
    luck = [held_out_luck(seed, plan.held_out, plan.max_tokens, draw) for seed in range(plan.seeds)]
    return held_out.texts(asked, luck, None)


def base(plan: Plan, texts: list[list[str]]) -> list[Measured]:
    """What each task's score is without learning; always measured, as gains are differences from it."""
    return [
        Measured(cell, 0, *judged(cell, cell.held_out_prompts(plan.held_out), texts[cell.seed]))
        for cell in plan.with_arm(BASE)
    ]


def instruction(plan: Plan, held_out: HeldOut) -> list[Measured]:
    """The wish is written below every prompt."""
    cells = plan.with_arm(INSTRUCTION)
    asked = [cell.held_out_prompts(plan.held_out) for cell in cells]
    luck = [held_out_luck(cell.seed, plan.held_out, plan.max_tokens) for cell in cells]
    wishes = [[f"{one.text}\n{cell.task.instruction}" for one in own] for cell, own in zip(cells, asked, strict=True)]
    texts = held_out.texts(wishes, luck, None)
    return [
        Measured(cell, 0, *judged(cell, own, answers)) for cell, own, answers in zip(cells, asked, texts, strict=True)
    ]


def best_of(plan: Plan, held_out: HeldOut, first: list[list[str]]) -> list[Measured]:
    """The first of four answers that fulfils the wish, or the first: what somebody who can judge gets by patience."""
    draws = [first, *(base_texts(plan, held_out, draw) for draw in range(1, CHOICES))]
    rows = []
    for cell in plan.with_arm(BEST_OF):
        choices = list(zip(*(texts[cell.seed] for texts in draws), strict=True))
        picked = [next((text for text in four if cell.task.score(text)), four[0]) for four in choices]
        rows.append(Measured(cell, 0, *judged(cell, cell.held_out_prompts(plan.held_out), picked)))
    return rows
