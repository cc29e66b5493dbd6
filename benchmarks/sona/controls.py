"""The arms: how learning is done, and what it is compared with."""

from __future__ import annotations

BASE, LEASHED, FREE, SHUFFLED, CONSTANT, RANDOM = "base", "leashed", "free", "shuffled", "constant", "random"
FINAL, ORIGINAL, INSTRUCTION, BEST_OF = "final", "original", "instruction", "best-of-4"
DEEP, DEEP_LOG = "deep", "deep-log"

#: What the table calls them, in its order.
ARMS = {
    BASE: "base model",
    LEASHED: "whole network, rank 1, leash",
    FREE: "the same without the leash",
    SHUFFLED: "control: shuffled rewards",
    CONSTANT: "control: constant reward",
    RANDOM: "control: random direction, equal norm",
    FINAL: "final site alone",
    ORIGINAL: "control: the original's rule",
    DEEP: "deep loop on the base model's answers",
    DEEP_LOG: "deep loop on what the leashed arm heard",
    INSTRUCTION: "instruction in the prompt",
    BEST_OF: "best of 4 answers",
}
#: Those of a run that names none.
DEFAULT = tuple(arm for arm in ARMS if arm != FREE)
CHOICES = 4
#: What these are made of is what the leashed arm did.
FOLLOWERS = (RANDOM, DEEP_LOG)


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
