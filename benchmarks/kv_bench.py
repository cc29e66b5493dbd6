"""Cache policies against what they have to reach: accuracy, bytes, and speed, beside the contiguous f16 cache.

    python benchmarks/kv_bench.py --text moby-dick.txt
    python benchmarks/kv_bench.py --text moby-dick.txt --parts accuracy --policy two_tier,tail_length=64

Accuracy: one window of a real text in chunks of a prompt, perplexity of every token and how often the likeliest token
is the same. Speed: single tokens at `--depth`, policies in turn. The model is SmolLM2 unless another is named. Prints a
table and one JSON line.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from statistics import median

import numpy as np
import numpy.typing as npt

from ruvllm_cli.bench_kv import Case, measure
from ruvllm_core.generate.load import Parts, load_parts
from ruvllm_core.generate.request import GenerateParams, Request
from ruvllm_core.generate.sampler import log_softmax
from ruvllm_core.generate.sequence import Sequence as Running
from ruvllm_core.generate.sequence import advance
from ruvllm_core.registry import Registry
from ruvllm_core.settings import Settings, load_settings

BASE, TWO_TIER, PAGED = "contiguous", "two_tier", "paged"
Q4, Q8 = f"{TWO_TIER},store_precision=q4", f"{TWO_TIER},store_precision=q8"
_ROWS = 64


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--text", type=Path, help="a UTF-8 text, for accuracy")
    parser.add_argument("--skip", type=int, default=20_000, help="tokens at the start of the text that are left out")
    parser.add_argument("--tokens", type=int, default=8192, help="of the text")
    parser.add_argument("--depth", type=int, default=8128, help="tokens in the cache when speed is measured")
    parser.add_argument("--decode", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--policy", action="append", help="beside contiguous; as for `ruvllm bench kv`")
    parser.add_argument("--parts", nargs="+", choices=("accuracy", "speed"), default=("accuracy", "speed"))
    options = parser.parse_args(arguments)
    if "accuracy" in options.parts and options.text is None:
        parser.error("accuracy needs --text")

    context = max(options.tokens, options.depth + options.decode)
    settings = load_settings(
        model=options.model, threads=options.threads, max_context=context, cache={"precision": "f16"}
    )
    registry = Registry.discover(settings)
    cases = [Case.parse(text) for text in (BASE, *(options.policy or (Q4, Q8, PAGED)))]
    parts = load_parts(settings, registry)
    found: dict[str, dict[str, float]] = {case.label: {} for case in cases}
    with ExitStack() as stack:
        for part in (parts.model, parts.decoder, parts.backend):
            stack.callback(part.close)
        if "accuracy" in options.parts:
            ids = parts.tokenizer.encode(options.text.read_text(encoding="utf-8"))[options.skip :][: options.tokens]
            if len(ids) < options.tokens:
                parser.error(f"{options.text} has too little text for {options.tokens} tokens")
            accuracy(found, cases, parts, settings, registry, ids)
        if "speed" in options.parts:
            speed(found, cases, parts, settings, registry, options)
    rows = [
        {"what": what, "value": value, "must": must, "aim": aim, "reached": reached(value, must, aim, better)}
        for what, value, must, aim, better in goals(found)
    ]
    for row in rows:
        print(f"{row['what']:62} {row['value']:9.4f}   must {row['must']:<7} aim {row['aim']:<7} {row['reached']}")
    about = {"model": options.model, "kernels": parts.info.kernels, "tokens": options.tokens, "depth": options.depth}
    print(json.dumps({"benchmark": "kv goals", **about, "policies": found, "goals": rows}))
    return 0


def accuracy(
    found: dict[str, dict[str, float]],
    cases: Sequence[Case],
    parts: Parts,
    settings: Settings,
    registry: Registry,
    ids: list[int],
) -> None:
    """Perplexity, its change, the share of equal first choices, and the store's size, of each policy."""
    base: tuple[npt.NDArray[np.float64], npt.NDArray[np.int64]] | None = None
    for case in cases:
        cache = case.open(parts, settings, registry, len(ids))
        request = Request("text", tuple(ids), GenerateParams(), frozenset(), capacity=len(ids))
        sequence = Running(request, cache, parts.decoder.spec)
        logs: list[float] = []
        first: list[int] = []
        while count := min(settings.prefill_chunk, sequence.pending):
            cache.extend(request.id, count)
            hidden, _ = advance(parts.decoder, cache, [(sequence, count)], every=True)
            for row in range(0, count, _ROWS):
                log = log_softmax(parts.decoder.logits(hidden[row : row + _ROWS]))
                targets = ids[len(first) + 1 : len(first) + 1 + len(log)]
                logs += log[np.arange(len(targets)), targets].tolist()
                first += log.argmax(-1).tolist()
        own = found[case.label]
        loss, choices = np.array(logs), np.array(first)
        base = base or (loss, choices)
        own["perplexity"] = float(np.exp(-loss.mean()))
        own["perplexity_change"] = float(np.expm1(base[0].mean() - loss.mean()))
        own["top1"] = float((choices == base[1]).mean())
        extra = cache.stats().extra
        if extra.get("store_tokens"):
            f16 = 4 * parts.decoder.spec.num_layers * parts.decoder.spec.num_kv_heads * parts.decoder.spec.head_dim
            own["store_times_smaller"] = f16 * extra["store_tokens"] / extra["store_bytes"]
        print(f"{case.label}: {own}", file=sys.stderr, flush=True)


def speed(
    found: dict[str, dict[str, float]],
    cases: Sequence[Case],
    parts: Parts,
    settings: Settings,
    registry: Registry,
    options: argparse.Namespace,
) -> None:
    """Decode speed of each policy, and its ratio to the first one's: the median of the ratios of each round."""
    sizes = {"decode": options.decode, "repeats": options.repeats}
    rows = list(measure(parts, settings, registry, cases, [options.depth], **sizes))
    for row in rows:
        ratios = [a / b for a, b in zip(row["decode_tok_s_runs"], rows[0]["decode_tok_s_runs"], strict=True)]
        found[row["policy"]] |= {"decode_tok_s": row["decode_tok_s"], "decode_ratio": median(ratios)}


def goals(found: dict[str, dict[str, float]]) -> list[tuple[str, float, float, float, int]]:
    """What was measured of: name, value, must, aim, and whether more (1) or less (-1) is better."""
    table = [
        (Q4, "perplexity_change", 0.01, 0.003, -1),
        (Q8, "perplexity_change", 0.001, 0.0, -1),
        (Q4, "top1", 0.95, 0.98, 1),
        (Q4, "store_times_smaller", 3.4, 3.7, 1),
        (Q4, "decode_ratio", 1.0, 1.5, 1),
        (PAGED, "decode_ratio", 0.97, 1.0, 1),
    ]
    return [
        (f"{policy}: {what}", found[policy][what], must, aim, better)
        for policy, what, must, aim, better in table
        if what in found.get(policy, {})
    ]


def reached(value: float, must: float, aim: float, better: int) -> str:
    if better * (value - aim) >= 0:
        return "aim"
    return "must" if better * (value - must) >= 0 else "NEITHER"


if __name__ == "__main__":
    sys.exit(main())
