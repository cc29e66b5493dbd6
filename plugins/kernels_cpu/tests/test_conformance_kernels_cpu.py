"""Every instruction set through core's kernel suite: all kinds of models, all schemes of weights."""

from __future__ import annotations

import pytest

from ruvllm_core.errors import ConfigError
from ruvllm_core.protocols import DecoderOptions, KernelProvider
from ruvllm_core.testing import KernelSuite
from ruvllm_kernels_cpu.library import pick_isa
from ruvllm_kernels_cpu.provider import CpuKernels


def _lacks(isa: str) -> bool:
    try:
        pick_isa(isa)
    except ConfigError:
        return True
    return False


class TestGeneric(KernelSuite):
    isa = "generic"
    # Activations are rounded to 8 bits, and the suite's sharp attention turns a rounding into another choice of key:
    # up to 0.095 was seen. What one product costs, test_products.py holds to 1e-5 of its rounded input.
    quantized_tolerance = 0.12

    def make_provider(self, options: DecoderOptions) -> KernelProvider:
        return CpuKernels(options, isa=self.isa)


@pytest.mark.skipif(_lacks("avx2"), reason="this processor has no AVX2")
class TestAvx2(TestGeneric):
    isa = "avx2"


@pytest.mark.skipif(_lacks("avx512"), reason="this processor has no AVX-512 VNNI")
class TestAvx512(TestGeneric):
    isa = "avx512"
