"""`Fleet`: cells that learn one task after the other, step by step together."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np
import torch
from torch import Tensor

from forgetting.arms import Cell
from forgetting.guards import Guard, family, guard_of
from forgetting.subject import Subject
from forgetting.tasks import Task, Texts
from ruvllm_sona.adapters import AdapterStack
from ruvllm_sona.objective import ObjectiveConfig
from ruvllm_sona.records import Example
from ruvllm_sona.sites import linear_sites, start
from ruvllm_sona.update import gradients

_TO_THE_LETTER = ObjectiveConfig(leash=0.0, saturation=0.0)


@dataclass(frozen=True)
class Training:
    """How every cell learns a task.

    Attributes:
        rank: of the adapter.
        learning_rate: of Adam, begun anew with every task.
        steps: for a task.
        batch: texts of the task to a step; replay adds as many of earlier tasks.
        average: weight of the newest task in EWC++'s moving average; 0 is the mean over tasks.
        columns: of the sketches of directions.
        damping: of the directions that are damped.
        looked: texts of a task that its Fisher information is taken from.
        rows: most rows of a batch that is only answered.
    """

    rank: int = 4
    learning_rate: float = 1e-3
    steps: int = 60
    batch: int = 8
    average: float = 0.0
    columns: int = 32
    damping: float = 1.0
    looked: int = 100
    rows: int = 2048


class Shared(AdapterStack):
    """Adapters of G cells for G·n rows: as many rows after one another have the same one."""

    def add(self, name: str, x: Tensor, y: Tensor) -> Tensor:
        if (both := self.sites.get(name)) is None:
            return y
        a, b = both
        found = torch.bmm(torch.bmm(x.reshape(len(a), -1, x.shape[-1]), a.mT), b.mT)
        return y + self.scales[name] * found.view(y.shape)


class Fleet:
    """Cells with as many texts to a step as each other; those of one family of ways are neighbours.

    Attributes:
        accuracy: of each cell after each task, on each task learned so far in its order, ``[G, tasks, tasks]``.
        moved: norm of each cell's B after each task, ``[G, tasks]``: 0 would be an adapter that does nothing.
        guards: what keeps which cells from forgetting.
    """

    def __init__(self, subject: Subject, tasks: Sequence[Task], cells: Sequence[Cell], training: Training) -> None:
        self.subject, self.tasks, self.cells, self.training = subject, list(tasks), list(cells), training
        self._device = subject.network.device
        shapes = {name: shape for name, shape in linear_sites(subject.spec).items() if name.startswith("layers.")}
        stack = AdapterStack.of([start(shapes, training.rank, cell.seed) for cell in cells], self._device).trainable()
        self.stack = Shared(stack.sites, stack.scales)
        self.guards: list[tuple[slice, Guard]] = []
        for _, some in groupby(range(len(cells)), lambda n: family(cells[n])):
            found = list(some)
            part = slice(found[0], found[-1] + 1)
            sites = {name: (a.detach()[part], b.detach()[part]) for name, (a, b) in self.stack.sites.items()}
            self.guards.append((part, guard_of(Shared(sites, stack.scales), cells[part], training)))
        self.accuracy = np.full((len(cells), len(tasks), len(tasks)), np.nan)
        self.moved = np.zeros((len(cells), len(tasks)))

    def learn(self, say: Callable[[str], None]) -> None:
        """All tasks."""
        for number in range(len(self.tasks)):
            self._task(number)
            if number + 1 < len(self.tasks):
                self._consolidate(number)
            for before in range(number + 1):
                asked = [self.tasks[cell.order[before]] for cell in self.cells]
                self.accuracy[:, number, before] = self._accuracy(asked)
            for part, _ in self.guards:
                means = " ".join(f"{one:.2f}" for one in self.accuracy[part, number, : number + 1].mean(0))
                say(f"after task {number + 1}, {self.cells[part][0].arm.way}: mean accuracy {means}")

    def _consolidate(self, number: int) -> None:
        for part, guard in self.guards:
            if guard.looks:
                own = [self.tasks[cell.order[number]].train for cell in self.cells[part]]
                for batch in self._looks(own, self.training.batch, self.training.looked):
                    guard.look(self.subject, *batch)
                guard.consolidate(number)

    def _task(self, number: int) -> None:
        training = self.training
        adam = torch.optim.Adam(self.stack.parameters(), lr=training.learning_rate, foreach=True)
        draws = [self._batches(cell, number) for cell in self.cells]
        for _ in range(training.steps):
            examples = [one for cell in draws for one in next(cell)]
            share = len(self.cells) / len(examples)
            adam.zero_grad()
            work = gradients(self.subject.network, self.stack, examples, [share] * len(examples), _TO_THE_LETTER)
            for _ in work:
                pass
            adam.step()
            if number:
                for _, guard in self.guards:
                    guard.hold()
        if not all(bool(torch.isfinite(factor).all()) for factor in self.stack.parameters()):
            raise ArithmeticError("an adapter is not finite")
        squares = torch.stack([b.detach().square().sum((1, 2)) for _, b in self.stack.sites.values()])
        self.moved[:, number] = squares.sum(0).sqrt().cpu().numpy()

    def _batches(self, cell: Cell, number: int) -> Iterator[list[Example]]:
        """Batches of a task, every text once before any twice; with replay, as many of earlier tasks besides."""
        task, batch = self.tasks[cell.order[number]], self.training.batch
        random = np.random.default_rng((cell.seed, cell.order[number]))
        others = np.random.default_rng((cell.seed, number, 1))
        kept = [
            (self.tasks[before], int(one))
            for before in cell.order[:number]
            for one in np.random.default_rng((cell.seed, before, 2)).permutation(len(self.tasks[before].train))[
                : cell.arm.kept
            ]
        ]
        left: list[int] = []
        while True:
            while len(left) < batch:
                left += random.permutation(len(task.train)).tolist()
            found = [_example(task, n) for n in left[:batch]]
            left = left[batch:]
            if kept:
                found += [_example(*kept[n]) for n in others.integers(0, len(kept), batch)]
            yield found

    def _looks(self, texts: Sequence[Texts], each: int, count: int | None = None) -> Iterator[tuple[Tensor, Tensor]]:
        """The first `count` texts of each cell or all, `each` at a time: tokens ``[G·n, T]`` and lengths ``[G·n]``."""
        count = min(min(map(len, texts)), count or len(texts[0]))
        for first in range(0, count, each):
            part = slice(first, min(first + each, count))
            parts = [(one.tokens[part], one.lengths[part]) for one in texts]
            longest = max(int(lengths.max()) for _, lengths in parts)
            tokens = torch.cat([torch.nn.functional.pad(ids, (0, longest))[:, :longest] for ids, _ in parts])
            yield tokens.to(self._device), torch.cat([lengths for _, lengths in parts]).to(self._device)

    @torch.no_grad()
    def _accuracy(self, tasks: Sequence[Task]) -> np.ndarray:
        right = torch.zeros(len(self.cells), device=self._device)
        done = 0
        network, answers = self.subject.network, self._answers(tasks)
        for tokens, lengths in self._looks([one.test for one in tasks], max(1, self.training.rows // len(tasks))):
            x = network.hidden(tokens, self.stack)[torch.arange(len(tokens), device=self._device), lengths - 1]
            count = len(tokens) // len(tasks)
            logits = network.logits(x).view(len(tasks), count, -1)
            letters = logits.gather(2, answers[:, None].clamp(min=0).expand(-1, count, -1))
            found = letters.masked_fill(answers[:, None] < 0, float("-inf")).argmax(-1)
            wanted = torch.stack([one.test.labels[done : done + count] for one in tasks]).to(self._device)
            right += (found == wanted).float().sum(1)
            done += count
        return (right / done).cpu().numpy()

    def _answers(self, tasks: Sequence[Task]) -> Tensor:
        """Tokens of each cell's letters, -1 where its task has fewer."""
        longest = max(len(one.answers) for one in tasks)
        rows = [[*one.answers, *[-1] * (longest - len(one.answers))] for one in tasks]
        return torch.tensor(rows, device=self._device)


def _example(task: Task, n: int) -> Example:
    return Example("", task.train.prompt(n), (task.answers[int(task.train.labels[n])],), 1.0)
