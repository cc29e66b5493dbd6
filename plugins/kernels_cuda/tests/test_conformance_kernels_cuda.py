"""Core's conformance suite over these operations; interpreted, one of its models, which takes long enough."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton", reason="needs Triton, which there is for Linux on x86-64")

from ruvllm_core.protocols import DecoderOptions, KernelProvider
from ruvllm_core.testing import KernelSuite
from ruvllm_core.testing.kernels import MODELS
from ruvllm_kernels_cuda.matmul import Thresholds
from ruvllm_kernels_cuda.ops import CudaOps
from ruvllm_kernels_cuda.provider import CudaKernels
from ruvllm_kernels_cuda.scratch import Scratch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CHOSEN = list(MODELS) if DEVICE == "cuda" else ["plain"]


class TestKernels(KernelSuite):
    options = DecoderOptions(dtype="float32", device=DEVICE, max_context=KernelSuite.options.max_context)
    # Of logits: weights or, with more than a few tokens, both factors are rounded to bfloat16, and these models'
    # attention is sharp. Single products are held to less in `test_cuda_matmul.py`.
    tolerance = 0.1
    quantized_tolerance = 0.1
    outliers = 0.1  # PyTorch's own bfloat16 has positions that are off by 0.57, but no tenth of a text above 0.08

    def make_provider(self, options: DecoderOptions) -> KernelProvider:
        if DEVICE == "cuda":
            return CudaKernels(options)
        scratch = Scratch.on("cpu", partial=1 << 16, arrived=256, dense=1 << 18)
        ops = CudaOps("cpu", torch.float32, scratch, Thresholds(vector=1, vector_floats=1, tiles=12))
        made: KernelProvider = SimpleNamespace(device="cpu", ops=ops.table, decoder=lambda *_: None)
        return made

    @pytest.mark.parametrize("model", CHOSEN)
    def test_model(self, model: str) -> None:
        super().test_model(model)
