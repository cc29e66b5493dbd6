"""Moves between storages against core's: the same codes, but for ties that float32 rounds either way."""

import numpy as np
import pytest
import torch

from ruvllm_core.decode import coded
from ruvllm_core.decode.reference import rope
from ruvllm_core.errors import ConfigError

pytest.importorskip("triton", reason="Triton is not installed")


def reference(bits, dim, size, key, value):
    """`key` and `value` ``[M, K, D]`` as core codes them: codes and scales of both, and of means, in our layout."""
    from ruvllm_kernels_cuda.kv_move import split_rows

    scheme, blocks, kv_heads = f"q{bits}", len(key) // size, key.shape[1]
    storage = coded.CodedStorage(scheme, blocks, size, *([torch.empty(0)],) * 2, 0, dim)
    row = coded.store_row_bytes(dim, scheme)
    storage.keys, storage.values = ([torch.zeros(blocks, kv_heads, size, row, dtype=torch.uint8)] for _ in "kv")
    storage.means = [torch.zeros(blocks, kv_heads, dim + 2, dtype=torch.uint8)]
    storage.write(0, np.arange(len(key)), key, value)
    keys, values = (split_rows(one[0], bits, dim) for one in (storage.keys, storage.values))
    mean = storage.means[0]
    means = mean[..., :dim], mean[..., dim:].contiguous().view(torch.float16)[..., 0]
    return (keys[0], values[0], keys[1], values[1], *means), storage.read(0, torch.arange(blocks))


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize(
    ("dim", "size", "interleaved", "rope_half"),
    [(64, 16, None, 0), (128, 48, False, 64), (80, 16, False, 16), (96, 40, True, 48)],
)
def test_coding_and_back(device, bits, dim, size, interleaved, rope_half):
    """With a bias that keys are stored without, and without one; slots in any order, a block that is passed over."""
    from ruvllm_kernels_cuda.kv_move import move
    from ruvllm_kernels_cuda.segments import FloatKV, coded_kv, key_bias_table

    torch.manual_seed(dim + bits)
    kv_heads, tokens, blocks = 2, 2 * size, 4
    key, value = (torch.randn(tokens, kv_heads, dim).half().float() for _ in "kv")
    key[3], value[1, 0] = 0.0, (50 * value[1, 0]).half().float()  # nothing at all, and an outlier
    from_slots, positions = torch.randperm(tokens + 9)[:tokens], torch.randperm(tokens)
    source = FloatKV(*(torch.zeros((tokens + 16) // 7, kv_heads, 7, dim, dtype=torch.float16) for _ in "kv"))
    for stored, new in ((source.keys, key), (source.values, value)):
        stored[from_slots // 7, :, from_slots % 7] = new.half()
    center, biased = 0.0, None
    if interleaved is not None:
        bias, angles = 4 * torch.randn(kv_heads, dim), torch.randn(tokens, rope_half)
        angles[0] = 0.0
        biased = key_bias_table(*(x.to(device) for x in (bias, angles.cos(), angles.sin())), interleaved)
        center = rope(bias.expand(tokens, -1, -1), angles.cos()[positions], angles.sin()[positions], interleaved)
    expected, read = reference(bits, dim, size, key - center, value)

    target = coded_kv(blocks, kv_heads, size, dim, f"q{bits}", device)
    to_blocks = torch.tensor([2, 0, -1])
    to_slots = (to_blocks[:, None] * size + torch.arange(size)).flatten()
    padded = torch.cat((from_slots, from_slots[:size])), to_slots, torch.cat((positions, positions[:size]))
    held = FloatKV(source.keys.to(device), source.values.to(device))
    move(held, target, *(x.to(device) for x in padded), biased)
    found = target.keys, target.values, target.key_scales, target.value_scales, target.means, target.mean_scales
    for mine, theirs in zip(found, expected, strict=True):
        mine = mine.cpu()
        assert not mine[[1, 3]].any(), "a block that nobody named was written"
        same = (mine[to_blocks[:2]] == theirs).double().mean()
        assert same > 0.99, f"{1 - same:.1%} of the codes or scales differ"

    back = FloatKV(*(torch.zeros(tokens, kv_heads, 1, dim, device=device) for _ in "kv"))
    order = torch.randperm(tokens)
    move(target, back, to_slots[order].to(device), torch.arange(tokens).to(device), positions[order].to(device), biased)
    for mine, theirs in zip((back.keys, back.values), read, strict=True):
        flat = theirs.transpose(1, 2).flatten(0, 1)
        flat = flat + center if mine is back.keys else flat
        error = (mine.cpu()[:, :, 0] - flat[order]).norm() / flat.norm()
        assert error < {8: 1e-3, 4: 5e-3}[bits]


@pytest.mark.parametrize("schemes", [("f16", "f16"), ("bf16", "f32"), ("fp8", "fp8"), ("fp8", "f16")])
def test_copies(device, schemes):
    from ruvllm_kernels_cuda.kv_move import move
    from ruvllm_kernels_cuda.segments import KV_DTYPES, FloatKV

    source, target = (
        FloatKV(*(torch.randn(4, 2, 3, 8).to(KV_DTYPES[scheme]).to(device) for _ in "kv")) for scheme in schemes
    )
    before, at, to = target.keys.float().clone(), torch.tensor([1, 11, 5]), torch.tensor([0, 10, 7])
    move(source, target, at.to(device), to.to(device), torch.zeros(3, dtype=torch.int64))
    wanted = source.keys.float().transpose(1, 2).flatten(0, 1)[at].to(target.keys.dtype).float()
    found = target.keys.float().transpose(1, 2).flatten(0, 1)
    assert torch.equal(found[to].cpu(), wanted.cpu())
    rest = [n for n in range(12) if n not in to.tolist()]
    assert torch.equal(found[rest].cpu(), before.transpose(1, 2).flatten(0, 1)[rest].cpu())


def test_what_cannot_be_done_says_so(device):
    from ruvllm_kernels_cuda.kv_move import move
    from ruvllm_kernels_cuda.segments import coded_kv

    one = coded_kv(1, 1, 16, 64, "q8", device)
    slots = torch.zeros(16, dtype=torch.int64)
    with pytest.raises(ConfigError, match="from one quantized storage to another"):
        move(one, one, slots, slots, slots)
    with pytest.raises(ConfigError, match="head_dim of at most 128"):
        coded_kv(1, 1, 16, 192, "q8", device)
