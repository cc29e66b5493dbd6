"""Attention and the small operations of a decoding step on an NVIDIA GPU: time, and share of what its memory does.

The shape is Qwen2.5-7B's: 28 query heads, 4 key/value heads of 128 values, hidden size 3584, 152,064 tokens. Each case
is captured in a CUDA graph that goes through several copies of its data, so that the L2 cache does not serve what
memory would; the time is the median of replays, divided by the calls in the graph. Prints a table and one JSON line.

    python benchmarks/gpu/attention.py [--json FILE] [--seconds 95]
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from ruvllm_kernels_cuda import decode_attention as decoding
from ruvllm_kernels_cuda import gated, kv_write, lora, norm, sampling
from ruvllm_kernels_cuda import prefill_attention as prefilling
from ruvllm_kernels_cuda.attention_kernel import Attention
from ruvllm_kernels_cuda.rotary import RotaryTables
from ruvllm_kernels_cuda.segments import CodedKV, DeviceSegment, FloatKV, coded_kv

HEADS, KV_HEADS, DIM, HIDDEN, FEED_FORWARD, VOCABULARY = 28, 4, 128, 3584, 18944, 152064
SIZE, TAIL = 64, 256  # tokens of a block, and floats behind a coded segment
BEYOND_CACHE = 200e6  # bytes that a graph goes through, several times the L2 cache
MOST_COPIES = 48
Row = dict[str, Any]


def timed(calls: Sequence[Callable[[], Any]], repeats: int = 9) -> float:
    """Seconds of a call, by replaying a graph of all of them."""
    side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for call in calls:  # compiles, and allocates what is kept
            call()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    for _ in range(3):
        graph.replay()
    torch.cuda.synchronize()
    found: list[float] = []
    for _ in range(repeats):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        found.append(begin.elapsed_time(end) / 1e3)
    return statistics.median(found) / len(calls)


def copies_of(nbytes: float) -> int:
    return max(1, min(MOST_COPIES, round(BEYOND_CACHE / nbytes)))


def int32(values: Any) -> torch.Tensor:
    return torch.as_tensor(values, dtype=torch.int32, device="cuda")


def copy_ceiling() -> float:
    """Bytes a second, read and written, of a device-to-device copy of 1 GB."""
    source = torch.randn(256 << 20, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.nbytes / timed([lambda: target.copy_(source)])


def floats(blocks: int) -> FloatKV:
    return FloatKV(*(torch.randn(blocks, KV_HEADS, SIZE, DIM, dtype=torch.float16, device="cuda") for _ in range(2)))


def segment(kv: FloatKV | CodedKV, batch: int, length: int, start: int) -> DeviceSegment:
    """Blocks in random order, `length` tokens of each sequence."""
    width = -(-length // SIZE)
    table = torch.randperm(batch * width, device="cuda").int().view(batch, width)
    return DeviceSegment(kv, table, int32([length] * batch), int32([start] * batch))


def cache(scheme: str, batch: int, depth: int) -> tuple[list[DeviceSegment], int]:
    """Segments of `depth` tokens a sequence, and the bytes a step reads of them."""
    value_bytes = 2 * KV_HEADS * DIM * batch  # keys and values of a token with a byte a value
    if scheme == "f16":
        return [segment(floats(batch * (depth // SIZE)), batch, depth, 0)], 2 * depth * value_bytes
    stored = depth - TAIL
    coded = coded_kv(batch * (stored // SIZE), KV_HEADS, SIZE, DIM, scheme, "cuda")
    for codes in (coded.keys, coded.values, coded.means):
        codes.random_(0, 256)
    for scales in (coded.key_scales, coded.value_scales, coded.mean_scales):
        scales.uniform_(0.5 / 2**coded.bits, 2 / 2**coded.bits)
    tail = segment(floats(batch * (TAIL // SIZE)), batch, TAIL, stored)
    per_token = value_bytes * coded.bits // 8 + 2 * KV_HEADS * 2 * (DIM // 64) * batch
    return [segment(coded, batch, stored, 0), tail], per_token * stored + 2 * TAIL * value_bytes


def decode_case(
    scheme: str, batch: int, depth: int, tunings: Sequence[tuple[int, int, int]], ceiling: float
) -> list[Row]:
    splits = decoding.plan_splits(batch, KV_HEADS, depth)
    positions, cu_q = int32([depth - 1] * batch), int32(range(batch + 1))
    boundary = None if scheme == "f16" else int32([depth - TAIL] * batch)
    call = Attention(cu_q, positions, DIM**-0.5, boundary=boundary)
    query = torch.randn(batch, HEADS, DIM, dtype=torch.float16, device="cuda")
    out, space = torch.empty_like(query), decoding.decode_workspace(batch, HEADS, DIM, splits, query.device)
    first, nbytes = cache(scheme, batch, depth)
    caches = [first] + [cache(scheme, batch, depth)[0] for _ in range(copies_of(nbytes) - 1)]
    rows = []
    for tuning in tunings:
        attend = decoding.decode_attention
        calls = [partial(attend, query, segments, call, 1, splits, space, out, tuning) for segments in caches]
        seconds = timed(calls)
        rows.append({
            "case": f"decode {scheme} batch {batch} depth {depth}", "tuning": str(tuning), "splits": splits,
            "us": seconds * 1e6, "GB/s": nbytes / seconds / 1e9, "of copy": nbytes / seconds / ceiling,
        })  # fmt: skip
    return rows


def prefill_case(length: int) -> list[Row]:
    """Causal attention of one whole prompt, and the same with PyTorch's scaled_dot_product_attention."""
    operations = 4 * HEADS * DIM * length * (length + 1) / 2
    query = torch.randn(length, HEADS, DIM, dtype=torch.float16, device="cuda")
    segments, _ = cache("f16", 1, length)
    call = Attention(int32([0, length]), torch.arange(length, dtype=torch.int32, device="cuda"), DIM**-0.5)
    kv, table = segments[0].kv, segments[0].block_table[0].long()
    key, value = (one[table].transpose(0, 1).flatten(1, 2)[None].contiguous() for one in (kv.keys, kv.values))
    plain = query.transpose(0, 1)[None].contiguous()
    key, value = (one.repeat_interleave(HEADS // KV_HEADS, 1) for one in (key, value))

    def peer() -> torch.Tensor:
        return F.scaled_dot_product_attention(plain, key, value, is_causal=True, scale=DIM**-0.5)

    wanted = peer()[0].transpose(0, 1).float()
    seconds = timed([peer])
    name = f"prefill {length}"
    rows = [{"case": name, "tuning": "torch SDPA", "us": seconds * 1e6, "TFLOP/s": operations / seconds / 1e12}]
    out = torch.empty_like(query)
    for tuning in prefilling.TUNINGS:
        attend = partial(prefilling.prefill_attention, query, segments, call, length, out, tuning)
        seconds = timed([attend])
        error = ((out.float() - wanted).norm() / wanted.norm()).item()
        shape = f"{tuning.rows}x{tuning.tile} warps {tuning.warps} stages {tuning.stages}"
        rows.append({
            "case": name, "tuning": shape, "us": seconds * 1e6, "TFLOP/s": operations / seconds / 1e12, "error": error
        })  # fmt: skip
    return rows


def small_cases(batch: int) -> list[Row]:
    """The operations between the products, once for each of several inputs."""
    count = 16
    half, device = torch.float16, torch.device("cuda")
    hidden = [torch.randn(batch, HIDDEN, device=device) for _ in range(count)]
    residual, weight = torch.randn(batch, HIDDEN, device=device), torch.randn(HIDDEN, device=device)
    qkv = [torch.randn(batch, (HEADS + 2 * KV_HEADS) * DIM, device=device) for _ in range(count)]
    gate_up = [torch.randn(batch, 2 * FEED_FORWARD, dtype=torch.bfloat16, device=device) for _ in range(count)]
    normed, inner = hidden[0].bfloat16(), gate_up[0][:, :FEED_FORWARD].contiguous()
    kv, bias = floats(max(batch, 4)), torch.randn((HEADS + 2 * KV_HEADS) * DIM, device=device)
    slots, positions = torch.arange(batch, device=device) * SIZE, int32(range(batch))
    angles = torch.randn(1, 8192, DIM // 2, device=device)
    tables, query = (
        RotaryTables(angles.cos(), angles.sin(), False),
        torch.empty(batch, HEADS, DIM, dtype=half, device=device),
    )
    pool = lora.low_rank_pool(4, 16, HIDDEN, HIDDEN, device)
    pool.put(1, torch.randn(16, HIDDEN, device=device), torch.randn(HIDDEN, 16, device=device), 0.5)
    adapters, space = int32([1] * batch), lora.lora_workspace(batch, pool)
    logits = [torch.randn(batch, VOCABULARY, device=device) * 3 for _ in range(4)]
    doubles = [torch.full((batch,), value, dtype=torch.float64, device=device) for value in (0.8, 0.9, 0.0, 0.4)]
    rows = sampling.SamplingRows(doubles[0], int32([40] * batch), *doubles[1:])
    work = sampling.SamplingWorkspace(batch, VOCABULARY, device)
    cases: dict[str, Sequence[Callable[[], Any]]] = {
        "add_rms_norm": [partial(norm.add_rms_norm, x, residual, weight, 1e-6, normed) for x in hidden],
        "rotate_and_write": [
            partial(kv_write.rotate_and_write, x, bias, kv, slots, positions, tables, None, query) for x in qkv
        ],
        "gated silu": [partial(gated.gated, x, "silu", inner) for x in gate_up],
        "add_low_rank r 16": [partial(lora.add_low_rank, x, normed, pool, adapters, space) for x in hidden],
        "sample greedy": [partial(sampling.sample, x, None, work) for x in logits],
        "sample temperature": [partial(sampling.sample, x, rows, work, top_k=False, top_p=False) for x in logits],
        "sample top-p": [partial(sampling.sample, x, rows, work, top_k=False) for x in logits],
        "sample top-k, top-p": [partial(sampling.sample, x, rows, work) for x in logits],
    }
    return [{"case": f"{name} batch {batch}", "us": timed(calls) * 1e6} for name, calls in cases.items()]


def table(rows: Sequence[Row]) -> str:
    lines = [f"{'case':38} {'tuning':30} {'us':>9} {'GB/s':>7} {'of copy':>7} {'TFLOP/s':>8}"]
    for row in rows:
        cells = [
            f"{row[name]:{form}}" if name in row else " " * width
            for name, form, width in (
                ("us", "9.1f", 9),
                ("GB/s", "7.0f", 7),
                ("of copy", "7.2f", 7),
                ("TFLOP/s", "8.1f", 8),
            )
        ]
        lines.append(f"{row['case']:38} {row.get('tuning', ''):30} {' '.join(cells)}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the figures here too")
    parser.add_argument("--seconds", type=float, default=95.0, help="begin no case after so long")
    options = parser.parse_args()
    begin, rows, left_out = time.monotonic(), [], []
    torch.manual_seed(0)
    ceiling = copy_ceiling()
    work: list[tuple[str, Callable[[], list[Row]]]] = []
    best: dict[str, list[tuple[int, int, int]]] = {}

    def decode(scheme: str, batch: int, depth: int) -> list[Row]:
        tunings = best.get(scheme) or list(decoding.TUNINGS if scheme == "f16" else decoding.CODED_TUNINGS)
        found = decode_case(scheme, batch, depth, tunings, ceiling)
        if scheme not in best:  # all of them once, at batch 1 and depth 8192, and the best two everywhere else
            order = sorted(range(len(found)), key=lambda n: float(found[n]["us"]))
            best[scheme] = [tunings[n] for n in order[:2]]
        return found

    for batch, depth in [(batch, depth) for batch in (1, 8, 32) for depth in (8192, 512, 32768)]:
        for scheme in ("f16", "q8", "q4"):
            work.append((f"decode {scheme} {batch} {depth}", partial(decode, scheme, batch, depth)))
    prompts: list[tuple[str, Callable[[], list[Row]]]] = [
        (f"prefill {length}", partial(prefill_case, length)) for length in (2048, 8192)
    ]
    small: list[tuple[str, Callable[[], list[Row]]]] = [
        (f"small {batch}", partial(small_cases, batch)) for batch in (1, 32)
    ]
    for name, run in [*work[:3], *prompts, *small, *work[3:]]:
        if time.monotonic() - begin > options.seconds:
            left_out.append(name)
            continue
        rows += run()
        torch.cuda.empty_cache()
    figures = {
        "device": torch.cuda.get_device_name(), "copy GB/s": ceiling / 1e9, "seconds": time.monotonic() - begin,
        "left out": left_out, "rows": rows,
    }  # fmt: skip
    if options.json:
        options.json.write_text(json.dumps(figures, indent=1))
    print(json.dumps(figures))
    print(table(rows))
    took = time.monotonic() - begin
    device = figures["device"]
    print(f"{device}: copy {ceiling / 1e9:.0f} GB/s, {took:.0f} s, left out: {', '.join(left_out) or 'nothing'}")


if __name__ == "__main__":
    main()
