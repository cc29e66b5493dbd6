"""Tensor parallelism over a process group of `torch.distributed`: what ranks do together (arXiv 1909.08053).

All ranks make the same calls with the same batches. Two sums a layer join their products, and one gathering joins the
logits. Each logit is computed by one rank and copied to the others, so all ranks have the same bits and draw the same
tokens, whatever the order in which a sum was taken.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import pad

from ruvllm_core.decode.batch import Batch
from ruvllm_core.decode.decoder import EagerDecoder
from ruvllm_core.decode.kv import KVStorage
from ruvllm_core.decode.ops import Ops
from ruvllm_core.decode.reference import pick_device, reference_ops
from ruvllm_core.model.quant import QuantTensor
from ruvllm_core.model.spec import ModelSpec
from ruvllm_core.protocols import Adapter, DecoderOptions, FloatArray, KernelProvider, Weights
from ruvllm_kernels_cuda.shard import Shard, ShardedWeights, Split

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class TensorParallel:
    """A rank's part of a model, and its process group.

    Args:
        spec, weights: of the whole model.
        group: NCCL's for tensors on GPUs, Gloo's for those of the CPU.

    Raises `ConfigError` if the model cannot be split over so many ranks.
    """

    def __init__(self, spec: ModelSpec, weights: Weights, group: ProcessGroup) -> None:
        self.group = group
        self.split = Split.of(spec, weights, dist.get_rank(group), dist.get_world_size(group))
        self.spec, self.weights = self.split.spec, ShardedWeights(weights, self.split)
        self._adapters: WeakKeyDictionary[Adapter, Adapter] = WeakKeyDictionary()

    def all_reduce(self, x: Tensor) -> Tensor:
        """The sum of all ranks' `x`, contiguous and of the same shape everywhere; changed in place."""
        if x.numel():
            dist.all_reduce(x, group=self.group)
        return x

    def gather_logits(self, part: Tensor) -> Tensor:
        """Logits ``[R, V]`` of every rank's ``[R, own tokens]``."""
        widths = [stop - start for start, stop in self.split.vocabulary]
        mine = pad(part, (0, max(widths) - part.shape[1])).contiguous()  # collectives want equal sizes
        parts = [torch.empty_like(mine) for _ in widths]
        if mine.numel():
            dist.all_gather(parts, mine, group=self.group)
        return torch.cat([one[:, :width] for one, width in zip(parts, widths, strict=True)], 1)

    def adapters(self, whole: Sequence[Adapter | None]) -> tuple[Adapter | None, ...]:
        """This rank's part of each, the same object for the same one. Raises `ValueError` if one does not fit."""
        for adapter in whole:
            if adapter is not None and adapter not in self._adapters:
                self._adapters[adapter] = self.split.adapter(adapter)
        return tuple(None if adapter is None else self._adapters[adapter] for adapter in whole)


class ParallelEagerDecoder:
    """Core's eager decoder as one rank of several; see `ruvllm_core.protocols.Decoder`.

    Attributes:
        spec: this rank's part of the model, which is what its keys and values need room for.

    Args:
        spec, weights: of the whole model; only this rank's part is unpacked.
        provider: whose operations compute. The arithmetic type ``auto`` is float32 on a CPU and bfloat16 elsewhere.
        group: all ranks', which have to make the same calls.

    Raises `ConfigError` if the model cannot be split over so many ranks.
    """

    def __init__(
        self, spec: ModelSpec, weights: Weights, provider: KernelProvider, options: DecoderOptions, group: ProcessGroup
    ) -> None:
        device = torch.device(pick_device(options))
        if options.dtype == "auto":
            options = replace(options, dtype="float32" if device.type == "cpu" else "bfloat16")
        self._parallel = parallel = TensorParallel(spec, weights, group)
        ops = reference_ops(device, getattr(torch, options.dtype)).with_replacements(provider.ops())
        together = _Provider(provider.device, _ParallelOps(ops, parallel).table())
        self._decoder = EagerDecoder(parallel.spec, parallel.weights, together, options)
        self.spec, self.kv_schemes = parallel.spec, self._decoder.kv_schemes

    def allocate_kv(self, num_blocks: int, block_size: int, scheme: str) -> KVStorage:
        return self._decoder.allocate_kv(num_blocks, block_size, scheme)

    def forward(self, batch: Batch) -> FloatArray:
        if batch.adapters:
            batch = replace(batch, adapters=self._parallel.adapters(batch.adapters))
        return self._decoder.forward(batch)

    def logits(self, hidden: FloatArray, batch: Batch | None = None) -> FloatArray:
        return self._decoder.logits(hidden, batch)

    def close(self) -> None:
        self._decoder.close()


@dataclass
class _Provider:
    """A kernel provider of operations alone."""

    device: str
    table: Mapping[str, Callable[..., Any]]

    def ops(self) -> Mapping[str, Callable[..., Any]]:
        return self.table

    def decoder(self, spec: ModelSpec, weights: Weights, options: DecoderOptions) -> None:
        return None


@dataclass(frozen=True, eq=False)
class _Prepared:
    """A weight as the provider has it: all of it, what is multiplied with, and what surrounds the product."""

    whole: Any
    factor: Any
    padding: tuple[int, int] = (0, 0)
    gathered: bool = False


class _ParallelOps:
    """Operations that the eager decoder runs on each rank.

    What it adds to the residual stream are the products that are split by columns, with bias and low-rank deltas: so
    `add_rms_norm` is where sums over ranks are taken, of no more rows than are needed.
    """

    def __init__(self, ops: Ops, parallel: TensorParallel) -> None:
        self._ops, self._parallel = ops, parallel

    def table(self) -> dict[str, Callable[..., Any]]:
        mine = {name: getattr(self, name) for name in ("prepare", "linear", "embed", "add_rms_norm")}
        return vars(self._ops) | mine

    def prepare(self, tensors: Sequence[QuantTensor]) -> _Prepared:
        first, whole = tensors[0], self._ops.prepare(tensors)
        if not isinstance(first, Shard):
            return _Prepared(whole, whole)
        if (rows := first.vocabulary) is None:
            return _Prepared(whole, whole, (first.before, first.after))
        part = whole if rows == (0, first.num_rows) else self._ops.prepare([first.rows(*rows)])
        return _Prepared(whole, part, gathered=True)

    def linear(self, x: Tensor, weight: _Prepared) -> Tensor:
        y = self._ops.linear(pad(x, weight.padding) if any(weight.padding) else x, weight.factor)
        return self._parallel.gather_logits(y) if weight.gathered else y

    def embed(self, weight: _Prepared, tokens: Tensor) -> Tensor:
        return self._ops.embed(weight.whole, tokens)

    def add_rms_norm(self, x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        return self._ops.add_rms_norm(self._parallel.all_reduce(x.contiguous()), residual, weight, eps)
