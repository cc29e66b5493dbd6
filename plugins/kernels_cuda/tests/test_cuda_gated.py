"""Gates against core's reference in float64."""

import pytest
import torch

from ruvllm_core.decode import reference

pytest.importorskip("triton", reason="Triton is not installed")


@pytest.mark.parametrize("activation", ["silu", "gelu_tanh", "gelu"])
@pytest.mark.parametrize(("width", "dtype", "tolerance"), [(5, torch.float32, 1e-6), (1030, torch.bfloat16, 5e-3)])
def test_gated(device, activation, width, dtype, tolerance):
    from ruvllm_kernels_cuda.gated import gated

    both = (3 * torch.randn(3, 2 * width)).to(dtype)
    out = torch.full((3, width), torch.nan, dtype=dtype, device=device)
    found = gated(both.to(device), activation, out).cpu().double()
    expected = reference.gated(both.double(), activation)
    assert (found - expected).norm() <= tolerance * expected.norm()
