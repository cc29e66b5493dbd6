"""Rotated queries, and keys and values in their places, against core's reference."""

import pytest
import torch

from ruvllm_core.decode.reference import rope
from ruvllm_core.decode.rope import rope_tables
from ruvllm_core.testing.tiny import tiny_spec

pytest.importorskip("triton", reason="Triton is not installed")


@pytest.mark.parametrize("scheme", ["f32", "f16", "bf16", "fp8"])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "dim", "rope_half", "interleaved", "biased"),
    [
        (7, 1, 64, 32, False, True),
        (3, 3, 80, 16, False, False),
        (4, 2, 96, 48, True, True),
        (2, 1, 128, 24, True, False),
    ],
)
def test_rotate_and_write(device, scheme, heads, kv_heads, dim, rope_half, interleaved, biased):
    from ruvllm_kernels_cuda.kv_write import rotate_and_write
    from ruvllm_kernels_cuda.rotary import RotaryTables
    from ruvllm_kernels_cuda.segments import KV_DTYPES, FloatKV

    size, blocks, tokens = 5, 4, 6
    kv = FloatKV(*(torch.full((blocks, kv_heads, size, dim), 7.0).to(KV_DTYPES[scheme]).to(device) for _ in "kv"))
    qkv, bias = torch.randn(tokens, (heads + 2 * kv_heads) * dim), torch.randn((heads + 2 * kv_heads) * dim)
    angles = torch.randn(2, 11, rope_half)
    if scheme == "fp8":  # which holds whole numbers up to 16, so that nothing is rounded: quarter turns of them
        qkv, bias, angles = (qkv * 2).round().clamp(-8, 8), bias.round(), (angles * 2).round() * (torch.pi / 2)
    cos, sin = angles.cos(), angles.sin()
    if scheme == "fp8":
        cos, sin = cos.round(), sin.round()
    tables = RotaryTables(cos.to(device), sin.to(device), interleaved)
    positions, variants = torch.tensor([0, 10, 3, 4, 1, 2]), torch.tensor([0, 1, 1, 0, 0, 1], dtype=torch.uint8)
    slots = torch.tensor([19, 0, 7, 6, -1, 13])
    args = (x.to(device) for x in (slots, positions))
    out = torch.full((tokens, heads, dim), torch.nan, device=device)
    shift = bias.to(device) if biased else None
    found = rotate_and_write(qkv.to(device), shift, kv, *args, tables, variants.to(device), out).cpu()

    parts = (qkv + bias * biased).view(tokens, -1, dim).split([heads, kv_heads, kv_heads], 1)
    cos, sin = (table.cpu()[variants.long(), positions] for table in (tables.cos, tables.sin))
    torch.testing.assert_close(found, rope(parts[0], cos, sin, interleaved), rtol=1e-5, atol=1e-5)
    written = slots >= 0
    for stored, new in ((kv.keys, rope(parts[1], cos, sin, interleaved)), (kv.values, parts[2])):
        flat = stored.cpu().float().transpose(1, 2).flatten(0, 1)
        tolerance = {"f32": 1e-5, "f16": 1e-3, "bf16": 8e-3, "fp8": 0.0}[scheme]
        torch.testing.assert_close(flat[slots[written]], new[written], rtol=tolerance, atol=1e-5)
        flat[slots[written]] = 7.0
        assert bool((flat == 7.0).all()), "something was written elsewhere"


def test_e4m3_holds_no_more_than_448(device):
    from ruvllm_kernels_cuda.kv_write import rotate_and_write
    from ruvllm_kernels_cuda.rotary import RotaryTables
    from ruvllm_kernels_cuda.segments import KV_DTYPES, FloatKV

    kv = FloatKV(*(torch.zeros(1, 1, 1, 64).to(KV_DTYPES["fp8"]).to(device) for _ in "kv"))
    tables = RotaryTables(torch.ones(1, 1, 32, device=device), torch.zeros(1, 1, 32, device=device), False)
    zero = torch.zeros(1, dtype=torch.int64, device=device)
    rotate_and_write(torch.full((1, 192), -1000.0, device=device), None, kv, zero, zero, tables)
    assert bool((kv.keys.float() == -448).all() and (kv.values.float() == -448).all())


def test_tables_are_those_of_core(device):
    from ruvllm_kernels_cuda.rotary import rotary_tables

    spec = tiny_spec()
    tables = rotary_tables(spec, 9, torch.device(device))
    cos, sin = rope_tables(spec, 0, 9)
    assert torch.equal(tables.cos[0].cpu(), torch.from_numpy(cos)) and tables.cos.shape[0] == 1
    assert torch.equal(tables.sin[0].cpu(), torch.from_numpy(sin)) and tables.interleaved == spec.rope_interleaved
