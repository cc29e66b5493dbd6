"""Tokens drawn on the device against the host's sampler, given the same random numbers."""

import math

import numpy as np
import pytest
import torch

from ruvllm_core.generate.request import SamplingFields
from ruvllm_core.generate.sampler import Sampler, log_softmax

pytest.importorskip("triton", reason="Triton is not installed")

WIDTH = 2500  # two chunks, the second not full
HOW = [
    {"temperature": 0.0},
    {"temperature": 1.0, "top_p": 1.0},
    {"temperature": 0.7, "top_p": 0.9},
    {"temperature": 3.0, "top_p": 0.5},
    {"temperature": 1.3, "top_p": 1.0, "top_k": 7},
    {"temperature": 2.0, "top_p": 0.6, "top_k": 40},
    {"temperature": 1.5, "top_p": 0.99, "min_p": 0.1},
    {"temperature": 0.9, "top_p": 1.0, "min_p": 0.02},
    {"temperature": 1e-4, "top_p": 0.9},
    {"temperature": 5.0, "top_p": 0.95, "top_k": 5000},
]


def rows_of(params, uniforms, device):
    from ruvllm_kernels_cuda.sampling import SamplingRows

    def column(name, dtype):
        return torch.tensor([getattr(one, name) for one in params], dtype=dtype, device=device)

    parts = column("temperature", torch.float64), column("top_k", torch.int32)
    shares = column("top_p", torch.float64), column("min_p", torch.float64)
    return SamplingRows(*parts, *shares, torch.tensor(uniforms, dtype=torch.float64, device=device))


def on_host(params, logits, uniform):
    sampler = Sampler(params, (), len(logits))
    return sampler.sample(logits, lambda target, _: target.draw(uniform)).token


@pytest.mark.parametrize("shape", ["normal", "peaked", "ties"])
def test_the_host_draws_the_same(device, shape):
    from ruvllm_kernels_cuda.sampling import SamplingWorkspace, sample

    random = np.random.default_rng(7)
    logits = random.standard_normal((len(HOW), WIDTH)).astype(np.float32) * {"normal": 2, "peaked": 8, "ties": 1}[shape]
    if shape == "ties":
        logits = np.round(logits * 2)
        logits[:, 100:] = np.where(logits[:, 100:] > 0, -5.0, logits[:, 100:])  # few that a top-k cannot tell apart
        logits[:, :7] = 9.0
        logits[4] += np.arange(WIDTH, dtype=np.float32) / 1024  # the host takes any of those
    params = [SamplingFields(**how) for how in HOW]
    workspace = SamplingWorkspace(len(HOW) + 1, WIDTH, torch.device(device))
    for uniform in (0.0, 0.77, 1 - 1e-12):
        rows = rows_of(params, [uniform] * len(HOW), device)
        tokens, logprobs = sample(torch.from_numpy(logits).to(device), rows, workspace)
        expected = [on_host(one, row, uniform) for one, row in zip(params, logits, strict=True)]
        if shape == "ties":  # at the k-th place it may take others of the same logit, which weigh the same
            same = [
                logits[n, a] == logits[n, b] for n, (a, b) in enumerate(zip(tokens.tolist(), expected, strict=True))
            ]
            assert all(same[n] if params[n].top_k == 40 else a == b
                       for n, (a, b) in enumerate(zip(tokens.tolist(), expected, strict=True)))  # fmt: skip
        else:
            assert tokens.tolist() == expected
        wanted = [log_softmax(row)[token] for row, token in zip(logits, tokens.tolist(), strict=True)]
        np.testing.assert_allclose(logprobs.cpu().numpy(), wanted, rtol=1e-9)


def test_passes_that_nobody_needs_can_be_left_out(device):
    from ruvllm_kernels_cuda.sampling import SamplingWorkspace, sample

    logits = np.random.default_rng(8).standard_normal((2, 300)).astype(np.float32)
    workspace = SamplingWorkspace(2, 300, torch.device(device))
    on_device = torch.from_numpy(logits).to(device)
    assert sample(on_device, None, workspace)[0].tolist() == logits.argmax(1).tolist()
    for how in ({"top_k": 5, "top_p": 1.0}, {"top_p": 0.8}, {"top_p": 1.0}):
        params = [SamplingFields(temperature=1.5, **how)] * 2
        flags = {"top_k": "top_k" in how, "top_p": how["top_p"] < 1.0}
        found = sample(on_device, rows_of(params, [0.2, 0.9], device), workspace, **flags)[0].tolist()
        assert found == [on_host(params[0], row, u) for row, u in zip(logits, (0.2, 0.9), strict=True)]


def test_penalties_bias_and_counting(device):
    from ruvllm_kernels_cuda.penalties import Penalties
    from ruvllm_kernels_cuda.sampling import SamplingWorkspace, sample

    width, prompt = 64, (3, 9, 9, 11)
    params = SamplingFields(temperature=0.8, top_p=0.95, repetition_penalty=1.7, frequency_penalty=0.3,
                            presence_penalty=-0.4, logit_bias={5: 2.5, 9: -math.inf})  # fmt: skip
    host, random = Sampler(params, prompt, width), np.random.default_rng(9)
    seen = torch.zeros(3, width, dtype=torch.bool)
    seen[2, list(prompt)] = True
    one = [torch.tensor([x], dtype=torch.float32, device=device) for x in (1.7, 0.3, -0.4)]
    ids = torch.tensor([[5, 9, -1]], dtype=torch.int32, device=device)
    penalties = Penalties(
        *one, torch.zeros(3, width, dtype=torch.int32, device=device), seen.to(device),
        torch.tensor([2], dtype=torch.int32, device=device), ids, torch.tensor([[2.5, -math.inf, 0]], device=device),
    )  # fmt: skip
    workspace, drawn = SamplingWorkspace(1, width, torch.device(device)), []
    for _ in range(12):
        logits, uniform = random.standard_normal(width).astype(np.float32), random.random()
        adjusted = host.adjust(logits)
        expected = host.sample(logits, lambda target, _, u=uniform: target.draw(u)).token
        on_device = torch.from_numpy(logits[None].copy()).to(device)
        found = int(sample(on_device, rows_of([params], [uniform], device), workspace, penalties)[0])
        np.testing.assert_array_equal(on_device[0].cpu().numpy(), adjusted)
        assert found == expected
        drawn.append(found)
    assert penalties.counts[2].cpu().tolist() == np.bincount(drawn, minlength=width).tolist()
    assert not penalties.counts[:2].any() and not penalties.seen[:2].any()


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_logits_that_are_no_numbers_give_no_token(device, bad):
    from ruvllm_kernels_cuda.sampling import SamplingWorkspace, sample

    logits = torch.zeros(2, 40)
    logits[1, 17] = bad
    workspace = SamplingWorkspace(2, 40, torch.device(device))
    assert sample(logits.to(device), rows_of([SamplingFields()] * 2, [0.5] * 2, device), workspace)[0].tolist()[1] == -1
    forbidden = torch.full((1, 40), -math.inf)
    assert sample(forbidden.to(device), None, workspace)[0].tolist() == [-1]
