"""What core itself ships, through the suites that it offers to others."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from ruvllm_core.decode.contiguous import ContiguousCache
from ruvllm_core.decode.reference import TorchKernels, reference_ops
from ruvllm_core.protocols import CacheContext, DecoderOptions, KernelProvider, KVCachePolicy
from ruvllm_core.testing import CachePolicySuite, KernelSuite


class AllOperations(TorchKernels):
    """The reference, offered as if it were somebody's own."""

    def ops(self) -> Mapping[str, Callable[..., Any]]:
        return vars(reference_ops(torch.device(self.device), torch.float32))


class TestTorchKernels(KernelSuite):
    def make_provider(self, options: DecoderOptions) -> KernelProvider:
        return AllOperations(options)


class TestContiguousCache(CachePolicySuite):
    def make_cache(self, context: CacheContext) -> KVCachePolicy:
        return ContiguousCache(context)
