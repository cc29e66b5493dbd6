"""Every instruction set through core's kernel suite: all kinds of models, all schemes of weights."""

from __future__ import annotations

import pytest

from ruvllm_core.errors import ConfigError
from ruvllm_core.protocols import DecoderOptions, KernelProvider
from ruvllm_core.testing import KernelSuite
from ruvllm_kernels_cpu.library import kernels
from ruvllm_kernels_cpu.provider import CpuKernels


def _lacks(isa: str) -> bool:
    try:
        kernels(isa)
    except ConfigError:
        return True
    return False


class TestGeneric(KernelSuite):
    isa = "generic"
    # Activations are rounded to 16 bits, and the suite's sharp attention magnifies what is lost.
    quantized_tolerance = 2e-3

    def make_provider(self, options: DecoderOptions) -> KernelProvider:
        return CpuKernels(options, isa=self.isa)


@pytest.mark.skipif(_lacks("avx2"), reason="this processor has no AVX2")
class TestAvx2(TestGeneric):
    isa = "avx2"


@pytest.mark.skipif(_lacks("avx512"), reason="this processor has no AVX-512 VNNI")
class TestAvx512(TestGeneric):
    isa = "avx512"
