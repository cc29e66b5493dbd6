"""Requests as the sampling kernels read them, and their random numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import numpy.typing as npt
from torch import Tensor

from ruvllm_core.generate.request import GenerateParams, Request
from ruvllm_core.generate.sampler import Sampler
from ruvllm_core.protocols import FloatArray
from ruvllm_kernels_cuda.sampling import SamplingRows

_FIELDS = {"temperature": "float64", "top_k": "int32", "top_p": "float64", "min_p": "float64", "uniform": "float64"}


@dataclass(frozen=True)
class Drawing:
    """Which kernels a batch needs: none of them if all are greedy."""

    sampled: bool = False
    top_k: bool = False
    top_p: bool = False


def sampling_fields(rows: int) -> dict[str, tuple[str, tuple[int, ...]]]:
    """What `Draws.write` fills in, for a `Packet`."""
    return {name: (dtype, (rows,)) for name, dtype in _FIELDS.items()}


def sampling_rows(there: Mapping[str, Tensor]) -> SamplingRows:
    """The same on the device."""
    return SamplingRows(*(there[name] for name in _FIELDS))


class Draws:
    """The random state of every request, and a sampler for those whose logits are changed before they are drawn from.

    A request with penalties or a bias is drawn by core's sampler on the host, from its row of logits.
    """

    def __init__(self, vocab_size: int) -> None:
        self._vocab_size = vocab_size
        self._randoms: WeakKeyDictionary[Request, np.random.Generator] = WeakKeyDictionary()
        self._samplers: WeakKeyDictionary[Request, Sampler] = WeakKeyDictionary()

    def of(self, requests: Sequence[Request]) -> Drawing:
        params = [r.params for r in requests if r.params.temperature > 0.0 and not changes_logits(r.params)]
        return Drawing(bool(params), any(p.top_k > 0 for p in params), any(p.top_p < 1.0 for p in params))

    def write(self, requests: Sequence[Request], host: Mapping[str, npt.NDArray[Any]]) -> None:
        """Parameters and one new uniform for each; what is left over is greedy."""
        host["temperature"][:], host["uniform"][:] = 0.0, 0.0
        for row, request in enumerate(requests):
            params = request.params
            if params.temperature > 0.0 and not changes_logits(params):
                values = params.temperature, params.top_k, params.top_p, params.min_p, self.uniform(request)
                for name, value in zip(_FIELDS, values, strict=True):
                    host[name][row] = value

    def uniform(self, request: Request) -> float:
        """The next number of the generator that core's sampler would use."""
        if request not in self._randoms:
            self._randoms[request] = np.random.Generator(np.random.Philox(request.params.seed))
        return float(self._randoms[request].random())

    def on_host(self, request: Request, logits: FloatArray) -> int:
        """A token for a request with penalties or a bias, from logits ``[V]``; it counts it."""
        if request not in self._samplers:
            self._samplers[request] = Sampler(request.params, request.prompt_ids, self._vocab_size)
        return self._samplers[request].sample(logits).token


def changes_logits(params: GenerateParams) -> bool:
    """Whether anything but temperature and filters decides what is drawn."""
    penalties = params.frequency_penalty or params.presence_penalty or params.repetition_penalty != 1.0
    return bool(penalties or params.logit_bias)
