"""`AdapterStack`: the adapters of several rows as tensors that can be trained together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ruvllm_core.protocols import LowRank
from ruvllm_sona.sites import Deltas


class AdapterStack:
    """Low-rank deltas of G rows of a batch, each row with its own, of one rank and scale a site.

    Attributes:
        sites: by name, A ``[G, r, in]`` and B ``[G, out, r]``, float32.
        scales: by name.
        below: another stack that is added first; its own factors stay as they are.
    """

    def __init__(
        self,
        sites: Mapping[str, tuple[Tensor, Tensor]],
        scales: Mapping[str, float],
        below: AdapterStack | None = None,
    ) -> None:
        self.sites = dict(sites)
        self.scales = dict(scales)
        self.below = below

    @classmethod
    def of(cls, rows: Sequence[Deltas], device: str | torch.device = "cpu") -> AdapterStack:
        """From one set of deltas for each row; all have the same sites, ranks and scales."""
        sites = {}
        for name in rows[0]:
            a = torch.stack([torch.tensor(row[name].a) for row in rows]).to(device)
            b = torch.stack([torch.tensor(row[name].b) for row in rows]).to(device)
            sites[name] = a, b
        return cls(sites, {name: delta.scale for name, delta in rows[0].items()})

    @property
    def shared(self) -> bool:
        """Whether all rows of a batch have the same adapter, or none."""
        below = self.below is None or self.below.shared
        return below and all(len(a) == 1 for a, _ in self.sites.values())

    def parameters(self) -> list[Tensor]:
        """Every A and B, site after site."""
        return [factor for both in self.sites.values() for factor in both]

    def trainable(self) -> AdapterStack:
        """Mark every factor as one that gradients are wanted for; returns itself."""
        for factor in self.parameters():
            factor.requires_grad_(True)
        return self

    def deltas(self, row: int = 0) -> dict[str, LowRank]:
        """The deltas of one row, copied."""
        return {
            name: LowRank(a[row].detach().cpu().numpy().copy(), b[row].detach().cpu().numpy().copy(), self.scales[name])
            for name, (a, b) in self.sites.items()
        }

    def add(self, name: str, x: Tensor, y: Tensor) -> Tensor:
        """``y`` with what the adapter at `name` makes of ``x``; both ``[G, T, …]``."""
        if self.below is not None:
            y = self.below.add(name, x, y)
        if (both := self.sites.get(name)) is None:
            return y
        a, b = both
        if len(a) == 1:  # one adapter for all
            change = (x @ a[0].T) @ b[0].T
        else:
            change = torch.bmm(torch.bmm(x, a.transpose(1, 2)), b.transpose(1, 2))
        scale = self.scales[name]
        return y + change if scale == 1.0 else y + scale * change
