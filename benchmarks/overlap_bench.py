"""Launches that overlap, on one NVIDIA GPU from compute capability 9.0 on: their worth, and how to cut products.

    PYTHONPATH=.:plugins/kernels_cuda/src:plugins/quantizers/src python benchmarks/overlap_bench.py
    … benchmarks/overlap_bench.py --parts chain --prefetch 0 4 8 16 32 64 128

A variant is a mode of `ruvllm_kernels_cuda.launch` and how many KiB of its weights a program of a product asks for
before it waits. All are captured in one process and replayed in turns, so that clocks and temperature are the same.

chain: the four products of 28 layers of Qwen2.5-7B in one CUDA graph, each layer with weights of its own.
configs: the same chain in the best of those variants, with one product cut up in every other way. Ends with a ranking
    for each product, and with the chain of all best ones together.
decode: whole steps at batch 1, as `gpu_bench.py` has them.

Each variant's results must be the bits of the first one's, or it says so.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import torch
from gpu.matmul import HIDDEN, INNER, QKV, ceilings, random_part
from gpu_bench import QWEN, STEPS, decode_batch, model_weights, q4_k_m, segment, storage

from ruvllm_core.protocols import DecoderOptions
from ruvllm_kernels_cuda.decoder import CudaDecoder
from ruvllm_kernels_cuda.gemv import Config, config_for, gemv
from ruvllm_kernels_cuda.launch import EARLY, LATE, OFF, overlapping
from ruvllm_kernels_cuda.layers import Plan
from ruvllm_kernels_cuda.matmul import Thresholds
from ruvllm_kernels_cuda.packing import PackedPart
from ruvllm_kernels_cuda.scratch import Scratch
from ruvllm_kernels_cuda.weights import ModelWeights

MODES = {"off": OFF, "late": LATE, "early": EARLY}
PRODUCTS = ("qkv", "o", "gate_up", "down")
LAYERS, ROUNDS = 28, 15
CONFIGS = [Config(repeat, warps, split) for repeat in (1, 2, 4) for warps in (2, 4, 8) for split in (1, 2, 3, 4, 6, 8)]


@dataclass(frozen=True)
class Variant:
    """A mode's name, KiB asked for ahead, and whether gates are applied by the product that makes them."""

    mode: str
    prefetch: int = 0
    gates: bool = True

    def __str__(self) -> str:
        ahead = f" {self.prefetch:3} KiB" if self.mode != "off" else ""
        return f"{self.mode:5}{ahead}{'' if self.gates else ' gates apart'}"


def configure(prefetch: int) -> Callable[[PackedPart, int, int], Config]:
    return lambda part, count, processors: replace(config_for(part, count, processors), prefetch=prefetch)


class Chain:
    """The products of some layers, each after the other as in a step with one token."""

    def __init__(self, layers: int, scheme: str, hidden: int = HIDDEN, inner: int = INNER, qkv: int = QKV) -> None:
        shapes = {"qkv": (qkv, hidden), "o": (hidden, hidden), "gate_up": (2 * inner, hidden), "down": (hidden, inner)}
        self.parts = [{name: random_part(scheme, *shape) for name, shape in shapes.items()} for _ in range(layers)]
        self.norm = torch.ones(hidden, device="cuda")
        self.begun = torch.randn(1, hidden, device="cuda")
        self.stream, self.qkv = self.begun.clone(), torch.empty(1, qkv, device="cuda")
        self.attended = torch.randn(1, hidden, device="cuda").bfloat16()
        self.inner = torch.empty(1, inner, dtype=torch.bfloat16, device="cuda")
        self.scratch = Scratch.on("cuda", dense=1)

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for layer in self.parts for part in layer.values())

    def rule(self, name: str, prefetch: int) -> Config:
        """What `config_for` has for a product."""
        return configure(prefetch)(self.parts[0][name], 1, self.scratch.processors)

    def run(self, configs: dict[str, Config]) -> None:
        self.stream.copy_(self.begun)
        stream, scratch, normed = self.stream, self.scratch, {"norm": self.norm, "eps": 1e-6}
        for layer in self.parts:
            gemv(stream, layer["qkv"], self.qkv, scratch, configs["qkv"], **normed)  # type: ignore[arg-type]
            gemv(self.attended, layer["o"], stream, scratch, configs["o"], residual=stream)
            gate_up = layer["gate_up"], self.inner, scratch, configs["gate_up"]
            gemv(stream, *gate_up, gate="silu", **normed)  # type: ignore[arg-type]
            gemv(self.inner, layer["down"], stream, scratch, configs["down"], residual=stream)

    def captured(self, mode: str, configs: dict[str, Config]) -> torch.cuda.CUDAGraph:
        """A graph of `run`, of which everything has been loaded."""
        graph = torch.cuda.CUDAGraph()
        with overlapping(MODES[mode]):
            self.run(configs)
            torch.cuda.synchronize()
            with torch.cuda.graph(graph):
                self.run(configs)
        return graph


