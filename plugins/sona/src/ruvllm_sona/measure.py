"""What the gate measures with: the learning network, a text at a time."""

from __future__ import annotations

from collections.abc import Generator, Sequence

import numpy as np
import torch
from torch import Tensor

from ruvllm_core.decode.lora import FINAL_SITE
from ruvllm_core.protocols import FloatArray, Weights
from ruvllm_sona.gate import Measured
from ruvllm_sona.network import Network, padded
from ruvllm_sona.score import stack_of
from ruvllm_sona.sites import Deltas
from ruvllm_sona.update import Pass

_PIECE = 1 << 20  # logits that are looked at in one slice
_KEPT = 64  # texts whose base states are remembered


class NetworkMeasure:
    """`ruvllm_sona.gate.Measure` over a `Network`; remembers the base model's hidden states of the last texts.

    So it does of the last deltas, before the final site: to judge a preview on top of what was just published takes
    its logits alone.
    """

    def __init__(self, network: Network) -> None:
        self._network = network
        self._base: dict[tuple[int, ...], Tensor] = {}
        self._layers: Deltas = {}
        self._adapted: dict[tuple[int, ...], Tensor] = {}

    def __call__(self, deltas: Deltas | None, texts: Sequence[Sequence[int]]) -> Generator[None, None, list[Measured]]:
        found = []
        for text in texts:
            ids = tuple(text)
            if ids not in self._base:
                self._base[ids] = yield from self._hidden(None, ids)
                while len(self._base) > _KEPT:
                    del self._base[next(iter(self._base))]
            base = self._base[ids]
            hidden = (yield from self._changed(deltas, ids)) if deltas else base
            step, parts = max(_PIECE // self._network.spec.vocab_size, 1), []
            for at in range(0, len(hidden), step):
                parts.append(self._compare(hidden[at : at + step], base[at : at + step], ids[at + 1 :], bool(deltas)))
                yield
            found.append(Measured(*(np.concatenate(one) for one in zip(*parts, strict=True))))
        return found

    def _changed(self, deltas: Deltas, ids: tuple[int, ...]) -> Generator[None, None, Tensor]:
        layers = {site: delta for site, delta in deltas.items() if site != FINAL_SITE}
        hidden = self._base[ids]
        if layers:
            if layers.keys() != self._layers.keys() or any(
                one is not self._layers[site] for site, one in layers.items()
            ):
                self._layers, self._adapted = layers, {}
            known = self._adapted
            if ids not in known:
                known[ids] = yield from self._hidden(layers, ids)
                while len(known) > _KEPT:
                    del known[next(iter(known))]
            hidden = known[ids]
        if (final := deltas.get(FINAL_SITE)) is not None:
            hidden = stack_of(self._network, {FINAL_SITE: final}).add(FINAL_SITE, hidden[None], hidden[None])[0]
        return hidden

    def _hidden(self, deltas: Deltas | None, ids: tuple[int, ...]) -> Generator[None, None, Tensor]:
        network = self._network
        way = Pass(network, stack_of(network, deltas), tokens=padded([ids], network.device), keep=False)
        yield from way.forward()
        return way.x[0, :-1]

    @torch.no_grad()
    def _compare(
        self, hidden: Tensor, base: Tensor, targets: tuple[int, ...], changed: bool
    ) -> tuple[FloatArray, FloatArray]:
        at = torch.tensor(targets[: len(hidden)], device=hidden.device)[:, None]
        logp = torch.log_softmax(self._network.logits(hidden), -1)
        kl = torch.zeros(len(hidden), device=hidden.device)
        if changed:
            kl = (logp.exp() * (logp - torch.log_softmax(self._network.logits(base), -1))).sum(-1)
        return logp.gather(1, at)[:, 0].cpu().numpy(), kl.cpu().numpy()


def weight_norms(weights: Weights, sites: Sequence[str], hidden_size: int) -> Generator[None, None, dict[str, float]]:
    """Frobenius norm of the weight at each site, and of the identity at the final one; yields between slices."""
    found = {FINAL_SITE: float(np.sqrt(hidden_size))}
    for site in sites:
        total, tensor = 0.0, weights[site]
        step = max(1, (1 << 20) // tensor.columns)
        for row in range(0, tensor.num_rows, step):
            values = tensor.rows(row, min(row + step, tensor.num_rows)).dequantize()
            total += float(np.vdot(values, values))
            yield
        found[site] = total**0.5
    return found
