"""Products of one token with the matrices of Qwen2.5-7B on one NVIDIA GPU, as they follow each other in a step.

    PYTHONPATH=.:plugins/kernels_cuda/src:plugins/quantizers/src python benchmarks/product_bench.py
    … benchmarks/product_bench.py --parts configs --scheme q6_k --products down

All are captured in one process and replayed in turns, so that clocks and temperature are the same.

chain: the four products of 28 layers in one CUDA graph, each layer with weights of its own, cut up by the rule of
    `gemv.config_for`; then each of the four alone, 28 launches with the weights of the 28 layers, which no cache holds.
configs: the same chain with one product cut up in every other way. Ends with a ranking for each product, and with the
    chain of all best ones together.
decode: whole steps at batch 1 with weights in q4_k_m, as `gpu_bench.py` has them, and what they cost besides products:
    without the chain of the same weights, and without the product of the head.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from typing import Any

import torch
from gpu.matmul import HIDDEN, INNER, QKV, ceilings, measure, random_part
from gpu_bench import QWEN, STEPS, decode_batch, model_weights, q4_k_m, segment, storage

from ruvllm_core.protocols import DecoderOptions
from ruvllm_kernels_cuda.decoder import CudaDecoder
from ruvllm_kernels_cuda.gemv import Config, config_for
from ruvllm_kernels_cuda.matmul import Thresholds, matmul
from ruvllm_kernels_cuda.packing import LAYOUTS, PackedMatrix
from ruvllm_kernels_cuda.scratch import Scratch
from ruvllm_kernels_cuda.weights import ModelWeights

PRODUCTS = ("qkv", "o", "gate_up", "down")
LAYERS, ROUNDS = 28, 15
SPLITS = (1, 2, 3, 4, 6, 8, 12, 16)
CONFIGS = [Config(repeat, warps, split) for repeat in (1, 2, 4) for warps in (2, 4, 8) for split in SPLITS]


class Chain:
    """The products of some layers, each after the other as in a step with one token.

    Args:
        layers: of each layer, its matrices by the names in `PRODUCTS`.
    """

    def __init__(self, layers: Sequence[dict[str, PackedMatrix]]) -> None:
        self.layers, self.scratch = layers, Scratch.on("cuda", dense=1)
        hidden, inner = layers[0]["down"].rows, layers[0]["down"].columns
        self._begun = torch.randn(1, hidden, device="cuda")
        self._stream = stream = self._begun.clone()
        gates = torch.randn(1, inner, device="cuda").bfloat16()
        normed = {"norm": torch.ones(hidden, device="cuda"), "eps": 1e-6}
        added = {"out": stream, "residual": stream}
        self._given: dict[str, tuple[torch.Tensor, dict[str, Any]]] = {
            "qkv": (stream, {"out": torch.empty(1, layers[0]["qkv"].rows, device="cuda"), **normed}),
            "o": (torch.randn(1, hidden, device="cuda").bfloat16(), added),
            "gate_up": (stream, {"out": gates, "gate": "silu", **normed}),
            "down": (gates, added),
        }

    @classmethod
    def random(cls, layers: int, scheme: str, hidden: int = HIDDEN, inner: int = INNER, qkv: int = QKV) -> Chain:
        """Weights of one scheme."""
        shapes = {"qkv": (qkv, hidden), "o": (hidden, hidden), "gate_up": (2 * inner, hidden), "down": (hidden, inner)}
        return cls(
            [
                {name: PackedMatrix(*shape, (random_part(scheme, *shape),)) for name, shape in shapes.items()}
                for _ in range(layers)
            ]
        )

    @classmethod
    def of(cls, weights: ModelWeights) -> Chain:
        """The weights of a model."""
        return cls([{name: getattr(layer, name).matrix for name in PRODUCTS} for layer in weights.layers])

    def nbytes(self, names: Iterable[str] = PRODUCTS) -> int:
        return sum(layer[name].nbytes for layer in self.layers for name in names)

    def rule(self, name: str) -> Config:
        """What `config_for` has for a product."""
        return config_for(self.layers[0][name].parts[0], 1, self.scratch.processors)

    def launch(self, layer: int, name: str, config: Config | None = None) -> None:
        """One product; None is the rule's configuration."""
        x, given = self._given[name]
        limits = None if config is None else Thresholds(configure=lambda *_: config)
        matmul(x, self.layers[layer][name], self.scratch, thresholds=limits, **given)

    def run(self, configs: dict[str, Config]) -> None:
        """All of them; what `configs` lacks is as the rule has it."""
        self._stream.copy_(self._begun)
        for layer in range(len(self.layers)):
            for name in PRODUCTS:
                self.launch(layer, name, configs.get(name))

    def captured(self, configs: dict[str, Config]) -> torch.cuda.CUDAGraph:
        """A graph of `run`, of which everything has been loaded."""
        graph = torch.cuda.CUDAGraph()
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


