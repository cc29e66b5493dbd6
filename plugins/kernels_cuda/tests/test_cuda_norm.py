"""Norms against the formula in float64."""

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")


@pytest.mark.parametrize("width", [7, 96, 3584])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norms(device, width, dtype):
    from ruvllm_kernels_cuda.norm import add_rms_norm, rms_norm

    x, residual = torch.randn(3, 2 * width)[:, :width].to(dtype), 3 * torch.randn(3, width)
    weight, eps = torch.randn(width), 1e-3
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2

    def expected(values):
        wide = values.double()
        return weight.double() * wide / (wide.pow(2).mean(-1, keepdim=True) + eps).sqrt()

    found = rms_norm(x.to(device), weight.to(device), eps, dtype=dtype).cpu()
    assert (found - expected(x)).norm() <= tolerance * expected(x).norm()
    total, out = residual.clone().to(device), torch.full((3, width), torch.nan, dtype=dtype, device=device)
    assert add_rms_norm(x.to(device), total, weight.to(device), eps, out) is out
    torch.testing.assert_close(total.cpu(), residual + x.float())
    found = out.cpu().double()
    assert (found - expected(residual + x.float())).norm() <= tolerance * expected(residual + x.float()).norm()
