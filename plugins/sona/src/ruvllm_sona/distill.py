"""Distillation on the student's own answers: what a teacher would have said where the student really goes.

The loss is the reverse Kullback-Leibler divergence KL(student ‖ teacher) over every token of answers that the student
has drawn (on-policy distillation: Agarwal et al., arXiv 2306.13649; Gu et al., arXiv 2306.08543). The teacher is the
same model with other adapters, whose effect so comes to be in one; or a larger model of the same vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from ruvllm_core.errors import LearningError
from ruvllm_core.protocols import LowRank
from ruvllm_sona.learner import Learner, LearnerConfig
from ruvllm_sona.network import Network
from ruvllm_sona.objective import ObjectiveConfig
from ruvllm_sona.records import Example
from ruvllm_sona.score import stack_of
from ruvllm_sona.sites import Deltas

#: Draws an answer to a prompt with an adapter; yields None between slices, and its tokens at last.
Draw = Callable[[Deltas, Sequence[int]], Iterator[Sequence[int] | None]]


@dataclass(frozen=True)
class DistillConfig:
    """How long, and how far.

    Attributes:
        learner: rank and learning rate; the loss is always the divergence alone.
        steps: of Adam.
        batch: answers to one of them.
        seed: of the order of prompts.
    """

    learner: LearnerConfig = field(default_factory=lambda: LearnerConfig(rank=8, learning_rate=1e-3))
    steps: int = 100
    batch: int = 4
    seed: int = 0


@dataclass(frozen=True, eq=False)
class DistillProgress:
    """After a step: nats a token from the teacher, before it; and the student as it is now, if this was the last."""

    step: int
    kl: float
    deltas: Mapping[str, LowRank] | None


def distill(
    student: Network,
    shapes: Mapping[str, tuple[int, int]],
    teacher: tuple[Network, Deltas | None],
    prompts: Sequence[Sequence[int]],
    draw: Draw,
    config: DistillConfig,
) -> Iterator[DistillProgress | None]:
    """Train a new adapter for `student`; yields None between slices and a `DistillProgress` after every step.

    Raises `LearningError` if there are no prompts, or the two have different vocabularies.
    """
    if not prompts:
        raise LearningError("distillation needs prompts, there are none", hint="ask the model something first")
    if student.spec.vocab_size != teacher[0].spec.vocab_size:
        raise LearningError(
            f"the teacher has {teacher[0].spec.vocab_size} tokens, the student {student.spec.vocab_size}",
            hint="distil from a model of the same family",
        )
    learner = Learner(shapes, _only_leash(config.learner), device=str(student.device))
    reference = teacher[0], stack_of(*teacher)
    random = np.random.default_rng(config.seed)
    for step in range(config.steps):
        examples: list[Example] = []
        deltas = learner.deltas()
        while len(examples) < min(config.batch, len(prompts)):
            prompt = prompts[int(random.integers(len(prompts)))]
            answer: Sequence[int] | None = None
            for answer in draw(deltas, prompt):  # noqa: B007
                yield None
            if answer:
                examples.append(Example("", tuple(prompt), tuple(answer), 0.5))
        kl = 0.0
        for outcome in learner.step(student, examples, [0.0] * len(examples), reference):
            kl = float(outcome.kl.mean()) if outcome is not None else kl
            yield None
        yield DistillProgress(step + 1, kl, learner.deltas() if step + 1 == config.steps else None)


def _only_leash(config: LearnerConfig) -> LearnerConfig:
    return replace(config, objective=ObjectiveConfig(leash=1.0, saturation=0.0))
