"""The deep loop on stored feedback, many cells in lockstep: each as the plugin's own deep training would do it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from ruvllm_sona.adapters import AdapterStack
from ruvllm_sona.deep import DeepConfig, batches, split
from ruvllm_sona.leash_texts import leash_piece
from ruvllm_sona.network import Network, padded
from ruvllm_sona.records import Example
from ruvllm_sona.sites import linear_sites, start
from ruvllm_sona.update import gradients
from sona.cells import Cell
from sona.gating import finished
from sona.lockstep import TEMPERATURE, copied, picked
from sona.measures import HeldOut
from sona.optimizer import CellAdam
from sona.subject import Subject
from sona.texts import FEEDBACK_LUCK, uniforms


def stored(
    subject: Subject, cells: Sequence[Cell], feedback: int, max_tokens: int, at_once: int
) -> list[list[Example]]:
    """What each cell's user thought of the base model's answers to its prompts."""
    seeds = sorted({cell.seed for cell in cells})
    prompts = {seed: _of(cells, seed).feedback_prompts(feedback) for seed in seeds}
    luck = [uniforms(feedback, max_tokens, FEEDBACK_LUCK, seed) for seed in seeds]
    answered = HeldOut(subject, feedback, max_tokens, at_once).answers(
        [[one.text for one in prompts[seed]] for seed in seeds], luck, None
    )
    answers = dict(zip(seeds, answered, strict=True))
    return [
        [
            Example("", subject.chat(asked.text), answer, float(cell.task.score(subject.text(answer))), TEMPERATURE)
            for asked, answer in zip(prompts[cell.seed], answers[cell.seed], strict=True)
        ]
        for cell in cells
    ]


@dataclass(eq=False)
class _Student:
    """One cell: what it learns from, what it is judged by, and the best it has been."""

    row: int
    train: list[Example]
    held: list[Example]
    seed: int
    margin: float = 0.0
    best: float = 0.0
    since: int = 0


def train(
    network: Network, cells: Sequence[Cell], told: Sequence[Sequence[Example]], texts: Sequence[Sequence[int]],
    config: DeepConfig, at_once: int,
) -> tuple[AdapterStack, list[int]]:  # fmt: skip
    """An adapter for each cell, and which cells have one; those of the others change nothing.

    Args:
        told: what each cell was told.
        texts: on the leash, besides.
        at_once: texts in one backward pass.
    """
    shapes, learner = linear_sites(network.spec), config.learner
    learning = AdapterStack.of([start(shapes, learner.rank, cell.seed) for cell in cells], network.device).trainable()
    mean, best = copied(learning), copied(learning)
    adam = CellAdam(learning, mean, learner.learning_rate, learner.average)
    students = []
    for row, (cell, examples) in enumerate(zip(cells, told, strict=True)):
        if 0 < sum(one.quality > 0.5 for one in examples) < len(examples):
            own, held = split(examples, replace(config, seed=cell.seed))
            students.append(_Student(row, own, held, cell.seed))
    active = list(students)
    for epoch in range(config.epochs):
        rounds = [list(batches(one.train, replace(config, seed=one.seed), epoch)) for one in active]
        for step in range(max(map(len, rounds), default=0)):
            jobs = [
                (one.row, example, weight)
                for one, steps in zip(active, rounds, strict=True) if step < len(steps)
                for example, weight in zip(*steps[step], strict=True)
            ]  # fmt: skip
            for first in range(0, len(jobs), at_once):
                rows, examples, weights = zip(*jobs[first : first + at_once], strict=True)
                finished(gradients(network, picked(learning, rows), examples, weights, learner.objective))
            stepping = [one.row for one, steps in zip(active, rounds, strict=True) if step < len(steps)]
            taken = adam.taken()
            for first in range(0, len(stepping), at_once):
                rows = stepping[first : first + at_once]
                pieces = [leash_piece(texts, taken[row]) for row in rows]
                finished(gradients(network, picked(learning, rows), (), (), learner.objective, texts=pieces))
            adam.step([1.0] * len(cells))
            adam.take_back(sorted(set(range(len(cells))) - set(stepping)))
        _judge(network, active, mean, at_once)
        for one in active:
            better = one.margin > one.best
            one.since = 0 if better else one.since + 1
            if better:
                one.best = one.margin
                for into, factor in zip(best.parameters(), mean.parameters(), strict=True):
                    into[one.row] = factor[one.row]
        active = [one for one in active if one.since <= config.patience]
    return best, [one.row for one in students if one.best > 0.0]


@torch.no_grad()
def _judge(network: Network, students: Sequence[_Student], mean: AdapterStack, at_once: int) -> None:
    """Each student's margin, that of `ruvllm_sona.deep`."""
    jobs = [(one, example) for one in students for example in one.held]
    moved: list[float] = []
    for first in range(0, len(jobs), at_once):
        part = jobs[first : first + at_once]
        examples = [example for _, example in part]
        own = _mean_logprobs(network, picked(mean, [one.row for one, _ in part]), examples)
        base = _mean_logprobs(network, AdapterStack({}, {}), examples)
        moved += (own - base).tolist()
    for one in students:
        found = [(gain, example.quality > 0.5) for (who, example), gain in zip(jobs, moved, strict=True) if who is one]
        good, bad = ([gain for gain, kind in found if kind is wanted] for wanted in (True, False))
        one.margin = float(np.mean(good) - np.mean(bad))


def _mean_logprobs(network: Network, rows: AdapterStack, examples: Sequence[Example]) -> torch.Tensor:
    device = network.device
    tokens = padded([[*one.prompt_ids, *one.output_ids] for one in examples], device)
    lengths = torch.tensor([len(one.output_ids) for one in examples], device=device)
    owner = torch.repeat_interleave(torch.arange(len(examples), device=device), lengths)
    places = torch.cat([torch.arange(len(one.output_ids), device=device) + len(one.prompt_ids) for one in examples])
    logp = torch.log_softmax(network.logits(network.hidden(tokens, rows)[owner, places - 1]), -1)
    found = logp.gather(1, tokens[owner, places, None])[:, 0]
    return torch.zeros(len(examples), device=device).index_add_(0, owner, found) / lengths


def _of(cells: Sequence[Cell], seed: int) -> Cell:
    return next(cell for cell in cells if cell.seed == seed)
