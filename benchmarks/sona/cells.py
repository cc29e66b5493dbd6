"""`Cell`: one run of learning. All cells of a fleet learn in lockstep."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ruvllm_sona.patterns import BankConfig
from sona.tasks import TASKS, Prompt, Task, prompts


@dataclass(frozen=True)
class Cell:
    """One task under one arm; the seed gives its prompts, its luck and where its adapter starts."""

    arm: str
    task_name: str
    seed: int

    @property
    def task(self) -> Task:
        return TASKS[self.task_name]

    def feedback_prompts(self, count: int) -> list[Prompt]:
        return prompts("feedback", count, self.seed)

    def held_out_prompts(self, count: int) -> list[Prompt]:
        return prompts("held-out", count, self.seed)


class Baseline:
    """What is expected of each cell: the mean of its feedback so far, and of one that was 1/2 before any came.

    It is that of a pattern of prompts in the plugin, and like it looks back no further than `horizon`.
    """

    def __init__(self, cells: int, horizon: int = BankConfig().baseline_horizon) -> None:
        self._means, self._count, self._horizon = [0.5] * cells, 0, horizon

    def advantages(self, qualities: Sequence[float]) -> list[float]:
        """How much better each is than expected, which it then becomes part of."""
        found = [quality - mean for quality, mean in zip(qualities, self._means, strict=True)]
        self._count += 1
        part = 1.0 / min(self._count + 1, self._horizon)
        self._means = [mean + part * ahead for mean, ahead in zip(self._means, found, strict=True)]
        return found


def random_direction(start: Tensor, end: Tensor, generator: torch.Generator) -> Tensor:
    """As far from `start` as `end` is, factor by factor ``[G, …]``, but in a direction drawn blindly."""
    drawn = torch.randn(start.shape, generator=generator).to(start.device)
    shape = (len(start), *[1] * (start.dim() - 1))
    wanted, found = ((end - start).flatten(1).norm(dim=1), drawn.flatten(1).norm(dim=1))
    moved: Tensor = start + drawn * (wanted / found).view(shape)
    return moved
