"""Do we compute what others compute from the same GGUF file? Greedy answers and perplexity, against llama.cpp, and
against transformers in float32 with ``--transformers``.

    python benchmarks/agreement_bench.py --text moby-dick.txt --transformers

llama.cpp rounds activations to 8 bits, so answers may part; each first difference is shown with the gap between the
two tokens' logits on either side. Prints tables and one JSON line. Needs llama-cpp-python.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from llama_cpp_peer import LlamaCpp

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
from prompts import PROMPTS

from ruvllm_core import Engine, GenerateParams, ModelConfig, Settings

WINDOW = 512


def greedy_differences(engine: Engine, peer: LlamaCpp, tokens: int) -> list[dict[str, object]]:
    """The first token in which each answer differs, with the logit gaps; answers that agree are left out."""
    found: list[dict[str, object]] = []
    params = GenerateParams(max_tokens=tokens, temperature=0.0, ignore_eos=True)
    for number, prompt in enumerate(PROMPTS):
        ids = engine.encode_prompt(prompt)
        ours = engine.generate(ids, params).token_ids
        peer.reset()
        logits = peer.decode(ids)
        for step, token in enumerate(ours):
            other = int(logits.argmax())
            if other != token:
                mine = _logits_after(engine, [*ids, *ours[:step]])
                gap_ours, gap_theirs = float(mine[token] - mine[other]), float(logits[other] - logits[token])
                found.append({"prompt": number, "step": step, "gap_ours": gap_ours, "gap_theirs": gap_theirs})
                break
            logits = peer.decode([token])
    return found


def _logits_after(engine: Engine, ids: Sequence[int]) -> np.ndarray:
    """Log-probabilities of every next token; their differences are those of the logits."""
    params = GenerateParams(max_tokens=1, temperature=0.0, logprobs=100)
    out = engine.generate(list(ids), params)
    assert out.top_logprobs is not None
    values = np.full(engine.spec.vocab_size, -np.inf)
    for token, value in out.top_logprobs[0].items():
        values[token] = value
    return values


def perplexities(engine: Engine, peer: LlamaCpp, ids: Sequence[int], windows: int) -> tuple[float, float]:
    """Ours and llama.cpp's over the same windows of 512 tokens, the second half of each counted."""
    ours, theirs = [], []
    for start in range(0, min(len(ids), windows * WINDOW) - WINDOW + 1, WINDOW):
        window = list(ids[start : start + WINDOW])
        ours.append(engine.score(window)[WINDOW // 2 - 1 :])
        peer.reset()
        logits = peer.decode(window, every=True)[WINDOW // 2 - 1 : -1].astype(np.float64)
        top = logits.max(-1, keepdims=True)
        chosen = logits[np.arange(len(logits)), window[WINDOW // 2 :]]
        theirs.append(chosen - top[:, 0] - np.log(np.exp(logits - top).sum(-1)))
    return tuple(float(np.exp(-np.concatenate(part).mean())) for part in (ours, theirs))  # type: ignore[return-value]


def transformers_agreement(engine: Engine, path: Path, tokens: int) -> int:
    """How many of the prompts transformers itself continues with the same tokens, greedily, in float32."""
    import torch
    from transformers import AutoModelForCausalLM, GenerationConfig

    model = AutoModelForCausalLM.from_pretrained(str(path.parent), gguf_file=path.name, dtype=torch.float32).eval()
    params = GenerateParams(max_tokens=tokens, temperature=0.0, ignore_eos=True)
    # No end of text: both go on to the last token, and neither forbids any.
    greedy = GenerationConfig(max_new_tokens=tokens, do_sample=False, pad_token_id=0)
    agreeing = 0
    for prompt in PROMPTS:
        ids = torch.tensor([engine.encode_prompt(prompt)])
        out = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=greedy)
        agreeing += tuple(out[0, ids.shape[1] :].tolist()) == engine.generate(ids[0].tolist(), params).token_ids
    return agreeing


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--text", type=Path, required=True, help="a real English text for perplexity")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--windows", type=int, default=20)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--transformers", action="store_true")
    args = parser.parse_args()
    config = ModelConfig(max_context=1024, threads=args.threads)
    with Engine.load(args.model, settings=Settings(), config=config) as engine:
        peer = LlamaCpp(engine.info.path, 1024, args.threads, repack=False)
        differences = greedy_differences(engine, peer, args.tokens)
        ids = engine.tokenizer.encode(args.text.read_text(encoding="utf-8"))
        ours, theirs = perplexities(engine, peer, ids, args.windows)
        peer.close()
        report: dict[str, object] = {
            "model": args.model,
            "prompts": len(PROMPTS),
            "tokens": args.tokens,
            "equal_to_llama_cpp": len(PROMPTS) - len(differences),
            "first_differences": differences,
            "perplexity": ours,
            "perplexity_llama_cpp": theirs,
            "perplexity_difference_percent": 100 * (ours / theirs - 1),
        }
        print(f"greedy answers equal to llama.cpp's: {len(PROMPTS) - len(differences)} of {len(PROMPTS)}")
        for row in differences:
            print(
                "  prompt {prompt:2} parts at token {step:2}: gap {gap_ours:.4f} here, {gap_theirs:.4f} there".format(
                    **row
                )
            )
        print(f"perplexity over {args.windows} windows of {WINDOW}: {ours:.4f}, llama.cpp {theirs:.4f}")
        if args.transformers:
            report["equal_to_transformers"] = agreeing = transformers_agreement(engine, engine.info.path, args.tokens)
            print(f"greedy answers equal to transformers': {agreeing} of {len(PROMPTS)}")
    print(json.dumps(report))


if __name__ == "__main__":
    main()
