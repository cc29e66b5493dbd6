"""Attention over segments of every kind, against one softmax in float64 over the keys that are there."""

import math

import pytest
import torch
from torch import Tensor

from ruvllm_core.decode import coded
from ruvllm_core.decode.reference import rope
from ruvllm_core.errors import ConfigError

pytest.importorskip("triton", reason="Triton is not installed")

TOLERANCE = {"f32": 1e-5, "f16": 2e-3, "bf16": 1e-2, "fp8": 2e-3, "q8": 2e-3, "q4": 2e-3}


class Case:
    """A ragged batch with its cache in segments, and the keys and values that are in it in float64."""

    def __init__(self, device, scheme="f16", heads=2, kv_heads=1, dim=64, size=16, lengths=(5, 37), counts=(1, 1),
                 store="", older=0, bias=False, interleaved=False, rope_dim=0):  # fmt: skip
        from ruvllm_kernels_cuda.segments import KV_DTYPES, DeviceSegment, FloatKV

        self.draw = torch.Generator().manual_seed(len(scheme) + dim + heads + sum(lengths))
        self.device, self.dim, self.kv_heads, self.lengths = device, dim, kv_heads, lengths
        self.counts, self.interleaved, self.bias = counts, interleaved, None
        dtype = torch.float32 if scheme == "f32" else torch.bfloat16 if scheme == "bf16" else torch.float16
        self.query = (2 * self.randn(sum(counts), heads, dim)).to(dtype)
        self.positions = torch.cat([torch.arange(n - c, n) for n, c in zip(lengths, counts, strict=True)])
        self.segments, self.keys, self.values = [], [[] for _ in lengths], [[] for _ in lengths]
        begins = [0] * len(lengths)
        self.parts = [older and min(older, n - c) for n, c in zip(lengths, counts, strict=True)]
        if bias:
            half = (rope_dim or dim) // 2
            angles = torch.arange(256)[:, None] * 10000.0 ** -(torch.arange(half) / half)
            self.cos, self.sin = 1.25 * angles.cos(), 1.25 * angles.sin()
            self.bias = 8 * self.randn(kv_heads, dim)
        for which in (("older",) if older else ()) + ((store,) if store else ()) + ("newest",):
            ends = list(lengths)
            if which == "older":
                ends = self.parts
            elif which == store:  # whole blocks, as long as one is left for the newest tokens
                ends = [b + max(n - c - b, 0) // size * size for b, n, c in zip(begins, lengths, counts, strict=True)]
            spans = [e - b for b, e in zip(begins, ends, strict=True)]
            block = size + 3 if which == "older" else size
            table, total = self.table(spans, block)
            key, value = self.randn(total, kv_heads, block, dim), self.randn(total, kv_heads, block, dim)
            if which == store:
                kv, key, value = self.coded(key, value, store, table, begins, spans)
            else:
                kv = FloatKV(*(x.to(KV_DTYPES[scheme]).to(device) for x in (key, value)))
                key, value = kv.keys.cpu().double(), kv.values.cpu().double()
            for b, span in enumerate(spans):
                for into, found in ((self.keys, key), (self.values, value)):
                    into[b].append(found[table[b].long()].transpose(0, 1).flatten(1, 2)[:, :span])
                if which == store and self.bias is not None:
                    at = torch.arange(begins[b], begins[b] + span)
                    self.keys[b][-1] = self.keys[b][-1] + self.center(at).transpose(0, 1)
            numbers = [torch.tensor(x, dtype=torch.int32, device=device) for x in (spans, begins)]
            self.segments.append(DeviceSegment(kv, table.to(device), *numbers))
            begins = ends

    def randn(self, *shape):
        return torch.randn(*shape, generator=self.draw)

    def center(self, at):
        """The bias as it stands in keys at positions `at`, ``[M, K, D]``."""
        return rope(self.bias.expand(len(at), -1, -1), self.cos[at], self.sin[at], self.interleaved).double()

    def table(self, spans, size):
        widths = [-(-span // size) for span in spans]
        order = torch.randperm(sum(widths) + 2, generator=self.draw).int()
        table = torch.zeros(len(spans), max(*widths, 1), dtype=torch.int32)
        for b, width in enumerate(widths):
            table[b, :width] = order[sum(widths[:b]) :][:width]
        return table, sum(widths) + 2

    def coded(self, key, value, scheme, table, begins, spans):
        """Storage that holds what the reference makes of keys and values, and that again as floats."""
        from ruvllm_kernels_cuda.kv_move import split_rows
        from ruvllm_kernels_cuda.segments import CodedKV

        bits, total, size = {"q8": 8, "q4": 4}[scheme], *key.shape[::2][:2]
        storage = coded.CodedStorage(scheme, total, size, *([torch.empty(0)],) * 2, 0, self.dim)
        row = coded.store_row_bytes(self.dim, scheme)
        storage.keys, storage.values = ([torch.zeros(total, self.kv_heads, size, row, dtype=torch.uint8)] for _ in "kv")
        storage.means = [torch.zeros(total, self.kv_heads, self.dim + 2, dtype=torch.uint8)]
        flat = [x.transpose(1, 2).flatten(0, 1) for x in (key, value)]
        storage.write(0, torch.arange(total * size).numpy(), *flat)
        read = [x.double() for x in storage.read(0, torch.arange(total))]
        parts = [split_rows(x[0], bits, self.dim) for x in (storage.keys, storage.values)]
        mean = (
            storage.means[0][..., : self.dim],
            storage.means[0][..., self.dim :].contiguous().view(torch.float16)[..., 0],
        )
        tensors = (parts[0][0], parts[1][0], parts[0][1], parts[1][1], *mean)
        return CodedKV(bits, self.dim, *(x.contiguous().to(self.device) for x in tensors)), *read

    def call(self, **more):
        from ruvllm_kernels_cuda.attention_kernel import Attention
        from ruvllm_kernels_cuda.segments import key_bias_table

        cu_q = torch.tensor([0, *self.counts]).cumsum(0).int().to(self.device)
        if self.bias is not None:
            tables = (x.float().to(self.device) for x in (self.bias, self.cos, self.sin))
            more["key_bias"] = key_bias_table(*tables, self.interleaved)
        if (limits := more.get("boundary")) is not None:
            more["boundary"] = limits.to(self.device)
        return Attention(cu_q, self.positions.int().to(self.device), self.dim**-0.5, **more)

    def expected(self, window=None, softcap=None, boundary=None) -> Tensor:
        rows, parts, group = iter(range(len(self.query))), [], self.query.shape[1] // self.kv_heads
        for b, count in enumerate(self.counts):
            spans = [part.shape[1] for part in self.keys[b]]
            at = torch.cat([torch.arange(s, s + n) for s, n in zip(self.begins(b), spans, strict=True)])
            newest = torch.arange(sum(spans)) >= sum(spans[:-1])
            key, value = (torch.cat(x[b], 1).repeat_interleave(group, 0) for x in (self.keys, self.values))
            for row in (next(rows) for _ in range(count)):
                here = int(self.positions[row])
                seen = (at <= here) & (at > here - (window or 1 << 30))
                if boundary is not None:
                    seen &= torch.where(newest, at >= boundary[row], at < boundary[row])
                scores = torch.einsum("hd,hnd->hn", self.query[row].double(), key) * self.dim**-0.5
                if softcap:
                    scores = softcap * torch.tanh(scores / softcap)
                parts.append(torch.softmax(scores.masked_fill(~seen, -math.inf), 1)[:, None] @ value)
        return torch.stack(parts)[:, :, 0]

    def begins(self, b):
        return [int(one.starts[b]) for one in self.segments]


def check(found, expected, tolerance):
    error = (found.cpu().double() - expected).norm() / expected.norm()
    assert error <= tolerance, f"relative error {error:.2e}"


def decode(case, splits=3, tuning=(16, 2, 2), **more):
    from ruvllm_kernels_cuda.decode_attention import decode_attention, decode_workspace

    query = case.query.to(case.device)
    workspace = decode_workspace(*query.shape, splits, query.device)
    for one in workspace:
        one.fill_(math.nan)
    out = torch.full_like(query, math.nan)
    return decode_attention(query, case.segments, case.call(**more), max(case.counts), splits, workspace, out, tuning)


def prefill(case, tile=16, rows=16, **more):
    from ruvllm_kernels_cuda.attention_kernel import Tuning
    from ruvllm_kernels_cuda.prefill_attention import prefill_attention

    query = case.query.to(case.device)
    out, tuning = torch.full_like(query, math.nan), Tuning(rows, tile, 4, 2)
    return prefill_attention(query, case.segments, case.call(**more), max(case.counts), out, tuning)


@pytest.mark.parametrize("scheme", ["f32", "f16", "bf16", "fp8"])
@pytest.mark.parametrize("run", [decode, prefill])
def test_schemes(device, scheme, run):
    case = Case(device, scheme, heads=6, kv_heads=2, dim=64, size=16, lengths=(1, 70), counts=(1, 2))
    check(run(case), case.expected(), TOLERANCE[scheme])


@pytest.mark.parametrize(("heads", "kv_heads", "dim", "size"), [(1, 1, 80, 5), (7, 1, 128, 16), (6, 2, 96, 40)])
@pytest.mark.parametrize("run", [decode, prefill])
def test_shapes(device, heads, kv_heads, dim, size, run):
    """Any width, groups of 1, 3 and 7, tiles across blocks, blocks wider than tiles; queries in several row blocks."""
    case = Case(device, "f16", heads, kv_heads, dim, size, (33, 3, 50), (3, 2, 20 if run is prefill else 1))
    check(run(case), case.expected(), TOLERANCE["f16"])


@pytest.mark.parametrize("splits", [1, 2, 9])
def test_any_number_of_splits_gives_the_same_answer(device, splits):
    case = Case(device, "f16", heads=2, lengths=(64, 17), counts=(1, 1))
    check(decode(case, splits), case.expected(), TOLERANCE["f16"])


@pytest.mark.parametrize("run", [decode, prefill])
def test_window_and_softcap(device, run):
    case = Case(device, "f32", heads=3, kv_heads=1, dim=64, size=8, lengths=(60, 6), counts=(4, 2))
    for how in ({"window": 19}, {"softcap": 2.0}, {"window": 5, "softcap": 1.5}):
        check(run(case, **how), case.expected(**how), TOLERANCE["f32"])


@pytest.mark.parametrize("run", [decode, prefill])
def test_a_boundary_between_overlapping_segments(device, run):
    """Which of two segments a query reads depends on its own boundary; 0 is the newest alone."""
    case = Case(device, "f32", heads=2, size=8, lengths=(40, 30, 9), counts=(5, 1, 1), older=20)
    newest = case.segments[-1]
    before = Case(device, "f32", heads=2, size=8, lengths=(40, 30, 9), counts=(5, 1, 1))
    case.segments[-1] = before.segments[-1]  # the newest has everything from position 0 on, the older one a part again
    for b, parts in enumerate(before.keys):
        case.keys[b][-1], case.values[b][-1] = parts[0], before.values[b][0]
    assert int(newest.starts[0]) == 20
    limits = torch.tensor([7, 7, 12, 12, 20, 20, 0], dtype=torch.int32)
    check(run(case, boundary=limits), case.expected(boundary=limits), TOLERANCE["f32"])


@pytest.mark.parametrize("scheme", ["q8", "q4"])
@pytest.mark.parametrize(("heads", "dim"), [(2, 64), (1, 80), (3, 96), (7, 128)])
@pytest.mark.parametrize("run", [decode, prefill])
def test_coded_segments(device, scheme, heads, dim, run):
    """Sinks, a store and a tail, as two tiers have them; one sequence has nothing in its store."""
    case = Case(device, "f16", heads, 1, dim, 16, (61, 19), (2, 1), store=scheme, older=5)
    check(run(case), case.expected(), TOLERANCE[scheme])


@pytest.mark.parametrize(("interleaved", "rope_dim", "dim"), [(False, 0, 64), (True, 0, 64), (False, 48, 80)])
def test_coded_keys_without_their_bias(device, interleaved, rope_dim, dim):
    """A bias several times what tells keys apart; blocks of two tiles, and a partial rotation."""
    case = Case(device, "f16", 3, 1, dim, 32, (90,), (1,), store="q8", bias=True, interleaved=interleaved,
                rope_dim=rope_dim)  # fmt: skip
    check(decode(case), case.expected(), 1e-2)  # scores are in the hundreds, products in float16
    assert (decode(case).cpu() - decode_without_bias(case).cpu()).abs().max() > 0.1


def decode_without_bias(case):
    kept, case.bias = case.bias, None
    try:
        return decode(case)
    finally:
        case.bias = kept


def test_a_sequence_without_tokens_is_passed_over(device):
    case = Case(device, "f16", heads=2, lengths=(20, 7, 33), counts=(1, 0, 1))
    check(decode(case), case.expected(), TOLERANCE["f16"])


def test_splits_fill_the_gpu_and_no_more():
    from ruvllm_kernels_cuda.decode_attention import plan_splits

    assert plan_splits(1, 4, 8192) * 4 in range(132, 2 * 132 + 1)
    assert plan_splits(1, 4, 100) == 2  # no more than there are tiles
    assert plan_splits(256, 8, 8192) == 1


def test_segments_that_no_policy_makes_are_refused(device):
    case = Case(device, "f16", lengths=(40,), counts=(1,), store="q8", older=5)
    with pytest.raises(ConfigError, match="at most one segment of floats"):
        case.segments.reverse()
        case.segments[-1] = case.segments[1]
        decode(case)
