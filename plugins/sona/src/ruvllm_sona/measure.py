"""What the gate measures with: the learning network, a few texts at a time."""

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
_TOGETHER = 512  # tokens of texts that go through the network in one row: a slice takes longer with more
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
        for group in _groups([tuple(text) for text in texts]):
            yield from self._look(self._base, None, group)
            if deltas:
                yield from self._look(self._adapted_by(deltas), _inside(deltas), group)
            for ids in group:
                base, hidden = self._base[ids], self._changed(deltas, ids)
                step, parts = max(_PIECE // self._network.spec.vocab_size, 1), []
                for at in range(0, len(hidden), step):
                    part = slice(at, at + step)
                    parts.append(self._compare(hidden[part], base[part], ids[at + 1 :], bool(deltas)))
                    yield
                found.append(Measured(*(np.concatenate(one) for one in zip(*parts, strict=True))))
        return found

    def _adapted_by(self, deltas: Deltas) -> dict[tuple[int, ...], Tensor]:
        """Where hidden states with these deltas are remembered."""
        layers = _inside(deltas)
        if layers.keys() != self._layers.keys() or any(one is not self._layers[site] for site, one in layers.items()):
            self._layers, self._adapted = layers, {}
        return self._adapted if layers else self._base

    def _changed(self, deltas: Deltas | None, ids: tuple[int, ...]) -> Tensor:
        hidden = self._adapted_by(deltas)[ids] if deltas else self._base[ids]
        if deltas and (final := deltas.get(FINAL_SITE)) is not None:
            hidden = stack_of(self._network, {FINAL_SITE: final}).add(FINAL_SITE, hidden[None], hidden[None])[0]
        return hidden

    def _look(
        self, known: dict[tuple[int, ...], Tensor], deltas: Deltas | None, group: Sequence[tuple[int, ...]]
    ) -> Generator[None, None, None]:
        """Have hidden states of all texts of a group among the known ones, of each but its last token."""
        missing, network = [ids for ids in dict.fromkeys(group) if ids not in known], self._network
        if not missing:
            return
        ends = np.cumsum([len(ids) for ids in missing]).tolist()
        tokens = padded([[token for ids in missing for token in ids]], network.device)
        way = Pass(network, stack_of(network, deltas), tokens=tokens, keep=False, ends=ends)
        yield from way.forward()
        for ids, end in zip(missing, ends, strict=True):
            known[ids] = way.x[0, end - len(ids) : end - 1]
        for ids in [ids for ids in known if ids not in group][: max(0, len(known) - _KEPT)]:
            del known[ids]

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


def _groups(texts: Sequence[tuple[int, ...]]) -> list[list[tuple[int, ...]]]:
    """Neighbours that go through the network together."""
    found: list[list[tuple[int, ...]]] = []
    for ids in texts:
        if not found or sum(map(len, found[-1])) + len(ids) > _TOGETHER:
            found.append([])
        found[-1].append(ids)
    return found


def _inside(deltas: Deltas) -> Deltas:
    return {site: delta for site, delta in deltas.items() if site != FINAL_SITE}


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
