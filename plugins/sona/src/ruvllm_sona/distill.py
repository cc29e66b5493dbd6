"""Distillation on the student's own answers: what a teacher would have said where the student really goes.

The loss is the reverse Kullback-Leibler divergence KL(student ‖ teacher) over every token of answers that the student
has drawn (on-policy distillation: Agarwal et al., arXiv 2306.13649; Gu et al., arXiv 2306.08543). Teachers are the same
model with other adapters, whose effect so comes to be in one; or a larger model of the same vocabulary. Some prompts
are held out, and the divergence there is measured before and after.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import cycle, islice

import numpy as np
import torch

from ruvllm_core.errors import LearningError
from ruvllm_core.protocols import FloatArray, LowRank
from ruvllm_sona.learner import Learner, LearnerConfig
from ruvllm_sona.merge import merge
from ruvllm_sona.network import Network, padded
from ruvllm_sona.objective import ObjectiveConfig
from ruvllm_sona.records import Example
from ruvllm_sona.score import stack_of
from ruvllm_sona.sites import Deltas, start
from ruvllm_sona.update import Pass

#: Draws an answer to each prompt with an adapter and a seed each; yields None between slices, and all of them at last.
Draw = Callable[[Deltas, Sequence[Sequence[int]], Sequence[int]], Iterator[Sequence[Sequence[int]] | None]]
_PIECE = 1 << 20  # logits that are looked at in one slice


@dataclass(frozen=True)
class DistillConfig:
    """How long, and how far.

    Attributes:
        learner: rank and learning rate; the loss is always the divergence alone.
        steps: of Adam.
        batch: answers to one of them, all of one teacher.
        keep: steps from one state to resume from to the next.
        held_out: share of each teacher's prompts that it is measured by.
        measured: answers to these, of all teachers together.
        seed: of everything that is drawn.
    """

    learner: LearnerConfig = field(default_factory=lambda: LearnerConfig(rank=8, learning_rate=1e-3))
    steps: int = 100
    batch: int = 4
    keep: int = 10
    held_out: float = 0.15
    measured: int = 12
    seed: int = 0


@dataclass(frozen=True, eq=False)
class Teacher:
    """Who says what should have been said, and after which prompts."""

    network: Network
    deltas: Deltas | None
    prompts: Sequence[tuple[int, ...]]


@dataclass(frozen=True, eq=False)
class DistillProgress:
    """Where distillation is after a step.

    Attributes:
        step: steps done.
        kl: nats a token from the teacher on the answers of this step, before it.
        before, after: the same on answers to held-out prompts, by the student at the beginning and at the end.
        deltas: the student as it is now, if this was the last step.
        state: for `resume`, after every `keep` steps.
    """

    step: int
    kl: float
    before: float
    after: float | None = None
    deltas: Mapping[str, LowRank] | None = None
    state: Mapping[str, FloatArray] | None = None


def distill(
    student: Network,
    shapes: Mapping[str, tuple[int, int]],
    teachers: Sequence[Teacher],
    draw: Draw,
    config: DistillConfig,
    begin: Deltas | None = None,
    resume: DistillProgress | None = None,
) -> Iterator[DistillProgress | None]:
    """Train an adapter for `student`; yields None between slices and a `DistillProgress` after every step.

    Args:
        begin: what the student starts from; None is the base model.
        resume: a progress with its `state`: what follows is what would have followed without the interruption.

    Raises `LearningError` if there are no prompts, or the vocabularies differ.
    """
    if not any(teacher.prompts for teacher in teachers):
        raise LearningError("distillation needs prompts, there are none", hint="rate some answers first")
    for teacher in teachers:
        if student.spec.vocab_size != (size := teacher.network.spec.vocab_size):
            raise LearningError(
                f"the teacher has {size} tokens, the student {student.spec.vocab_size}",
                hint="distil from a model of the same family",
            )
    train, held = _split(teachers, config)
    learner = Learner(shapes, _only_leash(config.learner), device=str(student.device))
    if resume is not None and resume.state is not None:
        learner.restore(resume.state)
        done, kl, before = resume.step, resume.kl, resume.before
    else:
        learner.restore(_first(begin or {}, shapes, config.learner))
        done, kl = 0, 0.0
        before = yield from _divergence(student, learner.deltas(), teachers, held, draw, config)
    ends = np.cumsum([len(prompts) for prompts in train])
    for step in range(done + 1, config.steps + 1):
        random = np.random.default_rng((config.seed, step))
        which = int(np.searchsorted(ends, random.integers(ends[-1]), side="right"))
        teacher, prompts = teachers[which], train[which]
        chosen = random.choice(len(prompts), min(config.batch, len(prompts)), replace=False)
        asked, seeds = [prompts[one] for one in chosen], random.integers(2**31, size=len(chosen)).tolist()
        answers = yield from _drawn(draw, learner.deltas(), asked, seeds)
        examples = [Example("", prompt, answer, 0.5) for prompt, answer in zip(asked, answers, strict=True)]
        reference = teacher.network, stack_of(teacher.network, teacher.deltas)
        for outcome in learner.step(student, examples, [0.0] * len(examples), reference):
            kl = float(outcome.kl.mean()) if outcome is not None else kl
            yield None
        if step < config.steps:
            yield DistillProgress(step, kl, before, state=None if step % config.keep else learner.state())
    deltas = learner.deltas()
    after = yield from _divergence(student, deltas, teachers, held, draw, config)
    yield DistillProgress(max(done, config.steps), kl, before, after, deltas, learner.state())


def _split(
    teachers: Sequence[Teacher], config: DistillConfig
) -> tuple[list[list[tuple[int, ...]]], list[list[tuple[int, ...]]]]:
    """Prompts of each teacher to learn from, and others to measure by, the latter again and again if they are few.

    A teacher of one prompt has it in both.
    """
    random = np.random.default_rng((config.seed, 0))
    train, held, answers = [], [], max(config.measured // len(teachers), 1)
    for teacher in teachers:
        prompts = [tuple(teacher.prompts[i]) for i in random.permutation(len(teacher.prompts)).tolist()]
        count = min(max(round(config.held_out * len(prompts)), 1), answers)
        held.append(list(islice(cycle(prompts[:count]), answers)))
        train.append(prompts[count:] or prompts)
    return train, held


def _first(begin: Deltas, shapes: Mapping[str, tuple[int, int]], config: LearnerConfig) -> dict[str, FloatArray]:
    """A learner's state that is `begin` at the learner's rank: with idle directions added, or the best so many."""
    state: dict[str, FloatArray] = {"steps": np.zeros(1, np.float32)}
    for site, idle in start(shapes, config.rank, config.seed).items():
        a, b = idle.a, idle.b
        if (delta := begin.get(site)) is not None:
            if len(delta.a) > config.rank:
                delta = merge([delta], [1.0], config.rank).delta
            rank = len(delta.a)
            a, b = np.concatenate([delta.a, a[rank:]]), np.concatenate([delta.b * delta.scale, b[:, rank:]], axis=1)
        state[f"{site}.a"], state[f"{site}.b"] = a[None].astype(np.float32), b[None].astype(np.float32)
    return state


def _drawn(
    draw: Draw, deltas: Deltas, prompts: Sequence[Sequence[int]], seeds: Sequence[int]
) -> Generator[None, None, list[tuple[int, ...]]]:
    answers: Sequence[Sequence[int]] | None = None
    for answers in draw(deltas, prompts, seeds):  # noqa: B007
        yield None
    if not answers or not all(answers):
        raise LearningError(
            f"the student cannot answer a prompt of {max(map(len, prompts))} tokens", hint="set max_context higher"
        )
    return [tuple(answer) for answer in answers]


def _divergence(
    student: Network,
    deltas: Deltas,
    teachers: Sequence[Teacher],
    held: Sequence[Sequence[tuple[int, ...]]],
    draw: Draw,
    config: DistillConfig,
) -> Generator[None, None, float]:
    """Mean KL(student ‖ teacher), nats a token, over answers that the student draws to held-out prompts."""
    found: list[float] = []
    for teacher, prompts in zip(teachers, held, strict=True):
        for at in range(0, len(prompts), config.batch):
            asked = prompts[at : at + config.batch]
            seeds = range(config.seed + len(found), config.seed + len(found) + len(asked))
            answers = yield from _drawn(draw, deltas, asked, seeds)
            for prompt, answer in zip(asked, answers, strict=True):
                kl = yield from divergence((student, deltas), (teacher.network, teacher.deltas), prompt, answer)
                found.append(float(kl.mean()))
    return float(np.mean(found))


def divergence(
    student: tuple[Network, Deltas | None],
    teacher: tuple[Network, Deltas | None],
    prompt_ids: Sequence[int],
    output_ids: Sequence[int],
) -> Generator[None, None, FloatArray]:
    """KL(student ‖ teacher) in nats before every token of an answer, float32 ``[n]``; yields between slices."""
    states = []
    for network, deltas in (student, teacher):
        tokens = padded([[*prompt_ids, *output_ids]], network.device)
        way = Pass(network, stack_of(network, deltas), tokens=tokens, keep=False)
        yield from way.forward()
        states.append(way.x[0, len(prompt_ids) - 1 : -1])
    step, parts = max(_PIECE // student[0].spec.vocab_size, 1), []
    for at in range(0, len(output_ids), step):
        with torch.no_grad():
            own, other = (
                torch.log_softmax(network.logits(x[at : at + step]), -1)
                for (network, _), x in zip((student, teacher), states, strict=True)
            )
            parts.append((own.exp() * (own - other.to(own.device))).sum(-1).cpu().numpy())
        yield
    return np.concatenate(parts)


def _only_leash(config: LearnerConfig) -> LearnerConfig:
    return replace(config, objective=ObjectiveConfig(leash=1.0, saturation=0.0))
