"""`Learner`: one adapter over the whole network, and how rated answers change it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from ruvllm_core.errors import LearningError
from ruvllm_core.protocols import FloatArray, LowRank
from ruvllm_sona.adapters import AdapterStack
from ruvllm_sona.consolidate import held
from ruvllm_sona.curvature import Hold
from ruvllm_sona.network import Network
from ruvllm_sona.objective import ObjectiveConfig
from ruvllm_sona.records import Example
from ruvllm_sona.sites import Deltas, start
from ruvllm_sona.update import Outcome, gradients


@dataclass(frozen=True)
class LearnerConfig:
    """How fast, and how far.

    Attributes:
        rank: of the adapter at every site.
        learning_rate: of Adam (arXiv 1412.6980), which makes the size of a step its own and not the answer's.
        objective: what it descends on.
        seed: of where A starts.
        average: steps whose mean is what has been learned (Polyak and Juditsky 1992), as an exponential average; 1 is
            the last step. A verdict is one noisy bit, and its noise is in every step of that size: the mean has less.
        ewc: λ of the proximal step towards what is held, times the learning rate of the step; 0 is none.
    """

    rank: int = 1
    learning_rate: float = 1e-3
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    seed: int = 0
    average: int = 1
    ewc: float = 0.0


class Learner:
    """Factors and moments of one adapter. They change only at the end of a step, and then all at once.

    Args:
        shapes: sites it is made of, ``(out, in)`` each.
        config: how fast, and how far.
        below: deltas that are there already and stay as they are.
    """

    def __init__(
        self,
        shapes: Mapping[str, tuple[int, int]],
        config: LearnerConfig,
        *,
        below: Deltas | None = None,
        device: str = "cpu",
    ) -> None:
        self._shapes, self._config, self._device = dict(shapes), config, device
        self._below = AdapterStack.of([below], device) if below else None
        self._begin(start(shapes, config.rank, config.seed))

    def _begin(self, deltas: Deltas) -> None:
        self._stack = AdapterStack.of([deltas], self._device).trainable()
        self._stack.below = self._below
        self._mean = AdapterStack.of([deltas], self._device)
        self._adam = torch.optim.Adam(self._stack.parameters(), lr=self._config.learning_rate, foreach=True)
        self.steps = 0
        self.predicted = 0.0

    def deltas(self) -> dict[str, LowRank]:
        """A copy of what has been learned, without what lies below."""
        return self._mean.deltas()

    def learned(self) -> AdapterStack:
        """The same as tensors that are not trained, on top of what lies below."""
        return AdapterStack(held(self._mean).sites, self._mean.scales, self._below)

    def step(
        self,
        network: Network,
        examples: Sequence[Example],
        advantages: Sequence[float],
        reference: tuple[Network, AdapterStack] | None = None,
        holds: Sequence[Hold] = (),
        texts: Sequence[Example] = (),
    ) -> Iterator[Outcome | None]:
        """One step of Adam on the sum over `examples`, then one towards what is held; the last thing yielded is the
        outcome.

        `reference` is what the leash is tied to; None is the base model. Each of `holds` is about sites of its own.
        `texts` are on the leash, too, and nobody rated them.
        Afterwards `predicted` is by how much the loss should have fallen, to first order.

        Raises `LearningError`, and changes nothing, if a gradient is not finite.
        """
        self._adam.zero_grad()
        outcome = None
        for found in gradients(network, self._stack, examples, advantages, self._config.objective, reference, texts):
            outcome = found
            yield None
        grads = [factor.grad for factor in self._stack.parameters() if factor.grad is not None]
        if not torch.isfinite(torch.stack(torch._foreach_norm(grads))).all():
            self._adam.zero_grad()
            raise LearningError("the gradient of these answers is not finite, nothing was learned from them")
        yield None
        before = [factor.detach().clone() for factor in self._stack.parameters()]
        if holds and self._config.ewc > 0.0:
            yield from self._step_and_hold(holds)
        else:
            self._adam.step()
        self.predicted = -sum(
            float(torch.vdot(factor.grad.flatten(), (factor.detach() - was).flatten()))
            for factor, was in zip(self._stack.parameters(), before, strict=True)
            if factor.grad is not None
        )
        self._adam.zero_grad()
        self.steps += 1
        follow(self._mean, self._stack, self.steps, self._config.average)
        yield outcome

    def _step_and_hold(self, holds: Sequence[Hold]) -> Iterator[None]:
        """Adam's step and the proximal one, a slice for each part of the sites; ended in between, neither."""
        revert = self.snapshot()
        yield None
        try:
            self._adam.step()
            strength = torch.tensor([self._config.ewc * float(self._adam.param_groups[0]["lr"])], dtype=torch.float64)
            for hold in holds:
                yield None
                hold.prox(self._stack, strength.to(self._device))
        except BaseException:
            revert()
            raise

    def snapshot(self) -> Callable[[], None]:
        """Copies what a step changes; the function returned takes back all steps since, to the last bit."""
        adam, factors, steps = self._adam, self._stack.parameters(), self.steps
        everything = [*factors, *self._mean.parameters()]
        values = [factor.detach().clone() for factor in everything]
        moments = [{name: one.clone() for name, one in adam.state.get(factor, {}).items()} for factor in factors]

        def revert() -> None:
            self._adam, self.steps = adam, steps
            for factor, value in zip(everything, values, strict=True):
                factor.detach().copy_(value)
            for factor, moment in zip(factors, moments, strict=True):
                adam.state.pop(factor, None)
                if moment:
                    adam.state[factor] = moment

        return revert

    def rate(self, learning_rate: float) -> None:
        """Take steps of this size from now on."""
        for group in self._adam.param_groups:
            group["lr"] = learning_rate

    def state(self) -> dict[str, FloatArray]:
        """Factors and Adam's moments by name, copied; `restore` takes them."""
        found = {"steps": np.array([self.steps], np.float32)}
        for name, both in self._stack.sites.items():
            for letter, factor, mean in zip("ab", both, self._mean.sites[name], strict=True):
                found[f"{name}.{letter}"] = factor.detach().cpu().numpy().copy()
                found[f"{name}.{letter}.mean"] = mean.cpu().numpy().copy()
                for moment in ("exp_avg", "exp_avg_sq"):
                    if (kept := self._adam.state.get(factor)) is not None:
                        found[f"{name}.{letter}.{moment}"] = kept[moment].cpu().numpy().copy()
        return found

    def restore(self, state: Mapping[str, FloatArray]) -> None:
        """Go back to a `state`, to the last bit. Raises `LearningError` for one of another model."""
        deltas = {}
        for name, (rows, columns) in self._shapes.items():
            a, b = state.get(f"{name}.a"), state.get(f"{name}.b")
            if a is None or b is None or a.shape[2] != columns or b.shape[1] != rows or a.shape[1] != b.shape[2]:
                raise LearningError(f"what was learned does not fit {name}", hint="it was made for another model")
            deltas[name] = LowRank(a[0], b[0])
        self._begin(deltas)
        self.steps = int(state["steps"][0])
        for name, both in self._stack.sites.items():
            for letter, factor, mean in zip("ab", both, self._mean.sites[name], strict=True):
                if (kept := state.get(f"{name}.{letter}.mean")) is not None:
                    mean.copy_(torch.tensor(kept))
                if f"{name}.{letter}.exp_avg" in state:
                    self._adam.state[factor] = {
                        "step": torch.tensor(float(self.steps)),
                        **{
                            moment: torch.tensor(state[f"{name}.{letter}.{moment}"]).to(self._device)
                            for moment in ("exp_avg", "exp_avg_sq")
                        },
                    }


@torch.no_grad()
def follow(mean: AdapterStack, stack: AdapterStack, steps: int, horizon: int) -> None:
    """Make `mean` of the first `steps` iterates from that of all but the newest, which `stack` is.

    It is the plain mean until there are `horizon` of them, then an exponential one.
    """
    torch._foreach_lerp_(mean.parameters(), stack.parameters(), 1.0 / min(steps, horizon))


def warm_up() -> None:
    """Have PyTorch import what the first step of Adam needs: another second, that of whoever calls this."""
    dummy = torch.zeros(1, requires_grad=True)
    dummy.grad = torch.zeros(1)
    torch.optim.Adam([dummy], foreach=True).step()
