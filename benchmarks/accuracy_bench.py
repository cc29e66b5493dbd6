"""What do native kernels lose? One model in every scheme, each against PyTorch in float32 on the same weights.

    python benchmarks/accuracy_bench.py --text moby-dick.txt --windows 8
    python benchmarks/accuracy_bench.py --text moby-dick.txt --schemes q4_1 --isas generic avx2 avx512 --bits 16 8

For windows of 512 tokens of a real text: perplexity of both sides, how often both find the same token likeliest, and
the mean divergence KL(PyTorch || kernels) in nats. A scheme falls back for rows that its blocks do not divide, as in
`ruvllm quantize`. Prints a table and one JSON line.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ruvllm_core.decode.decoder import EagerDecoder
from ruvllm_core.decode.reference import TorchKernels
from ruvllm_core.model.hub import resolve
from ruvllm_core.model.loader import ModelFile, open_model, quantize_weights
from ruvllm_core.model.quant import QuantTensor
from ruvllm_core.protocols import Decoder, DecoderOptions
from ruvllm_core.registry import Registry
from ruvllm_core.settings import Settings
from ruvllm_core.testing.tiny import whole
from ruvllm_kernels_cpu.provider import CpuKernels

WINDOW = 512
SCHEMES = ("q4_0", "q4_1", "q5_0", "q5_1", "q8_0", "q2_k", "q3_k", "q4_k", "q5_k", "q6_k", "f16", "bf16", "f32")

Logs = npt.NDArray[np.float32]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--windows", type=int, default=4)
    parser.add_argument("--skip", type=int, default=4, help="windows at the start of the text that are left out")
    parser.add_argument("--schemes", nargs="+", default=("as it is", *SCHEMES))
    parser.add_argument("--isas", nargs="+", default=("auto",))
    parser.add_argument("--bits", nargs="+", type=int, default=(16,))
    parser.add_argument("--threads", type=int, default=0)
    options = parser.parse_args(arguments)

    settings = Settings(model=options.model)
    registry = Registry.discover(settings)
    rows = []
    for scheme in options.schemes:
        model = open_model(resolve(settings.model, settings), registry)
        ids = model.tokenizer().encode(options.text.read_text())[options.skip * WINDOW :]
        windows = [ids[at : at + WINDOW] for at in range(0, options.windows * WINDOW, WINDOW)]
        if len(windows[-1]) < WINDOW:
            parser.error(f"{options.text} has too little text for {options.windows} windows")
        if scheme != "as it is":
            for name, tensor in model.weights.items():
                if len(tensor.shape) == 2:
                    model.weights[name] = QuantTensor.from_float(tensor.dequantize())
            if scheme != "f32":
                quantize_weights(model, registry.load("quantizers", scheme))
        rows += compare(model, scheme, windows, options.isas, options.bits, options.threads)
        model.close()
    print(json.dumps({"benchmark": "accuracy", "model": options.model, "windows": options.windows, "rows": rows}))
    return 0


def compare(
    model: ModelFile, scheme: str, windows: list[list[int]], isas: Sequence[str], bits: Sequence[int], threads: int
) -> list[dict[str, Any]]:
    """One row for each instruction set and number of bits."""
    options = DecoderOptions(dtype="float32", device="cpu", threads=threads, max_context=WINDOW)
    spec = replace(model.spec, max_context=WINDOW)
    reference = EagerDecoder(spec, model.weights, TorchKernels(options), options)
    expected = [log_probabilities(reference, window) for window in windows]
    reference.close()
    rows = []
    for isa in isas:
        for width in bits:
            provider = CpuKernels(options, isa=isa, activation_bits=width)
            decoder = provider.decoder(spec, model.weights, replace(options, dtype="auto"))
            assert decoder is not None
            found = [log_probabilities(decoder, window) for window in windows]
            decoder.close()
            row = {"scheme": scheme, "isa": provider.isa, "bits": width, **figures(expected, found, windows)}
            print(
                f"{scheme:9} {provider.isa:8} {width:2} bits  perplexity {row['perplexity']:8.3f} "
                f"({row['change']:+.4%})  same first choice {row['top1']:.2%}  divergence {row['nats']:.1e} nats",
                flush=True,
            )
            rows.append(row)
    return rows


def log_probabilities(decoder: Decoder, window: list[int]) -> Logs:
    logits = whole(decoder, window, WINDOW).astype(np.float64)
    logits -= logits.max(-1, keepdims=True)
    return (logits - np.log(np.exp(logits).sum(-1, keepdims=True))).astype(np.float32)


def figures(expected: list[Logs], found: list[Logs], windows: list[list[int]]) -> dict[str, float]:
    def loss(logs: list[Logs]) -> float:
        at = np.arange(WINDOW - 1)
        return -float(np.mean([one[at, window[1:]].mean() for one, window in zip(logs, windows, strict=True)]))

    pairs = list(zip(expected, found, strict=True))
    return {
        "perplexity": float(np.exp(loss(found))),
        "change": float(np.expm1(loss(found) - loss(expected))),
        "top1": float(np.mean([a.argmax(-1) == b.argmax(-1) for a, b in pairs])),
        "nats": float(np.mean([(np.exp(a.astype(np.float64)) * (a - b)).sum(-1).mean() for a, b in pairs])),
    }


if __name__ == "__main__":
    sys.exit(main())
