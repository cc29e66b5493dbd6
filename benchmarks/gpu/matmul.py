"""Products with the matrices of Qwen2.5-7B on one NVIDIA GPU: every candidate configuration, against two ceilings.

    PYTHONPATH=.:plugins/kernels_cuda/src python benchmarks/gpu/matmul.py --json matmul.json

The ceilings are a device-to-device copy and a product of large bfloat16 matrices, measured in the same run. Times are
medians of CUDA graph replays over so many copies of the weights that none is still in the second-level cache. Weights
are random bits with small scales. The kernels are compiled first, by as many processes as there are processors.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, replace
from typing import Any

import torch

from ruvllm_kernels_cuda.gemm import TILE_CANDIDATES, gemm
from ruvllm_kernels_cuda.gemv import CANDIDATES, FLOAT_CANDIDATES, MOST_ROWS, gemv
from ruvllm_kernels_cuda.matmul import dense_matmul
from ruvllm_kernels_cuda.packing import BYTE, LAYOUTS, RECORD, PackedPart
from ruvllm_kernels_cuda.scratch import Scratch

HIDDEN, INNER, QKV, VOCABULARY = 3584, 18944, (28 + 2 * 4) * 128, 152064
MATRICES = {
    "qkv": (QKV, HIDDEN),
    "o": (HIDDEN, HIDDEN),
    "gate_up": (2 * INNER, HIDDEN),
    "down": (HIDDEN, INNER),
    "head": (VOCABULARY, HIDDEN),
}
SCHEMES = ("q4_k", "q6_k", "q8_0", "bf16")
COUNTS = (1, 2, 4, 8, 16, 32, 128, 2048)
SPLITS = (1, 2, 4, 8)
CACHE = 150 << 20  # bytes of weights that launches take turns through: three times an H100's second-level cache
Way = tuple[str, Any]  # "vector", "tiles" or "dense", and its configuration


def random_part(scheme: str, rows: int, columns: int) -> PackedPart:
    """Random weights on the GPU, of the size that trained ones have: larger ones overflow keys and values in f16."""
    layout = LAYOUTS.get(scheme)
    if layout is None:
        data = torch.randn(rows, columns, dtype=torch.bfloat16, device="cuda")
        return PackedPart(scheme, 0, rows, columns, data)
    records = -(-columns // RECORD)
    shape = (records, layout.chunks, rows, 4)
    data = torch.randint(-(2**31), 2**31, shape, dtype=torch.int32, device="cuda")
    data[:, : layout.scale_chunks] &= 0x07FF07FF  # f16 below 2^-13
    factors = None
    if layout.scales == BYTE:
        factors = torch.rand(-(-records // 4), rows, 4, device="cuda").mul(3e-5).half()
    return PackedPart(scheme, 0, rows, columns, data, factors)


def launch(way: Way, x: torch.Tensor, part: PackedPart, out: torch.Tensor, scratch: Scratch) -> None:
    kind, config = way
    if kind == "vector":
        gemv(x, part, out, scratch, config)
    elif kind == "tiles":
        gemm(x, part, out, scratch, config)
    else:
        dense_matmul(x, part, out, scratch, bias=None, residual=None)


def ways(scheme: str, count: int, rows: int, columns: int) -> list[Way]:
    """What can compute a product, without those that are sure to lose."""
    packed = scheme in LAYOUTS
    records = -(-columns // RECORD)
    found: list[Way] = []
    if count <= MOST_ROWS:
        for config in CANDIDATES if packed else FLOAT_CANDIDATES:
            if config.repeat * count > 4 and packed:  # does not fit into registers
                continue
            for split in SPLITS if packed else (1,):
                programs = -(-rows // (32 * config.repeat)) * split
                if split == 1 or (programs <= 132 * 16 and split * config.warps <= records):
                    found.append(("vector", replace(config, split=split)))
    if packed and 2 <= count <= 256:
        tokens = min(128, max(16, count))
        for candidate in TILE_CANDIDATES:
            for split in SPLITS:
                programs = -(-rows // candidate.rows) * split
                if split == 1 or (programs <= 132 * 8 and 2 * split <= records):
                    found.append(("tiles", replace(candidate, tokens=tokens, split=split)))
    if count >= 128 or not packed:
        found.append(("dense", None))
    return found


def compiled_alike(scheme: str, count: int, way: Way) -> tuple[str, int, Way]:
    """The smallest launch that needs the same machine code: splits other than one are alike, and so are matrices."""
    kind, config = way
    if kind == "tiles" and count < 16:  # Triton tells 1, multiples of 16, and all others apart
        count = 2
    return scheme, count, (kind, replace(config, split=min(config.split, 2)))


def compile_one(job: tuple[str, int, Way]) -> str:
    """In a process of its own: launch once, so that the code is in Triton's cache. Returns what went wrong, if so."""
    scheme, count, way = job
    try:
        scratch = Scratch.on("cuda", partial=1 << 20, arrived=1 << 10, dense=1)
        x = torch.randn(count, 9 * 256, dtype=torch.bfloat16, device="cuda")
        out = torch.empty(count, 256, dtype=torch.bfloat16, device="cuda")
        launch(way, x, random_part(scheme, 256, 9 * 256), out, scratch)
        torch.cuda.synchronize()
    except Exception as error:  # a configuration that needs more than there is
        return f"{scheme} {count} {way}: {str(error).splitlines()[0] if str(error) else error!r}"
    return ""


