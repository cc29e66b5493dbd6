"""The eager decoder beside transformers, in float32 from the same GGUF file, in turn in one process.

    python benchmarks/transformers_bench.py --threads 2

Prints a table and one JSON line: tokens per second (medians over the rounds), and load seconds after imports.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time

import torch
from transformers import AutoModelForCausalLM

from ruvllm_core import Engine, GenerateParams, ModelConfig, Settings


def theirs(model: torch.nn.Module, ids: list[int], tokens: int) -> tuple[float, float]:
    """Seconds for the prompt, and for `tokens` further ones, of transformers with its own cache."""
    with torch.inference_mode():
        start = time.perf_counter()
        out = model(torch.tensor([ids]), use_cache=True, logits_to_keep=1)
        prefilled = time.perf_counter()
        for _ in range(tokens):
            chosen = out.logits[:, -1:].argmax(-1)
            out = model(chosen, past_key_values=out.past_key_values, use_cache=True)
        return prefilled - start, time.perf_counter() - prefilled


def ours(engine: Engine, ids: list[int], tokens: int) -> tuple[float, float]:
    """The same of ours, through the engine."""
    out = engine.generate(ids, GenerateParams(max_tokens=tokens + 1, temperature=0.0, ignore_eos=True))
    return len(ids) / out.timings.prefill_tok_s, tokens / out.timings.decode_tok_s


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--prefill", type=int, default=512)
    parser.add_argument("--decode", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    config = ModelConfig(kernels=["torch"], dtype="float32", threads=args.threads, max_context=2048)
    with Engine.load(args.model, settings=Settings(), config=config) as engine:
        path = engine.info.path
        start = time.perf_counter()
        peer = AutoModelForCausalLM.from_pretrained(str(path.parent), gguf_file=path.name, dtype=torch.float32).eval()
        peer_load = time.perf_counter() - start
        ids = [int(i) for i in torch.randint(100, 40_000, (args.prefill,), generator=torch.Generator().manual_seed(0))]
        rounds: dict[str, list[tuple[float, float]]] = {"ruvllm": [], "transformers": []}
        for number in range(args.rounds + 1):
            found = {"ruvllm": ours(engine, ids, args.decode), "transformers": theirs(peer, ids, args.decode)}
            if number:  # the first round warms up
                for name, seconds in found.items():
                    rounds[name].append(seconds)
        report: dict[str, object] = {"model": args.model, "threads": args.threads}
        for name, seconds in rounds.items():
            prefill = args.prefill / statistics.median(s[0] for s in seconds)
            decode = args.decode / statistics.median(s[1] for s in seconds)
            load = engine.info.load_s if name == "ruvllm" else peer_load
            report[name] = {"prefill_tok_s": prefill, "decode_tok_s": decode, "load_s": load}
            print(f"{name:13} prefill {prefill:8.1f} tok/s   decode {decode:6.1f} tok/s   load {load:6.2f} s")
    print(json.dumps(report))


if __name__ == "__main__":
    main()
