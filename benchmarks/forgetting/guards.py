"""What keeps cells from forgetting, apart from replay: nothing, or a proximal step after every step of Adam."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Generic, TypeVar

import torch
from torch import Tensor

from forgetting import arms
from forgetting.arms import Cell
from forgetting.subject import Subject
from ruvllm_sona import consolidate, curvature
from ruvllm_sona.adapters import AdapterStack
from ruvllm_sona.consolidate import Probe, answer_fisher
from ruvllm_sona.curvature import DirectionProbe, Hold, Sketch

if TYPE_CHECKING:
    from forgetting.lockstep import Training

ProbeT = TypeVar("ProbeT", bound=AdapterStack)


class Guard:
    """Keeps nothing; the base of those that do.

    Attributes:
        looks: whether it wants to look at texts of a task that was learned.
        kept: bytes that are kept of earlier tasks, for one cell.
    """

    looks = False
    kept = 0

    def look(self, subject: Subject, tokens: Tensor, lengths: Tensor) -> None:
        """Look at texts of the task just learned."""

    def consolidate(self, number: int) -> None:
        """Keep what was learned up to task `number`."""

    def hold(self) -> None:
        """After a step of Adam."""


class FisherGuard(Guard, Generic[ProbeT]):
    """Keeps Fisher information, whatever of, and the adapters around which it was taken."""

    looks = True

    def __init__(self, stack: AdapterStack, cells: Sequence[Cell], training: Training) -> None:
        device = stack.parameters()[0].device
        self._stack, self._training = stack, training
        self._strength = torch.tensor([training.learning_rate * cell.arm.strength for cell in cells], device=device)
        self._random = torch.Generator(device).manual_seed(0)
        self._probe: ProbeT | None = None

    def look(self, subject: Subject, tokens: Tensor, lengths: Tensor) -> None:
        if self._probe is None:
            self._probe = self._begin()
        for _ in answer_fisher(subject.network, self._probe, tokens, lengths - 1, self._random):
            pass
        for factor in self._stack.parameters():
            factor.grad = None

    def consolidate(self, number: int) -> None:
        if self._probe is None:
            raise RuntimeError("nothing was looked at")
        probe, self._probe = self._probe, None
        self._keep(probe, self._training.average or 1.0 / (number + 1))

    def _begin(self) -> ProbeT:
        raise NotImplementedError

    def _keep(self, probe: ProbeT, weight: float) -> None:
        """Average what a probe found with what was there, and keep the adapters as they are."""
        raise NotImplementedError


class ProductGuard(FisherGuard[Probe]):
    """EWC++ of ΔW, number by number, and L2 as its special case; λ may differ from cell to cell."""

    def __init__(self, stack: AdapterStack, cells: Sequence[Cell], training: Training) -> None:
        super().__init__(stack, cells, training)
        self._plain = torch.tensor([cell.arm.way == arms.L2 for cell in cells], device=self._strength.device)[:, None]
        self._fisher: dict[str, tuple[Tensor, Tensor]] = {}
        self._anchor = stack

    def _begin(self) -> Probe:
        return Probe(self._stack)

    def _keep(self, probe: Probe, weight: float) -> None:
        now = consolidate.normalized(probe)
        found = consolidate.averaged(self._fisher, now, weight) if self._fisher else now
        for name, (u, v) in consolidate.all_alike(self._stack).items():
            found[name] = torch.where(self._plain, u, found[name][0]), torch.where(self._plain, v, found[name][1])
        self._fisher, self._anchor = found, consolidate.held(self._stack)
        factors = [factor[0].numel() for factor in self._anchor.parameters()]
        self.kept = 4 * (sum(factors) + sum(u.shape[1] + v.shape[1] for u, v in found.values()))

    def hold(self) -> None:
        consolidate.prox(self._stack, self._anchor, self._fisher, self._strength)


class DirectionGuard(FisherGuard[DirectionProbe]):
    """EWC++ of ΔW with Fisher information that knows directions."""

    def __init__(self, stack: AdapterStack, cells: Sequence[Cell], training: Training) -> None:
        super().__init__(stack, cells, training)
        self._damping = training.damping if cells[0].arm.way == arms.DAMPED else 0.0
        self._fisher: dict[str, tuple[Sketch, Sketch]] = {}
        self._hold: Hold | None = None

    def _begin(self) -> DirectionProbe:
        return DirectionProbe(self._stack, self._training.columns)

    def _keep(self, probe: DirectionProbe, weight: float) -> None:
        now = curvature.normalized(probe.found)
        self._fisher = curvature.averaged(self._fisher, now, weight) if self._fisher else now
        self._hold = None  # room for the next
        self._hold = Hold(self._stack, self._fisher, self._damping)
        factors = [factor[0].numel() for factor in self._stack.parameters()]
        self.kept = 4 * sum(factors) + sum(8 * one.image[0].numel() for both in self._fisher.values() for one in both)

    def hold(self) -> None:
        if self._hold is not None:
            self._hold.prox(self._stack, self._strength)


class FactorProbe(Probe):
    """Squares of gradients by A and by B themselves, summed over tokens, not of ΔW."""

    def add(self, name: str, x: Tensor, y: Tensor) -> Tensor:
        y = self._stack.add(name, x, y)
        if name not in self.sites or not y.requires_grad:
            return y
        a, b = (factor.detach() for factor in self.sites[name])
        x = x.detach()

        def back(grad: Tensor) -> None:
            g, s = (one.reshape(len(a), -1, one.shape[-1]) for one in (grad, x))
            by_a = torch.einsum("gtr,gti->gri", (g @ b).square(), s.square())
            by_b = torch.einsum("gto,gtr->gor", g.square(), (s @ a.mT).square())
            for kept, found in zip((self.rows, self.columns), (by_a, by_b), strict=True):
                kept[name] = kept[name] + found if name in kept else found

        y.register_hook(back)
        return y


class FactorGuard(FisherGuard[FactorProbe]):
    """EWC++ with Fisher information of A and of B, in units of its mean over all their numbers."""

    def __init__(self, stack: AdapterStack, cells: Sequence[Cell], training: Training) -> None:
        super().__init__(stack, cells, training)
        self._fisher: list[Tensor] = []
        self._anchor: list[Tensor] = []

    def _begin(self) -> FactorProbe:
        return FactorProbe(self._stack)

    def _keep(self, probe: FactorProbe, weight: float) -> None:
        now = [part for name in self._stack.sites for part in (probe.rows[name], probe.columns[name])]
        mean = torch.stack([part.sum((1, 2)) for part in now]).sum(0) / sum(part[0].numel() for part in now)
        now = [part / mean[:, None, None] for part in now]
        pairs = zip(self._fisher or now, now, strict=True)
        self._fisher = [(1.0 - weight) * old + weight * new for old, new in pairs]
        self._anchor = consolidate.held(self._stack).parameters()
        self.kept = 8 * sum(part[0].numel() for part in self._anchor)

    @torch.no_grad()
    def hold(self) -> None:
        for factor, anchor, weight in zip(self._stack.parameters(), self._anchor, self._fisher, strict=True):
            pull = self._strength[:, None, None] * weight
            factor.copy_((factor + pull * anchor) / (1.0 + pull))


#: Ways whose cells share a guard.
_FAMILIES = {arms.NONE: Guard, arms.REPLAY: Guard, arms.EWC: ProductGuard, arms.L2: ProductGuard,
             arms.DIRECTIONS: DirectionGuard, arms.DAMPED: DirectionGuard, arms.FACTORS: FactorGuard}  # fmt: skip


def family(cell: Cell) -> tuple[type[Guard], bool]:
    """The class of the guard that a cell's way asks for, and whether it is damped."""
    return _FAMILIES[cell.arm.way], cell.arm.way == arms.DAMPED


def guard_of(stack: AdapterStack, cells: Sequence[Cell], training: Training) -> Guard:
    """The guard of cells of one family; `stack` has their rows, and is what the guard changes."""
    made, _ = family(cells[0])
    return made(stack, cells, training) if issubclass(made, FisherGuard) else made()
