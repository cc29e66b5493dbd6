"""Whole models on one NVIDIA GPU: tokens a second of `CudaDecoder`, beside what the device copies and multiplies.

    PYTHONPATH=.:plugins/kernels_cuda/src:plugins/quantizers/src python benchmarks/gpu_bench.py --json gpu.json
    … benchmarks/gpu_bench.py --rows decode deep --budget 120

The models have the true shapes of Qwen2.5-7B with the recipe q4_k_m and of Mistral-7B in bfloat16, and random weights
made on the GPU. Decoding is `CudaDecoder.decode`: one graph launch a step, the tokens read at the end. Times are the
host's, from the call to its result in host memory, the median of several after one that compiles and captures. Prefill
is `step` on a whole prompt, which ends with its first token. Prints a table and one JSON line.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gpu.matmul import ceilings, random_part

from ruvllm_core.decode.batch import Batch
from ruvllm_core.decode.kv import KVView, Segment
from ruvllm_core.generate.request import GenerateParams, Request
from ruvllm_core.model.spec import ModelSpec, TensorSource, llama_tensor_names
from ruvllm_core.protocols import Adapter, DecoderOptions, LowRank
from ruvllm_kernels_cuda.decoder import CudaDecoder
from ruvllm_kernels_cuda.packing import PackedMatrix, PackedPart
from ruvllm_kernels_cuda.scratch import Scratch
from ruvllm_kernels_cuda.segments import CodedKV
from ruvllm_kernels_cuda.storage import DeviceStorage
from ruvllm_kernels_cuda.weights import PRODUCTS, LayerWeights, ModelWeights, Product
from ruvllm_quantizers.recipes import RECIPES

QWEN = ModelSpec(
    architecture="qwen2", vocab_size=152064, hidden_size=3584, intermediate_size=18944, num_layers=28, num_heads=28,
    num_kv_heads=4, head_dim=128, norm_eps=1e-6, max_context=36864, rope_theta=1e6, qkv_bias=True,
)  # fmt: skip
MISTRAL = ModelSpec(
    architecture="llama", vocab_size=32768, hidden_size=4096, intermediate_size=14336, num_layers=32, num_heads=32,
    num_kv_heads=8, head_dim=128, norm_eps=1e-5, max_context=4096, rope_theta=1e6, rope_interleaved=True,
)  # fmt: skip
BLOCK, STEPS, REPEATS = 64, 128, 3
TAIL, SINKS = 256, 4  # of two tiers, as the plugin has them
#: What must be reached, and what is aimed at, in the unit of each result.
GOALS: dict[str, tuple[float, float]] = {
    "decode": (400, 600),
    "deep": (380, 560),
    "prefill": (22000, 40000),
    "batch 8": (2200, 3500),
    "batch 32": (7000, 11000),
    "batch 128": (14000, 22000),
    "mistral": (180, 200),
    "two tiers": (1.1, 1.5),
}
Result = dict[str, Any]


def model_weights(spec: ModelSpec, scheme_for: Callable[[str, tuple[int, ...]], str]) -> ModelWeights:
    """Random packed weights; `scheme_for` gets a tensor's GGUF name and shape."""
    names = llama_tensor_names(spec)

    def matrix(wanted: Sequence[TensorSource]) -> PackedMatrix:
        runs: list[tuple[str, int]] = []  # neighbours of one scheme are one part, as `pack` has it
        for source in wanted:
            scheme, rows = scheme_for(source.gguf, source.shape), source.shape[0]
            if runs and runs[-1][0] == scheme:
                scheme, rows = scheme, runs.pop()[1] + rows
            runs.append((scheme, rows))
        parts: list[PackedPart] = []
        first = 0
        for scheme, rows in runs:
            part = random_part(scheme, rows, wanted[0].shape[1])
            if part.layout is None:
                part.data.mul_(0.02)
            parts.append(PackedPart(scheme, first, rows, part.columns, part.data, part.factors))
            first += rows
        return PackedMatrix(first, wanted[0].shape[1], tuple(parts))

    def vector(count: int, mean: float) -> torch.Tensor:
        return torch.randn(count, device="cuda") * 0.1 + mean

    def layer(n: int) -> LayerWeights:
        products = []
        for parts in PRODUCTS.values():
            packed = matrix([names[f"layers.{n}.{part}"] for part in parts])
            biased = f"layers.{n}.{parts[0]}.bias" in names
            products.append(Product(packed, vector(packed.rows, 0.0) if biased else None))
        return LayerWeights(vector(spec.hidden_size, 1.0), vector(spec.hidden_size, 1.0), *products)

    return ModelWeights(
        matrix([names["embed"]]),
        matrix([names["lm_head"]]),
        vector(spec.hidden_size, 1.0),
        tuple(layer(n) for n in range(spec.num_layers)),
    )


