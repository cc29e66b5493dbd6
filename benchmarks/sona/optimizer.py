"""`CellAdam`: Adam and the mean of its steps for many cells, of which each may go on, go back or begin anew."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ruvllm_sona.adapters import AdapterStack

_BETAS, _EPSILON = (0.9, 0.999), 1e-8  # as in the paper (arXiv 1412.6980), and as PyTorch has them


class CellAdam:
    """Changes `learning` by its gradients, and `mean` to the mean of the last `horizon` steps.

    It is one `ruvllm_sona.learner.Learner` a cell, in lockstep.
    """

    def __init__(self, learning: AdapterStack, mean: AdapterStack, learning_rate: float, horizon: int) -> None:
        self._factors, self._means = learning.parameters(), mean.parameters()
        self._moments = [[torch.zeros_like(factor) for factor in self._factors] for _ in _BETAS]
        self._rate, self._horizon = learning_rate, horizon
        self._steps = torch.zeros(len(self._factors[0]), device=self._factors[0].device)
        self._before: list[Tensor] = []

    @torch.no_grad()
    def step(self, sizes: Sequence[float]) -> None:
        """One step of each cell, its learning rate times its size; `take_back` knows what was there before."""
        self._before = [one.clone() for one in self._everything()]
        self._steps += 1
        rate = self._rate * _column(torch.tensor(sizes, device=self._steps.device))
        first, second = (_column(1.0 - beta**self._steps) for beta in _BETAS)
        share = _column(1.0 / self._steps.clamp(max=self._horizon))
        for factor, mean, m, v in zip(self._factors, self._means, *self._moments, strict=True):
            grad = factor.grad
            if grad is None:
                raise RuntimeError("a factor has no gradient")
            m.lerp_(grad, 1.0 - _BETAS[0])
            v.lerp_(grad.square(), 1.0 - _BETAS[1])
            factor.sub_(rate * (m / first) / ((v / second).sqrt() + _EPSILON))
            mean.add_((factor - mean) * share)
            factor.grad = None

    def taken(self) -> list[int]:
        """Steps of each cell since it began."""
        return [int(count) for count in self._steps.tolist()]

    @torch.no_grad()
    def take_back(self, cells: Sequence[int]) -> None:
        """Undo the last step of these cells."""
        for one, was in zip(self._everything(), self._before, strict=True):
            one[list(cells)] = was[list(cells)]

    @torch.no_grad()
    def begin_anew(self, cell: int, scale: float) -> None:
        """From the mean, whose deltas become `scale` times as large."""
        for n, (factor, mean) in enumerate(zip(self._factors, self._means, strict=True)):
            if n % 2:  # A and B take turns
                mean[cell] *= scale
            factor[cell] = mean[cell]
        for moment in (*self._moments[0], *self._moments[1]):
            moment[cell] = 0.0
        self._steps[cell] = 0.0

    def _everything(self) -> list[Tensor]:
        return [*self._factors, *self._means, *self._moments[0], *self._moments[1], self._steps]


def _column(values: Tensor) -> Tensor:
    return values[:, None, None]
