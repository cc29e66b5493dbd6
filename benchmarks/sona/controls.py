"""The arms: how learning is done, and what it is compared with."""

from __future__ import annotations

LEASHED = "rank 1, leash"
SHUFFLED = "shuffled rewards"
CONSTANT = "constant reward"
RANDOM = "random direction"
FREE = "rank 1, no leash"
FINAL = "final site"
ORIGINAL = "the original's rule"
DEEP = "deep loop"
INSTRUCTION = "instruction"
BEST_OF = "best of 4"
BASE = "base"

#: In the order of the table.
ARMS = (BASE, LEASHED, FREE, SHUFFLED, CONSTANT, RANDOM, FINAL, ORIGINAL, DEEP, INSTRUCTION, BEST_OF)
CHOICES = 4


def feedback_of(arm: str, score: int, before: int | None) -> float:
    """What a cell is told about an answer of this score.

    Shuffled, it is told the verdict on the answer before, which was to another prompt: the same verdicts, about
    nothing. The first of them is told 1/2, the constant arm always 1.
    """
    if arm == CONSTANT:
        return 1.0
    if arm == SHUFFLED:
        return 0.5 if before is None else float(before)
    return float(score)