def q4_k_m(name: str, shape: tuple[int, ...]) -> str:
    return str(RECIPES.q4_k_m.scheme_for(name, shape, QWEN.num_layers))


def bfloat16(name: str, shape: tuple[int, ...]) -> str:
    return "bf16"


def storage(decoder: CudaDecoder, tokens: int, scheme: str) -> DeviceStorage:
    """Blocks with random keys and values."""
    made = decoder.allocate_kv(-(-tokens // BLOCK), BLOCK, scheme)
    assert isinstance(made, DeviceStorage)
    for kv in made.layers:
        if isinstance(kv, CodedKV):
            for codes in (kv.keys, kv.values, kv.means):
                codes.random_(0, 256)
            for scales in (kv.key_scales, kv.value_scales, kv.mean_scales):
                scales.uniform_(0.01, 0.2)
        else:
            kv.keys.normal_()
            kv.values.normal_()
    return made


def segment(where: DeviceStorage, sequences: int, length: int, start: int, room: int) -> Segment:
    """Each sequence's own blocks, enough for `room` tokens, of which it has `length`."""
    width = -(-room // BLOCK)
    table = np.arange(sequences * width, dtype=np.int32).reshape(sequences, width)
    lengths, starts = (np.full(sequences, value, np.int32) for value in (length, start))
    return Segment(where, table, lengths, starts)


def decode_batch(segments: list[Segment], depth: int, adapter: Adapter | None = None, tiers: bool = False) -> Batch:
    """The token at position `depth` of each sequence, for which the newest segment has a place."""
    newest, count = segments[-1], len(segments[-1].lengths)
    at = depth - newest.starts
    slots = newest.block_table[np.arange(count), at // BLOCK].astype(np.int64) * BLOCK + at % BLOCK
    boundary = newest.starts.astype(np.int32) if tiers else None
    return Batch(
        tokens=np.arange(1, count + 1, dtype=np.int64),
        positions=np.full(count, depth, np.int64),
        cu_q=np.arange(count + 1, dtype=np.int32),
        rows=np.arange(count, dtype=np.int64),
        kv=KVView(segments, slots, boundary=boundary),
        rope_variants=np.zeros(count, np.uint8),
        adapters=(adapter,) * count if adapter is not None else (),
    )


def median_seconds(call: Callable[[], Any], repeats: int = REPEATS) -> float:
    """Of calls that end in host memory; the first one, which compiles and captures, is left out."""
    call()
    times = []
    for _ in range(repeats):
        torch.cuda.synchronize()
        begun = time.perf_counter()
        call()
        times.append(time.perf_counter() - begun)
    return statistics.median(times)


def greedy(count: int) -> list[Request]:
    params = GenerateParams(temperature=0.0)
    return [Request(f"bench-{n}", (1,), params, frozenset(), STEPS) for n in range(count)]


class Bench:
    """The rows of the table; models are made when they are first needed, and only one is kept at a time.

    Attributes:
        copy, product: ceilings, bytes and operations a second.
    """

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.copy, self.product = ceilings()
        self._name = ""
        self._model: tuple[CudaDecoder, ModelWeights] | None = None

    def decode(self) -> Result:
        return self._decode("qwen", 1, 0)

    def deep(self) -> Result:
        return self._decode("qwen", 1, 8192)

    def prefill(self, count: int = 2048) -> Result:
        decoder, _ = self._load("qwen")
        where = storage(decoder, count, "f16")
        view = KVView([segment(where, 1, count, 0, count)], np.arange(count, dtype=np.int64))
        tokens = np.random.default_rng(0).integers(0, QWEN.vocab_size, count)
        starts, last = np.array([0, count], np.int32), np.array([count - 1], np.int64)
        batch = Batch(tokens, np.arange(count), starts, last, view, np.zeros(1, np.uint8))
        seconds = median_seconds(lambda: decoder.step(batch, greedy(1)), 5)
        operations = 2 * count * (QWEN.parameters - 2 * QWEN.vocab_size * QWEN.hidden_size)
        return {"tok/s": count / seconds, "of product": operations / seconds / self.product}

    def batches(self, count: int) -> Result:
        return self._decode("qwen", count, 128)

    def mistral(self) -> Result:
        return self._decode("mistral", 1, 0)

    def one_by_one(self) -> Result:
        """`step`, of which the host reads every token: what a backend gets that waits for each."""
        decoder, _ = self._load("qwen")
        where, requests = storage(decoder, STEPS, "f16"), greedy(1)

        def run() -> None:
            for depth in range(STEPS):
                decoder.step(decode_batch([segment(where, 1, depth + 1, 0, STEPS)], depth), requests)

        return {"tok/s": STEPS / median_seconds(run)}

    def two_tiers(self, depth: int = 32768, steps: int = 64) -> Result:
        """Decoding at depth 32k: an f16 cache, and sinks, a store in 4 bits and a tail."""
        decoder, _ = self._load("qwen")
        plain = storage(decoder, depth + steps, "f16")
        floats = self._timed(decoder, lambda: [segment(plain, 1, depth + 1, 0, depth + steps)], depth, steps)
        stored = (depth + 1 - SINKS - TAIL) // BLOCK * BLOCK
        start = (SINKS + stored) // BLOCK * BLOCK
        room = depth + steps - start
        tail, store = storage(decoder, room + BLOCK, "f16"), storage(decoder, stored, "q4")
        sinks = -(-room // BLOCK)  # the block behind the tail's

        def segments() -> list[Segment]:
            first = segment(tail, 1, SINKS, 0, BLOCK)
            first.block_table[:] = sinks
            return [
                first,
                segment(store, 1, stored, SINKS, stored),
                segment(tail, 1, depth + 1 - start, start, room),
            ]

        coded = self._timed(decoder, segments, depth, steps, tiers=True)
        return {"ratio": floats / coded, "f16 tok/s": steps / floats, "q4 tok/s": steps / coded}

    def adapters(self) -> Result:
        """What a final-site adapter of rank 2 costs a token, and how long a new one takes to be in a step."""
        decoder, _ = self._load("qwen")
        where, rng = storage(decoder, STEPS, "f16"), np.random.default_rng(1)

        def adapter(size: float) -> Adapter:
            a, b = (
                rng.normal(0, size, shape).astype(np.float32)
                for shape in ((2, QWEN.hidden_size), (QWEN.hidden_size, 2))
            )
            return Adapter(f"bench {rng.random()}", {"final": LowRank(a, b)})

        def batch(one: Adapter | None) -> Batch:
            return decode_batch([segment(where, 1, 1, 0, STEPS)], 0, one)

        used = adapter(0.01)
        plain, adapted = (
            median_seconds(lambda one=one: decoder.decode(batch(one), STEPS), 5)  # type: ignore[misc]
            for one in (None, used)
        )
        requests = greedy(1)
        base = decoder.step(batch(None), requests)
        same = median_seconds(lambda: decoder.step(batch(used), requests), 20)
        captured, seen, times = decoder.graphs.captured, 0, []
        for _ in range(20):
            one = adapter(1.0)
            begun = time.perf_counter()
            token = decoder.step(batch(one), requests)
            times.append(time.perf_counter() - begun)
            seen += int(token[0] != base[0])
        return {
            "cost": adapted / plain - 1,
            "update ms": (statistics.median(times) - same) * 1e3,
            "seen by the next token": seen / len(times),
            "captured again": decoder.graphs.captured - captured,
        }

    def _decode(self, name: str, count: int, depth: int) -> Result:
        decoder, weights = self._load(name)
        scheme = "f16" if name == "qwen" else "bf16"
        room = depth + STEPS
        where = storage(decoder, count * -(-room // BLOCK) * BLOCK, scheme)
        seconds = self._timed(decoder, lambda: [segment(where, count, depth + 1, 0, room)], depth, STEPS)
        spec = decoder.spec
        cached = 4 * spec.num_layers * spec.num_kv_heads * spec.head_dim * count * (depth + STEPS / 2)
        read = weights.nbytes - weights.embed.nbytes + cached
        return {
            "tok/s": count * STEPS / seconds,
            "ms a step": 1e3 * seconds / STEPS,
            "of copy": read * STEPS / seconds / self.copy,
        }

    @staticmethod
    def _timed(
        decoder: CudaDecoder, segments: Callable[[], list[Segment]], depth: int, steps: int, tiers: bool = False
    ) -> float:
        return median_seconds(lambda: decoder.decode(decode_batch(segments(), depth, tiers=tiers), steps))

    def _load(self, name: str) -> tuple[CudaDecoder, ModelWeights]:
        if self._model is None or self._name != name:
            if self._model is not None:
                self._model[0].close()
            self._model = None
            torch.cuda.empty_cache()
            spec, scheme_for = (QWEN, q4_k_m) if name == "qwen" else (MISTRAL, bfloat16)
            weights, options = model_weights(spec, scheme_for), DecoderOptions(max_context=spec.max_context)
            device = torch.device("cuda")
            scratch = Scratch.on(device, dense=1 << 28)  # the largest matrix of a layer in one piece
            self._name, self._model = name, (CudaDecoder(spec, weights, options, device, scratch=scratch), weights)
        return self._model


def main() -> None:
    runs: dict[str, Callable[[Bench], Result]] = {
        "decode": Bench.decode,
        "deep": Bench.deep,
        "prefill": Bench.prefill,
        "adapters": Bench.adapters,
        "one by one": Bench.one_by_one,
        "batch 8": lambda bench: bench.batches(8),
        "batch 32": lambda bench: bench.batches(32),
        "batch 128": lambda bench: bench.batches(128),
        "two tiers": Bench.two_tiers,
        "mistral": Bench.mistral,
    }
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="+", default=tuple(runs), choices=tuple(runs))
    parser.add_argument("--skip", nargs="+", default=(), choices=tuple(runs))
    parser.add_argument("--budget", type=float, default=540.0, help="seconds after which no further row is begun")
    parser.add_argument("--json", help="file for what was measured")
    options = parser.parse_args()
    begun, bench = time.monotonic(), Bench()
    results: dict[str, Result] = {}
    for name in runs:
        if name not in options.rows or name in options.skip:
            continue
        if (at := time.monotonic() - begun) > options.budget:
            results[name] = {"error": f"not begun after {at:.0f} s"}
            continue
        try:
            results[name] = runs[name](bench)
        except Exception as error:  # a row that cannot run is a result, too, and others can
            traceback.print_exc()
            results[name] = {"error": f"{type(error).__name__}: {error}"[:300]}
        results[name]["seconds"] = time.monotonic() - begun - at
        print(line(name, results[name]), flush=True)
    ceiling = {"copy GB/s": bench.copy / 1e9, "product TFLOP/s": bench.product / 1e12}
    report = {
        "device": torch.cuda.get_device_name(),
        **ceiling,
        "seconds": time.monotonic() - begun,
        "rows": results,
        "goals": GOALS,
    }
    print(f"\n{report['device']}: " + ", ".join(f"{value:.0f} {unit}" for unit, value in ceiling.items()))
    for name, result in results.items():
        print(line(name, result))
    print(json.dumps(report))
    if options.json:
        Path(options.json).write_text(json.dumps(report, indent=1), encoding="utf-8")


def line(name: str, result: Result) -> str:
    shown = ", ".join(
        f"{key} {value:,.4g}" if isinstance(value, float | int) else f"{key} {value}" for key, value in result.items()
    )
    goal = f"   (must {GOALS[name][0]:,g}, aim {GOALS[name][1]:,g})" if name in GOALS else ""
    return f"{name:12} {shown}{goal}"


if __name__ == "__main__":
    main()
