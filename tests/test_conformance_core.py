"""What core itself ships, through the suites that it offers to others."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch

from ruvllm_core.decode.contiguous import ContiguousCache
from ruvllm_core.decode.reference import TorchKernels, reference_ops
from ruvllm_core.protocols import CacheContext, DecoderOptions, KernelProvider, KVCachePolicy
from ruvllm_core.testing import CachePolicySuite, KernelSuite
from ruvllm_core.testing.tiny import CONTEXT


class AllOperations(TorchKernels):
    """The reference, offered as if it were somebody's own."""

    def ops(self) -> Mapping[str, Callable[..., Any]]:
        return vars(reference_ops(torch.device(self.device), torch.float32))


class TestTorchKernels(KernelSuite):
    def make_provider(self, options: DecoderOptions) -> KernelProvider:
        return AllOperations(options)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
class TestTorchKernelsOnCuda(TestTorchKernels):
    options = DecoderOptions(dtype="float32", device="cuda", max_context=CONTEXT)


class TestContiguousCache(CachePolicySuite):
    def make_cache(self, context: CacheContext) -> KVCachePolicy:
        return ContiguousCache(context)


def test_without_pytest_it_says_what_is_missing() -> None:
    program = "import sys; sys.modules['pytest'] = None; import ruvllm_core.testing"
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert ran.returncode == 1
    assert ran.stderr.endswith("ImportError: ruvllm_core.testing needs pytest: pip install pytest\n")


def test_importing_the_suites_imports_no_torch() -> None:
    program = "import sys, ruvllm_core.testing; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", program], check=True)
