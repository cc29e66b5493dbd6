"""Low-rank deltas of several adapters against the formula in float64."""

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("inputs", "outputs", "ranks"), [(70, 33, (3, 8)), (1100, 300, (1, 1))])
def test_each_row_has_its_own_adapter(device, dtype, inputs, outputs, ranks):
    from ruvllm_kernels_cuda.lora import add_low_rank, lora_workspace, low_rank_pool

    pool = low_rank_pool(3, max(ranks), inputs, outputs, torch.device(device), dtype)
    factors = [(torch.randn(r, inputs).to(dtype), torch.randn(outputs, r).to(dtype), 0.5 + r) for r in ranks]
    pool.put(2, torch.ones(max(ranks), inputs), torch.ones(outputs, max(ranks)), 9.0)  # to be overwritten
    for slot, factor in zip((0, 2), factors, strict=True):
        pool.put(slot, *factor)
    x, adapters = torch.randn(5, inputs).to(dtype), torch.tensor([2, -1, 0, 2, 1], dtype=torch.int32)
    wide = torch.randn(5, outputs + 7).to(dtype)
    y, space = wide.clone().to(device), lora_workspace(6, pool)
    add_low_rank(y[:, 3 : outputs + 3], x.to(device), pool, adapters.to(device), space.fill_(torch.nan))

    expected = wide.double()
    for row, adapter in enumerate(adapters.tolist()):
        if adapter in (0, 2):  # slot 1 is empty
            a, b, scale = factors[adapter // 2]
            expected[row, 3 : outputs + 3] += scale * b.double() @ (a.double() @ x[row].double())
    error = (y.cpu() - expected).norm() / expected.norm()
    assert error < (1e-6 if dtype == torch.float32 else 5e-3)
    untouched = [n for n in range(outputs + 7) if not 3 <= n < outputs + 3]
    assert torch.equal(y.cpu()[:, untouched], wide[:, untouched]) and torch.equal(y.cpu()[[1, 4]], wide[[1, 4]])


def test_the_final_site_changes_its_own_input(device):
    from ruvllm_kernels_cuda.lora import add_low_rank, low_rank_pool

    pool = low_rank_pool(1, 2, 96, 96, torch.device(device), torch.float32)
    a, b, hidden = torch.randn(2, 96), torch.randn(96, 2), torch.randn(2, 96)
    pool.put(0, a.to(device), b.to(device), 0.25)
    found = hidden.clone().to(device)
    add_low_rank(found, found, pool, torch.zeros(2, dtype=torch.int32, device=device))
    torch.testing.assert_close(found.cpu(), hidden + 0.25 * hidden @ a.T @ b.T, rtol=1e-5, atol=1e-5)
