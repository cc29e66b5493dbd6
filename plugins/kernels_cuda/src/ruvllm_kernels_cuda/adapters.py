"""Adapters on the device: pools of factors that are overwritten while captured graphs go on reading them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ruvllm_core.decode.lora import FINAL_SITE
from ruvllm_core.model.spec import ModelSpec, llama_tensor_names
from ruvllm_core.protocols import Adapter, LowRank
from ruvllm_kernels_cuda.lora import LowRankPool, add_low_rank, low_rank_pool
from ruvllm_kernels_cuda.weights import PRODUCTS

NOBODY = -1
_SLOTS = 4  # at first


class AdapterPools:
    """One pool for each site that any adapter has had, with the same number of slots.

    An adapter keeps its slot until that is needed for another one. A new adapter is a few small copies; only if it has
    a site or a rank that there is no room for, or if a batch has more adapters than there are slots, are pools made
    anew: then `generation` changes, and graphs have to be captured again.
    """

    def __init__(self, spec: ModelSpec, device: torch.device) -> None:
        shapes = {name: one.shape for name, one in llama_tensor_names(spec).items()}
        self._shapes = {
            f"layers.{n}.{part}": shapes[f"layers.{n}.{part}"]
            for n in range(spec.num_layers)
            for parts in PRODUCTS.values()
            for part in parts
        }
        self._shapes[FINAL_SITE] = spec.hidden_size, spec.hidden_size
        self._parts: dict[str, list[tuple[str, int, int]]] = {}
        for product, parts in PRODUCTS.items():
            start, found = 0, []
            for part in parts:
                found.append((part, start, start := start + self._shapes[f"layers.0.{part}"][0]))
            self._parts[product] = found
        self._device = device
        self._slots, self._held = _SLOTS, dict[Adapter, int]()  # least recently used first
        self._pools: dict[str, LowRankPool] = {}
        self.generation = 0

    def slots_of(self, adapters: Sequence[Adapter | None]) -> list[int]:
        """Each one's slot, with its factors in it. Raises `ValueError` for factors that do not fit the model."""
        wanted = {adapter: None for adapter in adapters if adapter is not None}
        for adapter in wanted:
            if adapter in self._held:
                self._held[adapter] = self._held.pop(adapter)  # used most recently
        new = [adapter for adapter in wanted if adapter not in self._held]
        for adapter in new:
            self._check(adapter)
        if new:
            self._make_room(wanted, new)
        return [NOBODY if adapter is None else self._held[adapter] for adapter in adapters]

    def add_final(self, hidden: Tensor, slots: Tensor) -> Tensor:
        """Hidden states float32 ``[R, C]`` with what each row's adapter adds; changed in place."""
        return add_low_rank(hidden, hidden, self._pools[FINAL_SITE], slots)

    def in_layer(self, n: int, product: str) -> Iterable[tuple[LowRankPool, int, int]]:
        """Pools of a product's parts, and which of its columns are theirs."""
        for part, start, stop in self._parts[product]:
            if (pool := self._pools.get(f"layers.{n}.{part}")) is not None:
                yield pool, start, stop

    def _make_room(self, wanted: dict[Adapter, None], new: list[Adapter]) -> None:
        ranks = {site: pool.a.shape[1] for site, pool in self._pools.items()}
        grown = dict(ranks)
        for adapter in new:
            for site, delta in adapter.sites.items():
                grown[site] = max(grown.get(site, 0), len(delta.a))
        if len(wanted) > self._slots or grown != ranks:
            while len(wanted) > self._slots:
                self._slots *= 2
            self.generation += 1
            new, self._held = list(wanted), {}
            self._pools = {site: self._pool(site, rank) for site, rank in grown.items()}
        free = [slot for slot in range(self._slots) if slot not in self._held.values()]
        idle = [adapter for adapter in self._held if adapter not in wanted]
        for adapter in new:
            slot = free.pop(0) if free else self._held.pop(idle.pop(0))
            for site, pool in self._pools.items():
                self._put(pool, slot, adapter.sites.get(site))
            self._held[adapter] = slot

    def _pool(self, site: str, rank: int) -> LowRankPool:
        outputs, inputs = self._shapes[site]
        # The final site as core computes it; sites in layers like the products they are added to.
        dtype = torch.float32 if site == FINAL_SITE else torch.bfloat16
        return low_rank_pool(self._slots, rank, inputs, outputs, self._device, dtype)

    def _put(self, pool: LowRankPool, slot: int, delta: LowRank | None) -> None:
        if delta is None:
            pool.scale[slot] = 0.0
            return
        a, b = (torch.tensor(one, dtype=torch.float32).to(self._device) for one in (delta.a, delta.b))
        pool.put(slot, a, b, delta.scale)

    def _check(self, adapter: Adapter) -> None:
        for site, delta in adapter.sites.items():
            if site not in self._shapes:
                raise ValueError(f"adapter {adapter.version}: the model has no site {site}")
            (outputs, inputs), rank = self._shapes[site], len(delta.a)
            if delta.a.shape != (rank, inputs) or delta.b.shape != (outputs, rank) or rank < 1:
                raise ValueError(
                    f"adapter {adapter.version}, {site}: a {delta.a.shape} and b {delta.b.shape} "
                    f"must be [r, {inputs}] and [{outputs}, r]"
                )


@dataclass(frozen=True, eq=False)
class Deltas:
    """What adapters add inside the layers in one step; `slots` int32 ``[T]``, `NOBODY` is none."""

    pools: AdapterPools
    slots: Tensor

    def add(self, n: int, product: str, x: Tensor, y: Tensor) -> None:
        """Add to the product `y` of layer `n` what the adapters make of its input."""
        for pool, start, stop in self.pools.in_layer(n, product):
            add_low_rank(y[:, start:stop], x, pool, self.slots)
