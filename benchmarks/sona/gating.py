"""`Gatekeeper`: the plugin's gate for many cells at once, whose texts go through the network together."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import replace
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from ruvllm_core.protocols import FloatArray
from ruvllm_sona.adapters import AdapterStack
from ruvllm_sona.gate import Figures, Gate, GateConfig, Measured, Verdict
from ruvllm_sona.network import Network, padded
from ruvllm_sona.sites import Deltas
from sona.sampling import Shared

T = TypeVar("T")
_ROWS, _TOKENS = 512, 4096  # texts, and tokens of them with logits, in memory at a time


class Gatekeeper:
    """Judges every row of a stack as the gate judges a candidate.

    Args:
        network: the model.
        anchors: texts that are to stay as likely as they are.
        norms: Frobenius norm of the weight at each site.
        chats: how many of the anchors, its last ones, are conversations.
    """

    def __init__(
        self,
        network: Network,
        anchors: Sequence[Sequence[int]],
        norms: dict[str, float],
        config: GateConfig,
        chats: int = 0,
    ) -> None:
        self._network, self._anchors, self._norms, self._config = network, anchors, norms, config
        device = network.device
        self._tokens = padded(anchors, device)
        lengths = [len(one) - 1 for one in anchors]
        self._ends = np.cumsum(lengths)[:-1]
        self._owner = torch.repeat_interleave(torch.arange(len(anchors)), torch.tensor(lengths)).to(device)
        self._places = torch.cat([torch.arange(n) for n in lengths]).to(device)
        self._targets = self._tokens[self._owner, self._places + 1]
        with torch.no_grad():
            hidden = network.hidden(self._tokens, AdapterStack({}, {}))[self._owner, self._places]
            self._base = torch.cat([torch.log_softmax(network.logits(part), -1) for part in hidden.split(_TOKENS)])
        base = self._base.gather(1, self._targets[:, None])[:, 0].cpu().numpy()
        self._gate = _Gate(anchors, norms, config, np.split(base, self._ends), chats)

    @torch.no_grad()
    def verdicts(self, stack: AdapterStack, scales: Sequence[Sequence[float]]) -> list[Verdict]:
        """On each row of `stack` times the first of its `scales` that passes, or on the last of them."""
        found: dict[int, Verdict] = {}
        for turn in range(max(map(len, scales))):
            left = [n for n, own in enumerate(scales) if turn < len(own) and not (n in found and found[n].passed)]
            if not left:
                break
            at = torch.tensor(left, device=self._tokens.device)
            size = torch.tensor([scales[n][turn] for n in left], device=at.device)[:, None, None]
            rows = AdapterStack({name: (a[at], b[at] * size) for name, (a, b) in stack.sites.items()}, stack.scales)
            for n, norm, measured in zip(left, self._relative_norms(rows), self._measured(rows), strict=True):
                found[n] = replace(self._gate.judge(norm, measured), scale=scales[n][turn], scales=turn + 1)
        return [found[n] for n in range(len(scales))]

    def _relative_norms(self, rows: AdapterStack) -> list[tuple[float, str]]:
        """The largest over sites, of each row, and its site."""
        names, ratios = list(rows.sites), []
        for name, (a, b) in rows.sites.items():
            square = ((b.mT @ b).double() * (a @ a.mT).double()).sum((1, 2)).clamp(min=0)
            ratios.append(abs(rows.scales[name]) * square.sqrt() / self._norms[name])
        largest = torch.stack(ratios, 1).max(1)
        return [(float(value), names[int(at)]) for value, at in zip(largest.values, largest.indices, strict=True)]

    def _measured(self, rows: AdapterStack) -> Generator[list[Measured], None, None]:
        texts = len(self._anchors)
        cells, at_once = len(next(iter(rows.sites.values()))[0]), max(1, _ROWS // texts)
        for first in range(0, cells, at_once):
            part = slice(first, first + at_once)
            own = AdapterStack({name: (a[part], b[part]) for name, (a, b) in rows.sites.items()}, rows.scales)
            count = min(at_once, cells - first)
            hidden = self._network.hidden(self._tokens.repeat(count, 1), Shared(own, texts))
            for n in range(count):
                yield self._compare(hidden[n * texts : (n + 1) * texts][self._owner, self._places])

    def _compare(self, hidden: Tensor) -> list[Measured]:
        parts: list[tuple[FloatArray, FloatArray]] = []
        for first in range(0, len(hidden), _TOKENS):
            part = slice(first, first + _TOKENS)
            logp = torch.log_softmax(self._network.logits(hidden[part]), -1)
            kl = (logp.exp() * (logp - self._base[part])).sum(-1)
            parts.append((logp.gather(1, self._targets[part, None])[:, 0].cpu().numpy(), kl.cpu().numpy()))
        both = (np.split(np.concatenate(one), self._ends) for one in zip(*parts, strict=True))
        return [Measured(*one) for one in zip(*both, strict=True)]


class _Gate(Gate):
    """The plugin's gate, of a candidate that has been measured already."""

    _known = 0.0, ""

    def judge(self, norm: tuple[float, str], measured: list[Measured]) -> Verdict:
        self._known = norm

        def ready(deltas: Deltas | None, texts: Sequence[Sequence[int]]) -> Generator[None, None, list[Measured]]:
            yield
            return measured

        return finished(self.check(ready, {}))

    def _norm(self, deltas: Deltas) -> Figures:
        return Figures(relative_norm=self._known[0], largest_site=self._known[1])


def finished(work: Generator[object, None, T]) -> T:
    """What it returns when it has come to its end."""
    while True:
        try:
            next(work)
        except StopIteration as end:
            found: T = end.value
            return found
