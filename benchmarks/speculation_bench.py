"""Decode speed with drafts against without, side by side in one process: `python benchmarks/speculation_bench.py`.

Two kinds of prompts, all from text that comes with Python or this repository: `copy` is text that the model repeats
(a passage again, code with a function renamed, JSON with a value changed), greedy; `creative` is text it makes up, at
temperature 1 with the default nucleus, where looking back cannot help. Answers of both sides are the same but for
rounding, which the table tells. Both engines answer every prompt in turns, and the medians count. Prints a table and
one JSON line.
"""

from __future__ import annotations

import argparse
import codecs
import inspect
import io
import json
import math
import statistics
import textwrap
from contextlib import redirect_stdout
from pathlib import Path

from ruvllm_core import Engine, GenerateParams, ModelConfig, Settings

ROOT = Path(__file__).resolve().parent.parent
CREATIVE = (
    "Write a short story about a lighthouse keeper who finds a letter.",
    "Write a poem about winter in the city.",
    "Describe a market on another planet.",
    "Invent a new sport and explain its rules.",
    "Write a dialogue between the moon and the sea.",
    "Write a letter from a tree to the birds.",
)


def copy_prompts() -> dict[str, tuple[str, bool]]:
    """Texts by name, and whether the chat template goes around them."""
    with redirect_stdout(io.StringIO()):
        import this
    zen = codecs.decode(this.s, "rot13").strip()
    house = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").partition("## House rules")[2][:1500].strip()
    licence = (ROOT / "LICENSE-MIT").read_text(encoding="utf-8").strip()
    shorten = inspect.getsource(textwrap.shorten).strip()
    fields = Settings.model_json_schema()["$defs"]["SamplingFields"]["properties"]
    document = json.dumps({name: fields[name] for name in ("max_tokens", "temperature", "top_k", "top_p")}, indent=1)
    again = "Repeat the text above word for word."
    return {
        "passage, chat": (f"{zen}\n\n{again}", True),
        "passage, raw": (f"Text:\n{zen}\n\nThe same text, word for word:\nThe Zen of Python, by Tim Peters\n\n", False),
        "licence, chat": (f"{licence}\n\n{again}", True),
        "rules, chat": (f"{house}\n\n{again}", True),
        "code, chat": (f"```python\n{shorten}\n```\nRename the function to abbreviate and write it again.", True),
        "JSON, chat": (f"```json\n{document}\n```\nSet the default of top_k to 40 and write the JSON again.", True),
    }


def answer(engine: Engine, text: str, params: GenerateParams, template: bool) -> tuple[tuple[int, ...], float, str]:
    """Tokens, decode speed in tokens a second, and what speculation did."""
    out = engine.generate(text, params, template=template)
    stats = out.speculation
    done = f"{stats.accepted}/{stats.proposed}, {stats.tokens_per_step:.2f} a step" if stats is not None else ""
    return out.token_ids, out.timings.decode_tok_s, done


def geometric(values: list[float]) -> float:
    return math.exp(statistics.fmean(map(math.log, values)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--speculative", default="ngram", help="ngram or draft:MODEL")
    parser.add_argument("--draft-tokens", type=int, help="the most that is drafted; left out, the default")
    parser.add_argument("--max-tokens", type=int, default=192)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--kernels", default="auto")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--kind", choices=("copy", "creative", "both"), default="both")
    args = parser.parse_args()
    kernels = args.kernels if args.kernels == "auto" else args.kernels.split(",")
    common = {"threads": args.threads, "max_context": 2048, "kernels": kernels, "learning": []}
    work = [("copy", name, text, template, 0) for name, (text, template) in copy_prompts().items()]
    work += [("creative", text[:24], text, True, n) for n, text in enumerate(CREATIVE)]
    drafting = ModelConfig(speculative=args.speculative, draft_tokens=args.draft_tokens, **common)
    rows = []
    with (
        Engine.load(args.model, config=ModelConfig(**common), settings=Settings()) as plain,
        Engine.load(args.model, config=drafting, settings=Settings()) as drafts,
    ):
        for kind, name, text, template, seed in work:
            if args.kind not in (kind, "both"):
                continue
            sampling = {"temperature": 0.0} if kind == "copy" else {"temperature": 1.0, "top_p": 0.9, "seed": seed}
            params = GenerateParams(max_tokens=args.max_tokens, ignore_eos=kind == "creative", **sampling)
            pairs = []
            for turn in range(args.repeats):
                sides = [plain, drafts] if turn % 2 == 0 else [drafts, plain]
                found = {id(engine): answer(engine, text, params, template) for engine in sides}
                pairs.append((found[id(plain)], found[id(drafts)]))
            speeds = [statistics.median(pair[side][1] for pair in pairs) for side in (0, 1)]
            same = all(before[0] == after[0] for before, after in pairs)
            ratio = statistics.median(after[1] / before[1] for before, after in pairs)
            rows.append(
                {"kind": kind, "name": name, "plain": speeds[0], "drafts": speeds[1], "ratio": ratio, "same": same}
            )
            print(
                f"{kind:9} {name:25} {speeds[0]:7.1f} {speeds[1]:7.1f} tok/s  ×{ratio:.2f}  {pairs[-1][1][2]:24}",
                end="",
            )
            print("" if same else "  other tokens (rounding)", flush=True)
    means = {kind: [row["ratio"] for row in rows if row["kind"] == kind] for kind in ("copy", "creative")}
    result = {kind: round(geometric(ratios), 3) for kind, ratios in means.items() if ratios}
    print(
        json.dumps({"model": args.model, "speculative": args.speculative, **vars(args), "mean": result, "rows": rows})
    )


if __name__ == "__main__":
    main()