def in_turns(runs: dict[Any, Callable[[], Any]], rounds: int) -> dict[Any, float]:
    """Median seconds of each, all of them once a round."""
    times: dict[Any, list[float]] = {name: [] for name in runs}
    for _ in range(rounds + 1):  # the first one warms up
        for name, run in runs.items():
            start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            torch.cuda.synchronize()
            start.record()
            run()
            stop.record()
            stop.synchronize()
            times[name].append(start.elapsed_time(stop) / 1e3)
    return {name: statistics.median(found[1:]) for name, found in times.items()}


def compile_chain(job: tuple[str, str, dict[str, Config]]) -> str:
    """In a process of its own: small products that need the same machine code. Returns what went wrong, if so."""
    scheme, mode, configs = job
    try:
        small = Chain(1, scheme, hidden=9 * 256, inner=9 * 256, qkv=256)
        with overlapping(MODES[mode]):
            small.run({name: replace(config, split=min(config.split, 2)) for name, config in configs.items()})
        torch.cuda.synchronize()
    except Exception as error:  # a configuration that needs more than there is
        return f"{mode} {configs}: {error!r}"[:300]
    return ""


def compile_decode(variant: Variant) -> str:
    """In a process of its own: steps of a model of four layers."""
    torch.manual_seed(0)
    spec = replace(QWEN, num_layers=4)
    run_of(decoder_of(variant, model_weights(spec, q4_k_m), spec), 2)()
    return ""


def decoder_of(variant: Variant, weights: ModelWeights, spec: Any = QWEN) -> CudaDecoder:
    limits = Thresholds(configure=configure(variant.prefetch))
    plan = Plan(limits, fuse_gates=variant.gates, overlap=MODES[variant.mode])
    return CudaDecoder(spec, weights, DecoderOptions(max_context=spec.max_context), torch.device("cuda"), plan=plan)


def run_of(decoder: CudaDecoder, steps: int) -> Callable[[], Any]:
    where = storage(decoder, STEPS, "f16")
    return lambda: decoder.decode(decode_batch([segment(where, 1, 1, 0, STEPS)], 0), steps)


def chains(chain: Chain, variants: Iterable[Variant], copy: float) -> Variant:
    """Prints a line for each variant; returns the fastest one."""
    graphs, expected = {}, None
    for variant in variants:
        configs = {name: chain.rule(name, variant.prefetch) for name in PRODUCTS}
        graphs[variant] = chain.captured(variant.mode, configs)
        graphs[variant].replay()
        torch.cuda.synchronize()
        expected = chain.stream.clone() if expected is None else expected
        if not torch.equal(expected.view(torch.int32), chain.stream.view(torch.int32)):
            print(f"chain   {variant}  DIFFERS from the first variant's results")
    times = in_turns({variant: graph.replay for variant, graph in graphs.items()}, ROUNDS)
    for variant, seconds in times.items():
        layer, share = seconds / LAYERS * 1e6, chain.nbytes / seconds / copy
        print(f"chain   {variant!s:24} {layer:7.1f} µs a layer, {share:5.1%} of copy", flush=True)
    return min(times, key=lambda variant: times[variant])