def compile_chain(job: tuple[str, dict[str, Config]]) -> str:
    """In a process of its own: small products that need the same machine code. Returns what went wrong, if so."""
    scheme, configs = job
    try:
        small = Chain.random(1, scheme, hidden=9 * 256, inner=9 * 256, qkv=256)
        small.run({name: replace(config, split=min(config.split, 2)) for name, config in configs.items()})
        torch.cuda.synchronize()
    except Exception as error:  # a configuration that needs more than there is
        return f"{configs}: {error!r}"[:300]
    return ""


def compile_decode() -> None:
    """In a process of its own: steps of a model of four layers."""
    torch.manual_seed(0)
    spec = replace(QWEN, num_layers=4)
    decode(model_weights(spec, q4_k_m), spec, 2)()


def decode(weights: ModelWeights, spec: Any = QWEN, steps: int = STEPS) -> Callable[[], Any]:
    """Decoding of `steps` tokens."""
    decoder = CudaDecoder(spec, weights, DecoderOptions(max_context=spec.max_context), torch.device("cuda"))
    where = storage(decoder, STEPS, "f16")
    return lambda: decoder.decode(decode_batch([segment(where, 1, 1, 0, STEPS)], 0), steps)


def shown(config: Config) -> str:
    return f"repeat {config.repeat} warps {config.warps} split {config.split}"


def chains(chain: Chain, copy: float) -> None:
    """Prints a line for the chain and one for each product alone."""
    seconds = in_turns({"chain": chain.captured({}).replay}, ROUNDS)["chain"]
    share = chain.nbytes() / seconds / copy
    print(f"chain   {'all':8} {seconds / LAYERS * 1e6:7.1f} µs a layer, {share:5.1%} of copy", flush=True)
    for name in PRODUCTS:
        seconds = measure(lambda layer, name=name: chain.launch(layer, name), LAYERS, ROUNDS)  # type: ignore[misc]
        size = chain.nbytes([name]) / LAYERS
        read = f"{size / 1e6:6.1f} MB, {size / seconds / copy:5.1%} of copy"
        print(f"chain   {name:8} {seconds * 1e6:7.1f} µs alone, {read}; {shown(chain.rule(name))}", flush=True)


