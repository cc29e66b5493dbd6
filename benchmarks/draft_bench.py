"""What drafts that learn bring: `python benchmarks/draft_bench.py`.

One person's questions (`draft_user.py`) are answered, a draft head is trained on the answers, and then other questions
of the same person are answered in turns without drafts (`off`), with drafts from the text so far and no head (`before`)
and with the trained head (`after`): greedy, and at temperature 0.7 with a nucleus of 0.9. `stranger` are questions of
somebody else. Acceptance is accepted over proposed tokens, speed is that of decoding, and the intervals are 95 %, by
resampling prompts. Greedy answers have to be the same on all sides. Prints a table and one JSON line.

`--keep FOLDER` keeps answers and head, so that a second run only measures.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

import numpy as np
from draft_user import FOLLOW_UPS, STRANGER, prompts

from ruvllm_core import Engine, GenerateParams, ModelConfig, Settings
from ruvllm_core.generate.request import Request, Trajectory
from ruvllm_core.hookspecs import API_VERSION, Offer, hookimpl
from ruvllm_core.protocols import FeedbackResult, LearningContext, Proposer
from ruvllm_core.registry import Registry
from ruvllm_sona.draft import DraftHead, Embeddings
from ruvllm_sona.draft_proposer import DraftHeads, SonaProposer
from ruvllm_sona.draft_store import DraftStore
from ruvllm_sona.draft_train import Progress, TrainConfig, train

KINDS: dict[str, dict[str, float]] = {"greedy": {"temperature": 0.0}, "sampled": {"temperature": 0.7, "top_p": 0.9}}
SIDES = ("off", "before", "after")


class Drafts:
    """A learning loop that only collects answers and drafts."""

    running: ClassVar[list[Drafts]] = []  # the latest one last: engines make them, the benchmark wants them

    def __init__(self, context: LearningContext) -> None:
        self.embeddings = Embeddings(context.weights)
        self.heads, self.store, self.wants_hidden = DraftHeads(), DraftStore(256 << 20), False
        self.running.append(self)

    def adapter(self, request: Request) -> None:
        return None

    def observe(self, trajectory: Trajectory) -> None:
        if self.wants_hidden:
            self.store.add(trajectory)

    def feedback(self, request_id: str, quality: float) -> FeedbackResult:
        return FeedbackResult("refused")

    def tick(self, budget_s: float) -> bool:
        return False

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        pass

    def proposer(self) -> Proposer:
        return SonaProposer(self.heads, self.embeddings.hidden_size, self.embeddings.vocab_size)

    def close(self) -> None:
        pass


def load(args: argparse.Namespace, **config: Any) -> tuple[Engine, Drafts]:
    @hookimpl
    def learning_loops() -> list[Offer]:
        return [Offer("drafts", f"{__name__}:Drafts")]

    settings = Settings(backend=config.pop("backend", "candle"))
    hooks = ModuleType("drafts")
    vars(hooks).update(learning_loops=learning_loops, RUVLLM_API_VERSION=API_VERSION)
    registry = Registry.discover(settings)
    registry.register(hooks, "drafts", "drafts", "0")
    chosen = ModelConfig(threads=args.threads, max_context=1024, learning=["drafts"], **config)
    return Engine.load(args.model, config=chosen, settings=settings, registry=registry), Drafts.running[-1]


def collect(args: argparse.Namespace) -> DraftStore:
    """Answers to learn from, a fifth of them to second questions."""
    first, _ = prompts(args.answers - args.answers // 5, 0, args.seed)
    engine, loop = load(args, backend="mistral")
    with engine:
        loop.wants_hidden = True
        sampling = {"max_tokens": args.max_tokens, **KINDS["sampled"]}
        params = [GenerateParams(seed=args.seed + n, **sampling) for n in range(args.answers)]
        answers = engine.generate_batch(first, params[: len(first)])
        chats = [
            [
                {"role": "user", "content": first[n]},
                {"role": "assistant", "content": answers[n].text},
                {"role": "user", "content": FOLLOW_UPS[n % len(FOLLOW_UPS)]},
            ]
            for n in range(args.answers // 5)
        ]
        engine.generate_batch(chats, params[len(first) :])
        engine.cache_stats()  # answered by the thread that also observes, so all answers have been
    return loop.store


def learn(
    args: argparse.Namespace, store: DraftStore, embeddings: Embeddings
) -> tuple[DraftHead | None, dict[str, Any]]:
    """The trained head, and what training took."""
    began, slices, last = time.perf_counter(), [], Progress("start")
    clock = began
    for progress in train(None, store.answers(), embeddings, TrainConfig(seed=args.seed)):
        slices.append(time.perf_counter() - clock)
        clock, last = time.perf_counter(), progress
    took = {"train_s": round(clock - began, 1), "slice_p99_ms": round(1e3 * float(np.percentile(slices, 99)), 1)}
    print(f"training: {took}, held out: {last.score}", flush=True)
    return last.head, took


@dataclass
class Side:
    """What one side did, prompt by prompt."""

    tokens: list[int] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    proposed: list[int] = field(default_factory=list)
    accepted: list[int] = field(default_factory=list)
    answers: list[tuple[int, ...]] = field(default_factory=list)

    def add(self, engine: Engine, prompt: str, params: GenerateParams) -> None:
        out = engine.generate(prompt, params)
        count = len(out.token_ids) - 1
        self.answers.append(out.token_ids)
        self.tokens.append(count)
        self.seconds.append(count / out.timings.decode_tok_s if count else 0.0)
        self.proposed.append(out.speculation.proposed if out.speculation else 0)
        self.accepted.append(out.speculation.accepted if out.speculation else 0)


def compare(sides: Mapping[str, Side], seed: int) -> dict[str, Any]:
    """Speeds, acceptance, and how they differ; intervals by resampling prompts."""
    random, count = np.random.default_rng(seed), len(sides["off"].tokens)
    draws = [np.arange(count), *(random.integers(0, count, count) for _ in range(1000))]
    table = {
        name: {key: np.array(getattr(side, key)) for key in ("tokens", "seconds", "proposed", "accepted")}
        for name, side in sides.items()
    }

    def speed(name: str, rows: Any) -> float:
        return float(table[name]["tokens"][rows].sum() / table[name]["seconds"][rows].sum())

    def acceptance(name: str, rows: Any) -> float:
        return float(table[name]["accepted"][rows].sum() / max(table[name]["proposed"][rows].sum(), 1))

    def interval(values: Sequence[float]) -> list[float]:
        return [round(float(values[0]), 3), *(round(float(x), 3) for x in np.percentile(values[1:], [2.5, 97.5]))]

    found: dict[str, Any] = {"prompts": count, "tok_s": {name: round(speed(name, draws[0]), 1) for name in SIDES}}
    for name in SIDES[1:]:
        found[name] = {
            "speedup": interval([speed(name, rows) / speed("off", rows) for rows in draws]),
            "acceptance": interval([acceptance(name, rows) for rows in draws]),
            "accepted_per_token": round(float(table[name]["accepted"].sum() / table[name]["tokens"].sum()), 3),
            "proposed_per_token": round(float(table[name]["proposed"].sum() / table[name]["tokens"].sum()), 3),
        }
    found["acceptance_gain"] = interval([acceptance("after", rows) - acceptance("before", rows) for rows in draws])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--answers", type=int, default=200, help="to learn from")
    parser.add_argument("--held-out", type=int, default=40, help="questions to measure with")
    parser.add_argument("--skip", type=int, default=0, help="held-out questions to leave out, for runs in parts")
    parser.add_argument("--max-tokens", type=int, default=128)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kind", choices=[*KINDS, "both"], default="both")
    parser.add_argument("--who", choices=("user", "stranger", "both"), default="both")
    parser.add_argument("--limit-s", type=float, default=1e9, help="ask no further questions of one kind after that")
    parser.add_argument("--keep", type=Path, help="a folder for answers and head")
    args = parser.parse_args()
    store, took, head_file = DraftStore(256 << 20), {}, args.keep / "head.safetensors" if args.keep else None
    if args.keep and (args.keep / "answers.safetensors").exists():
        store.load(args.keep / "answers.safetensors")
    else:
        store = collect(args)
        if args.keep:
            store.save(args.keep / "answers.safetensors")
    drafting, loop = load(args, speculative="learned")
    plain, _ = load(args)
    with drafting, plain:
        if head_file and head_file.exists():
            head: DraftHead | None = DraftHead.load(head_file)
        else:
            head, took = learn(args, store, loop.embeddings)
            if head is not None and head_file:
                head.save(head_file)
        if head is None:
            raise SystemExit("training found nothing that is better on held-out answers")
        _, held_out = prompts(args.answers - args.answers // 5, args.held_out, args.seed)
        people = {"user": held_out[args.skip :], "stranger": list(STRANGER)}
        results: dict[str, Any] = {}
        for who in people if args.who == "both" else [args.who]:
            for kind in KINDS if args.kind == "both" else [args.kind]:
                params = GenerateParams(max_tokens=args.max_tokens, **KINDS[kind])
                sides = {name: Side() for name in SIDES}
                ends = time.perf_counter() + args.limit_s
                for turn, prompt in enumerate(people[who]):
                    if time.perf_counter() > ends:
                        break
                    for name in SIDES if turn % 2 else SIDES[::-1]:
                        loop.heads.publish("", head if name == "after" else None)
                        sides[name].add(plain if name == "off" else drafting, prompt, params)
                same = all(sides[name].answers == sides["off"].answers for name in SIDES)
                found = results[f"{who}, {kind}"] = compare(sides, args.seed)
                if kind == "greedy":
                    found["same_tokens"] = same
                print(f"{who}, {kind}: {json.dumps(found)}", flush=True)
    about = {key: str(value) if isinstance(value, Path) else value for key, value in vars(args).items()}
    print(json.dumps({**about, "answers": len(store), "head_bytes": head.nbytes, **took, "results": results}))


if __name__ == "__main__":
    main()