def candidates(chain: Chain, name: str) -> list[Config]:
    """Ways to cut up a product, without those that are sure to lose."""
    part, processors = chain.parts[0][name], chain.scratch.processors
    found = [chain.rule(name, 0)]
    for config in CONFIGS:
        programs = -(-part.rows // (32 * config.repeat)) * config.split
        few, many = programs < 0.8 * processors, programs > 16 * processors and config.split > 1
        idle = (config.split - 1) * config.warps >= part.records
        if not (few or many or idle or (name == "gate_up" and config.repeat == 1)) and config not in found:
            found.append(config)
    return found


def configs(chain: Chain, variant: Variant, pool: ProcessPoolExecutor, scheme: str) -> None:
    """Prints the ranking of each product's configurations, the others as the rule has them."""
    rule = {name: chain.rule(name, variant.prefetch) for name in PRODUCTS}
    tried = {
        (name, config): {**rule, name: replace(config, prefetch=variant.prefetch)}
        for name in PRODUCTS
        for config in candidates(chain, name)
    }
    jobs = {}
    for (name, config), wanted in tried.items():
        jobs[name, config.repeat, config.warps, config.split > 1] = scheme, variant.mode, wanted
    for problem in filter(None, pool.map(compile_chain, jobs.values())):
        print("cannot run:", problem)
    times: dict[tuple[str, Config], float] = {}
    for key, wanted in tried.items():  # one after the other: so many graphs at a time would need their memory
        times |= in_turns({key: chain.captured(variant.mode, wanted).replay}, 5)
    best = dict(rule)
    for name in PRODUCTS:
        ranked = sorted((config for one, config in times if one == name), key=lambda config: times[name, config])
        base = times[name, candidates(chain, name)[0]]
        best[name] = replace(ranked[0], prefetch=variant.prefetch)
        for place, config in enumerate(ranked):
            is_rule = config == candidates(chain, name)[0]
            if place < 6 or is_rule:
                gain = (times[name, config] - base) / LAYERS * 1e6
                how = f"repeat {config.repeat} warps {config.warps} split {config.split}"
                print(f"config  {name:8} {place + 1:3}. {how:28} {gain:+6.2f} µs a layer{'  (rule)' * is_rule}")
    both = {"rule": chain.captured(variant.mode, rule), "best": chain.captured(variant.mode, best)}
    together = in_turns({name: graph.replay for name, graph in both.items()}, ROUNDS)
    print(
        "config  " + ", ".join(f"{name} {seconds / LAYERS * 1e6:.1f} µs a layer" for name, seconds in together.items())
    )


def decodes(variants: Iterable[Variant]) -> None:
    """Prints a line for each variant."""
    weights = model_weights(QWEN, q4_k_m)
    runs = {variant: run_of(decoder_of(variant, weights), STEPS) for variant in variants}
    tokens = {variant: run() for variant, run in runs.items()}
    first = next(variant for variant in runs if variant.gates)
    for variant, seconds in in_turns(runs, 3).items():
        same = (tokens[variant] == tokens[first]).all() or not variant.gates  # apart, they are rounded otherwise
        rate = f"{1e3 * seconds / STEPS:6.3f} ms a step, {STEPS / seconds:6.1f} tok/s"
        print(f"decode  {variant!s:24} {rate}{'' if same else '  DIFFERENT TOKENS'}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = "chain", "configs", "decode"
    parser.add_argument("--parts", nargs="+", default=parts, choices=parts)
    parser.add_argument("--modes", nargs="+", default=("late", "early"), choices=("late", "early"))
    parser.add_argument("--prefetch", nargs="+", type=int, default=(0, 16, 64), help="KiB, for each mode")
    parser.add_argument("--scheme", default="q4_k", help="of the chain's weights")
    options = parser.parse_args()
    begun = time.monotonic()
    variants = [Variant("off"), *(Variant(mode, kib) for mode in options.modes for kib in options.prefetch)]
    decoded = [*variants, Variant("off", gates=False)]
    workers = min(16, len(os.sched_getaffinity(0)))
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        made = [pool.submit(compile_decode, variant) for variant in decoded if "decode" in options.parts]
        torch.manual_seed(0)
        if {"chain", "configs"} & {*options.parts}:
            chain = Chain(LAYERS, options.scheme)
            jobs = []
            for variant in variants:
                jobs.append((options.scheme, variant.mode, {n: chain.rule(n, variant.prefetch) for n in PRODUCTS}))
            for problem in filter(None, pool.map(compile_chain, jobs)):
                print("cannot run:", problem)
        for one in made:  # before anything is measured: they use the device, too
            one.result()
        print(f"compiled after {time.monotonic() - begun:.0f} s", flush=True)
        copy, _ = ceilings()
        if {"chain", "configs"} & {*options.parts}:
            best = chains(chain, variants, copy)
            if "configs" in options.parts:
                configs(chain, best, pool, options.scheme)
            del chain
            torch.cuda.empty_cache()
    if "decode" in options.parts:
        decodes(decoded)
    print(f"{torch.cuda.get_device_name()}: copy {copy / 1e9:.0f} GB/s; {time.monotonic() - begun:.0f} s")


if __name__ == "__main__":
    main()