def candidates(chain: Chain, name: str) -> list[Config]:
    """Ways to cut up a product, the rule's first, without those that are sure to lose."""
    part, processors = chain.layers[0][name].parts[0], chain.scratch.processors
    found = [chain.rule(name)]
    for config in CONFIGS:
        programs = -(-part.rows // (32 * config.repeat)) * config.split
        few, many = programs < 0.8 * processors, programs > 16 * processors and config.split > 1
        idle = (config.split - 1) * config.warps >= part.records
        if not (few or many or idle or (name == "gate_up" and config.repeat == 1)) and config not in found:
            found.append(config)
    return found


def configs(chain: Chain, names: Sequence[str], pool: ProcessPoolExecutor, scheme: str) -> None:
    """Prints the ranking of the configurations of products, the others as the rule has them."""
    rule = {name: chain.rule(name) for name in PRODUCTS}
    tried = {(name, config): {**rule, name: config} for name in names for config in candidates(chain, name)}
    jobs = {}
    for (name, config), wanted in tried.items():
        jobs[name, config.repeat, config.warps, config.split > 1] = scheme, wanted
    for problem in filter(None, pool.map(compile_chain, jobs.values())):
        print("cannot run:", problem)
    times: dict[tuple[str, Config], float] = {}
    for key, wanted in tried.items():  # one after the other: so many graphs at a time would need their memory
        times |= in_turns({key: chain.captured(wanted).replay}, 5)
    best = dict(rule)
    for name in names:
        ranked = sorted((config for one, config in times if one == name), key=lambda config: times[name, config])
        best[name] = ranked[0]
        for place, config in enumerate(ranked):
            is_rule = config == rule[name]
            if place < 6 or is_rule:
                gain = (times[name, config] - times[name, rule[name]]) / LAYERS * 1e6
                print(
                    f"config  {name:8} {place + 1:3}. {shown(config):28} {gain:+6.2f} µs a layer{'  (rule)' * is_rule}"
                )
    both = {"rule": chain.captured(rule), "best": chain.captured(best)}
    together = in_turns({name: graph.replay for name, graph in both.items()}, ROUNDS)
    print(
        "config  " + ", ".join(f"{name} {seconds / LAYERS * 1e6:.1f} µs a layer" for name, seconds in together.items())
    )


def decodes(copy: float) -> None:
    """Prints a line for whole steps and one for each of what they are made of."""
    weights = model_weights(QWEN, q4_k_m)
    chain, head = Chain.of(weights), weights.head
    times = in_turns({"steps": decode(weights), "chain": chain.captured({}).replay}, 3)
    hidden, logits = torch.randn(1, head.columns, device="cuda"), torch.empty(1, head.rows, device="cuda")
    # The same matrix each time: it is several times larger than the second-level cache.
    last = measure(lambda _: matmul(hidden, head, chain.scratch, out=logits), 4, ROUNDS)
    step, products = times["steps"] / STEPS, times["chain"]
    print(f"decode  {1e3 * step:6.3f} ms a step, {1 / step:6.1f} tok/s")
    which = f"{head.rows} x {head.columns}, {head.parts[0].scheme}"
    print(f"decode  {1e3 * products:6.3f} ms the chain of its products; without it {1e3 * (step - products):.3f} ms:")
    print(f"decode  {1e3 * last:6.3f} ms the head's product, {which}, {head.nbytes / last / copy:.1%} of copy")
    print(f"decode  {1e3 * (step - products - last):6.3f} ms what is not products", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = "chain", "configs", "decode"
    parser.add_argument("--parts", nargs="+", default=parts, choices=parts)
    parser.add_argument("--scheme", default="q4_k", choices=tuple(LAYOUTS), help="of the weights of chain and configs")
    parser.add_argument("--products", nargs="+", default=PRODUCTS, choices=PRODUCTS, help="that configs ranks")
    options = parser.parse_args()
    begun = time.monotonic()
    workers = min(16, len(os.sched_getaffinity(0)))
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        made = [pool.submit(compile_decode)] if "decode" in options.parts else []
        torch.manual_seed(0)
        chain = Chain.random(LAYERS, options.scheme) if {"chain", "configs"} & {*options.parts} else None
        if chain is not None:
            jobs = [(options.scheme, {name: chain.rule(name) for name in PRODUCTS})]
            for problem in filter(None, pool.map(compile_chain, jobs)):
                print("cannot run:", problem)
        for one in made:  # before anything is measured: they use the device, too
            one.result()
        print(f"compiled after {time.monotonic() - begun:.0f} s", flush=True)
        copy, _ = ceilings()
        if chain is not None and "chain" in options.parts:
            chains(chain, copy)
        if chain is not None and "configs" in options.parts:
            configs(chain, options.products, pool, options.scheme)
    del chain
    torch.cuda.empty_cache()
    if "decode" in options.parts:
        decodes(copy)
    print(f"{torch.cuda.get_device_name()}: copy {copy / 1e9:.0f} GB/s; {time.monotonic() - begun:.0f} s")


if __name__ == "__main__":
    main()