def compile_all(jobs: Iterable[tuple[str, int, Way]]) -> list[str]:
    context = multiprocessing.get_context("spawn")
    workers = min(16, len(os.sched_getaffinity(0)))
    with ProcessPoolExecutor(workers, mp_context=context) as pool:
        return [problem for problem in pool.map(compile_one, jobs) if problem]


def measure(run: Callable[[int], object], turns: int, repeats: int = 3) -> float:
    """Seconds of one `run`: the median of replays of a graph with `turns` of them."""
    for turn in range(min(turns, 2)):  # everything is loaded before it is captured
        run(turn)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for turn in range(turns):
            run(turn)
    graph.replay()
    times = []
    for _ in range(repeats):
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        stop.record()
        stop.synchronize()
        times.append(start.elapsed_time(stop) / 1e3 / turns)
    return statistics.median(times)


def ceilings() -> tuple[float, float]:
    """Bytes a second of a copy, read and written, and operations a second of a large product."""
    source = torch.randint(0, 2**31 - 1, (1 << 28,), dtype=torch.int32, device="cuda")  # 1 GiB
    target = torch.empty_like(source)
    copy = 2 * source.numel() * 4 / measure(lambda _: target.copy_(source), 4)
    a, b = (torch.randn(8192, 8192, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    c = torch.empty_like(a)
    return copy, 2 * 8192**3 / measure(lambda _: torch.mm(a, b, out=c), 4)


def measure_matrix(
    name: str, scheme: str, counts: Iterable[int], scratch: Scratch, deadline: float
) -> list[dict[str, Any]]:
    """All ways and numbers of activation rows for one matrix."""
    rows, columns = MATRICES[name]
    first = random_part(scheme, rows, columns)
    copies = max(2, min(24, -(-CACHE // first.nbytes)))
    parts = [first, *(random_part(scheme, rows, columns) for _ in range(copies - 1))]
    found: list[dict[str, Any]] = []
    for count in counts:
        x = torch.randn(count, columns, dtype=torch.bfloat16, device="cuda")
        out = torch.empty(count, rows, dtype=torch.bfloat16, device="cuda")
        for way in ways(scheme, count, rows, columns):
            if time.monotonic() > deadline:
                return found
            entry = {"matrix": name, "scheme": scheme, "count": count, "way": way[0], "bytes": first.nbytes}
            entry["config"] = asdict(way[1]) if way[1] else {}

            def run(turn: int, way: Way = way, x: torch.Tensor = x, out: torch.Tensor = out) -> None:
                launch(way, x, parts[turn % len(parts)], out, scratch)

            try:
                entry["seconds"] = measure(run, copies if count < 2048 else 2)
            except Exception as error:  # said in the list of results; others go on
                entry["problem"] = repr(error)[:200]
                torch.cuda.synchronize()
                scratch.arrived.zero_()
            found.append(entry)
    return found


def describe(config: dict[str, Any]) -> str:
    return " ".join(f"{name[0]}{value}" for name, value in config.items())


def table(results: list[dict[str, Any]], copy: float, product: float) -> None:
    """The fastest of each product, and the time of all matrices together by way."""
    best: dict[tuple[str, str, int, str], dict[str, Any]] = {}
    for entry in results:
        key = entry["matrix"], entry["scheme"], entry["count"], entry["way"]
        if "seconds" in entry and ("seconds" not in best.get(key, {}) or entry["seconds"] < best[key]["seconds"]):
            best[key] = entry
    print(
        f"{'matrix':8} {'scheme':6} {'rows':>4} {'µs':>9} {'GB/s':>6} {'of copy':>7} {'TFLOP/s':>7} {'of mm':>6}  way"
    )
    products = dict.fromkeys((matrix, scheme, count) for matrix, scheme, count, _ in best)
    for matrix, scheme, count in products:
        entry = min((e for k, e in best.items() if k[:3] == (matrix, scheme, count)), key=lambda e: e["seconds"])
        rows, columns = MATRICES[matrix]
        read, done = entry["bytes"] / entry["seconds"], 2.0 * rows * columns * count / entry["seconds"]
        print(
            f"{matrix:8} {scheme:6} {count:4} {entry['seconds'] * 1e6:9.1f} {read / 1e9:6.0f} {read / copy:7.0%} "
            f"{done / 1e12:7.1f} {done / product:6.0%}  {entry['way']} {describe(entry['config'])}"
        )
    print("\nµs of all matrices that every way was measured for, by way: where one overtakes another is a threshold")
    for scheme in SCHEMES:
        for count in COUNTS:
            kinds = {k[3] for k in best if k[1:3] == (scheme, count)}
            shared = [m for m in MATRICES if all((m, scheme, count, kind) in best for kind in kinds)]
            sums = {kind: sum(best[m, scheme, count, kind]["seconds"] for m in shared) * 1e6 for kind in sorted(kinds)}
            if kinds and shared:
                print(f"{scheme:6} {count:4}  " + "  ".join(f"{kind} {value:.1f}" for kind, value in sums.items()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", help="file for everything that was measured")
    parser.add_argument("--schemes", nargs="+", default=SCHEMES, choices=SCHEMES)
    parser.add_argument("--matrices", nargs="+", default=tuple(MATRICES), choices=tuple(MATRICES))
    parser.add_argument("--counts", nargs="+", type=int, default=COUNTS, help="activation rows")
    parser.add_argument("--budget", type=float, default=95.0, help="seconds for everything; what is left is not tried")
    options = parser.parse_args()
    begun = time.monotonic()
    deadline = begun + options.budget
    jobs = dict.fromkeys(
        compiled_alike(scheme, count, way)
        for scheme in options.schemes
        for count in options.counts
        for matrix in options.matrices
        for way in ways(scheme, count, *MATRICES[matrix])
        if way[1] is not None
    )
    problems = compile_all(jobs)
    print(f"{len(jobs)} kernels compiled in {time.monotonic() - begun:.0f} s")
    for problem in problems:
        print("cannot run:", problem)
    torch.manual_seed(0)
    copy, product = ceilings()
    scratch = Scratch.on("cuda", partial=1 << 24)
    results: list[dict[str, Any]] = []
    # The few rows of decoding first: they are what is cut off last.
    for few in (True, False):
        counts = [count for count in options.counts if (count <= 16) == few]
        for scheme in options.schemes:
            for matrix in options.matrices if counts else ():
                results += measure_matrix(matrix, scheme, counts, scratch, deadline)
    elapsed = time.monotonic() - begun
    device = torch.cuda.get_device_name()
    if options.json:
        report = {"device": device, "copy": copy, "product": product, "problems": problems, "results": results}
        with open(options.json, "w", encoding="utf-8") as file:  # noqa: PTH123
            json.dump(report, file)
    table(results, copy, product)
    print(f"\n{device}: copy {copy / 1e9:.0f} GB/s, product {product / 1e12:.0f} TFLOP/s; {elapsed:.0f} s", end="")
    print(", cut off" if elapsed > options.budget else "")
    print(json.dumps({"device": device, "copy_bytes_s": copy, "product_flop_s": product, "seconds": round(elapsed)}))


if __name__ == "__main__":
    main()
