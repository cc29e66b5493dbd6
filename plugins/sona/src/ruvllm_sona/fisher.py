"""The Fisher information of every linear layer, from the model's own samples, for elastic weight consolidation."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from ruvllm_core.protocols import FloatArray
from ruvllm_sona.adapters import AdapterStack
from ruvllm_sona.network import Network, padded
from ruvllm_sona.update import Pass


class FisherProbe(AdapterStack):
    """Adds what a stack adds, and takes squares on the way: of inputs at once, of gradients when they come back.

    Attributes:
        inputs: sum over tokens of the squares of each site's input, ``[in]``.
        outputs: sum over tokens of the squares of the gradient by each site's output, ``[out]``.
    """

    def __init__(self, stack: AdapterStack) -> None:
        super().__init__(stack.sites, stack.scales, stack.below)
        self.inputs: dict[str, Tensor] = {}
        self.outputs: dict[str, Tensor] = {}

    def add(self, name: str, x: Tensor, y: Tensor) -> Tensor:
        y = super().add(name, x, y)
        squares = x.detach().square().flatten(0, -2).sum(0)
        self.inputs[name] = self.inputs[name] + squares if name in self.inputs else squares

        def back(grad: Tensor) -> None:
            found = grad.square().flatten(0, -2).sum(0)
            self.outputs[name] = self.outputs[name] + found if name in self.outputs else found

        if y.requires_grad:
            y.register_hook(back)  # type: ignore[no-untyped-call]
        return y


def fisher(
    network: Network, adapters: AdapterStack, texts: Sequence[Sequence[int]], *, seed: int = 0
) -> Iterator[Mapping[str, tuple[FloatArray, FloatArray]] | None]:
    """Diagonal factors of each site's Fisher information: F of ΔW at (i, j) is about ``u[i] · v[j]``.

    u is the mean square of the gradient by the site's output, v that of its input, over all tokens of `texts`. The
    gradient is that of log p of tokens drawn from the model itself at every position (the texts' own would make it the
    empirical Fisher: Kunstner et al., arXiv 1905.12558). The product of the means is what Kronecker-factored curvature
    assumes (Martens and Grosse, arXiv 1503.05671), of which these are the diagonals.

    Yields None between slices, and last of all ``{site: (u [out], v [in])}``.
    """
    random = torch.Generator(network.device).manual_seed(seed)
    count = 0
    totals: dict[str, tuple[Tensor, Tensor]] = {}
    for text in texts:
        probe = FisherProbe(adapters)
        way = Pass(network, probe, tokens=padded([text], network.device), keep=True, inputs=True)
        for _ in way.forward():
            yield None
        hidden = way.x[0].requires_grad_(True)
        with torch.enable_grad():
            logp = torch.log_softmax(network.logits(hidden), -1)
        drawn = torch.multinomial(logp.detach().exp(), 1, generator=random)
        (grad,) = torch.autograd.grad(logp.gather(1, drawn).sum(), hidden)
        yield None
        for _ in way.backward(grad[None]):
            yield None
        count += len(text)
        for name, out in probe.outputs.items():
            u, v = totals.get(name, (torch.zeros_like(out), torch.zeros_like(probe.inputs[name])))
            totals[name] = u + out, v + probe.inputs[name]
        yield None
    yield {name: ((u / count).cpu().numpy(), (v / count).cpu().numpy()) for name, (u, v) in totals.items()}
