"""Steps that are launched as one CUDA graph each.

The first time a step is executed, which compiles its kernels, and captured; from then on its graph is replayed. Where
there is no CUDA the step is executed every time, on the same buffers.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch

BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
_MOST = 64  # graphs; who was used least recently goes first

Buffers = TypeVar("Buffers")
Outputs = TypeVar("Outputs")


def bucket_of(count: int) -> int | None:
    """The smallest of `BUCKETS` that has room; None if none has."""
    return next((bucket for bucket in BUCKETS if bucket >= count), None)


@dataclass(eq=False)
class _Held(Generic[Buffers]):
    buffers: Buffers
    graph: Any = None
    outputs: Any = None


class Graphs:
    """Graphs by what tells steps apart.

    Attributes:
        captured, replayed: how often; on a device without graphs these stay 0.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._held: dict[Hashable, _Held[Any]] = {}
        self._pool = self._new_pool()
        self.captured = self.replayed = 0

    def __len__(self) -> int:
        return len(self._held)

    def play(
        self,
        key: Hashable,
        make: Callable[[], Buffers],
        write: Callable[[Buffers], None],
        body: Callable[[Buffers], Outputs],
        times: int = 1,
    ) -> tuple[Outputs, Buffers]:
        """Write to the buffers of `key`, which `make` makes if there are none, and launch `body` on them `times` times.

        `body` must launch the same kernels on the same memory every time. What it returns is overwritten by the next
        call for any key.
        """
        held = self._held.pop(key, None)
        if held is None:
            if len(self._held) >= _MOST:
                del self._held[next(iter(self._held))]
            held = _Held(make())
        self._held[key] = held
        write(held.buffers)
        outputs: Any = None
        for _ in range(times):
            if held.graph is not None:
                held.graph.replay()
                self.replayed += 1
                outputs = held.outputs
                continue
            outputs = body(held.buffers)
            if self._pool is not None:
                self._capture(held, body)
        return outputs, held.buffers

    def clear(self) -> None:
        """Forget all of them, and the storages that they read."""
        self._held.clear()
        self._pool = self._new_pool()  # PyTorch takes no further graph into a pool whose last one is gone

    def _new_pool(self) -> Any:
        return torch.cuda.graph_pool_handle() if self._device.type == "cuda" else None

    def _capture(self, held: _Held[Buffers], body: Callable[[Buffers], Outputs]) -> None:
        """Record `body`, which has just run: it is not executed again, so nothing changes."""
        torch.cuda.synchronize(self._device)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            held.outputs = body(held.buffers)
        held.graph = graph
        self.captured += 1
