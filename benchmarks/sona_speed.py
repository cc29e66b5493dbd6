"""What learning costs: `python benchmarks/sona_speed.py` (three minutes, on a machine that does nothing else).

Instant updates while another thread decodes; one whole-network update; what a stream loses while learning waits; how
long a tick takes with ten thousand answers queued; and what an engine loses that could learn and does not. Prints a
table and one JSON line. What adapters cost a token is `ruvllm bench lora`'s to say.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from ruvllm_core import Engine, GenerateParams
from ruvllm_core.generate.request import Trajectory
from ruvllm_core.generate.sampler import Distribution
from ruvllm_core.settings import load_settings
from ruvllm_sona.loop import SonaLoop
from ruvllm_sona.micro import MicroLoRA
from ruvllm_sona.micro_config import MicroLoRAConfig
from ruvllm_sona.settings import SonaSettings
from ruvllm_sona.trace import Trace

Row = tuple[str, str, dict[str, float]]
_WIDTH = 4096


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--updates", type=int, default=3000, help="instant ones")
    parser.add_argument("--rounds", type=int, default=7, help="of what is compared, in turns")
    parser.add_argument("--queued", type=int, default=10_000)
    parser.add_argument("--tokens", type=int, default=160, help="of a timed stream")
    args = parser.parse_args()
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as folder, engine(args.model, Path(folder), ["sona"]) as learning:
        rows.append(instant(learning, args.updates))
        rows.append(update(learning, args.rounds))
        rows.append(busy(learning, args.rounds, args.tokens))
        rows.append(ticks(learning, args.queued))
        with engine(args.model, Path(folder) / "off", []) as plain:
            rows.append(idle(learning, plain, args.rounds, args.tokens))
    print("| what | figure |\n| --- | --- |")
    for what, said, _ in rows:
        print(f"| {what} | {said} |")
    print(json.dumps({"benchmark": "sona_speed", **{key: value for *_, found in rows for key, value in found.items()}}))


@contextmanager
def engine(model: str, folder: Path, learning: list[str]) -> Iterator[Engine]:
    settings = load_settings().model_copy(update={"cache_dir": folder, "learning": learning})
    with Engine.load(model, settings=settings) as made:
        yield made


def instant(made: Engine, count: int) -> Row:
    """`MicroLoRA.learn` at width 4096 and rank 2, while the engine decodes."""
    rng, micro = np.random.default_rng(0), MicroLoRA(MicroLoRAConfig.for_hidden_dim(_WIDTH))
    stop = threading.Event()

    def decode() -> None:
        while not stop.is_set():
            made.generate("Go on and on.", GenerateParams(max_tokens=64, ignore_eos=True))

    thread = threading.Thread(target=decode)
    thread.start()
    seconds = []
    try:
        time.sleep(0.5)
        for n in range(count):
            a, b = (rng.normal(0, 1e-3, shape).astype(np.float32) for shape in ((2, _WIDTH), (_WIDTH, 2)))
            trace = Trace(a, b, 80, micro.version)
            began = time.perf_counter()
            micro.learn(trace, float(n % 2))
            seconds.append(time.perf_counter() - began)
    finally:
        stop.set()
        thread.join()
    p50, p99 = (1e3 * float(np.percentile(seconds, q)) for q in (50, 99))
    said = f"p50 {p50:.3f} ms, p99 {p99:.3f} ms"
    return (
        f"instant update, {_WIDTH} wide, rank 2, while decoding",
        said,
        {"instant_p50_ms": p50, "instant_p99_ms": p99},
    )


def update(made: Engine, rounds: int) -> Row:
    """One step of Adam for a prompt of 40 tokens and an answer of 80, with the plugin's leash and a text on it."""
    from ruvllm_sona.learner import Learner, LearnerConfig
    from ruvllm_sona.leash_texts import leash_piece, leash_tokens
    from ruvllm_sona.network import Network
    from ruvllm_sona.objective import ObjectiveConfig
    from ruvllm_sona.records import Example
    from ruvllm_sona.sites import linear_sites

    rng, parts = np.random.default_rng(0), made._parts
    network = Network(made.spec, parts.model.weights)
    longest = max(timed(lambda work=work: next(work, None)) for work in [network.load()] * 400)
    own, texts = SonaSettings(), leash_tokens(made.tokenizer)
    objective = ObjectiveConfig(own.leash, own.saturation, own.budget, own.text_leash)
    config = LearnerConfig(own.rank, own.learning_rate, objective, average=own.average)
    learner, seconds = Learner(linear_sites(made.spec), config), []
    prompt, answer = (tuple(rng.integers(0, made.spec.vocab_size, n).tolist()) for n in (40, 80))
    rated = [Example("", prompt, answer, 1.0, 0.8)]
    for _ in range(rounds + 1):
        began = time.perf_counter()
        work = learner.step(network, rated, [0.5], texts=[leash_piece(texts, learner.steps)])
        while (slice_s := timed_next(work)) is not None:
            longest = max(longest, slice_s)
        seconds.append(time.perf_counter() - began)
    found, dtype = 1e3 * median(seconds[1:]), str(network.dtype).removeprefix("torch.")
    said = f"{found:.0f} ms in {dtype}; longest slice {1e3 * longest:.0f} ms"
    return "one whole-network update, 40 + 80 tokens", said, {"update_ms": found, "longest_slice_ms": 1e3 * longest}


def busy(made: Engine, rounds: int, tokens: int) -> Row:
    """Decoding of a stream with rated answers waiting to be learned from, against one with none, in turns."""
    params = GenerateParams(max_tokens=tokens, temperature=0.0, ignore_eos=True)
    slower, later = [], []
    for n in range(rounds):
        settle(made)
        quiet = made.generate("Count.", params).timings
        answers = [made.generate(f"Tell me of {n} and {k}.", GenerateParams(max_tokens=48)) for k in range(4)]
        for k, one in enumerate(answers):
            made.feedback(one.request_id, float(k % 2))
        settle(made, learned=False)
        waiting = made.generate("Count.", params).timings
        slower.append(quiet.decode_tok_s / waiting.decode_tok_s)
        later.append(1e3 * (waiting.ttft_s - quiet.ttft_s))
    settle(made)
    percent, late = 100 * (median(slower) - 1), median(later)
    said = f"{percent:+.1f} % time a token; its first token {late:.0f} ms later"
    return "a stream while learning waits", said, {"stream_slower_percent": percent, "first_token_later_ms": late}


def ticks(made: Engine, queued: int) -> Row:
    """`tick(0.1)` with so many finished requests queued, and feedback on some of them."""
    loop, rng = sona(made), np.random.default_rng(1)
    hidden = rng.normal(0, 1, (8, made.spec.hidden_size)).astype(np.float32)
    drawn = tuple(Distribution(np.array([1, 2, 3]), np.array([0.5, 0.3, 0.2])) for _ in range(8))

    def run() -> list[float]:
        for n in range(queued):
            output = tuple(rng.integers(1, 4, 8).tolist())
            done = Trajectory(
                f"q{n}", (1, 2, 3), output, "", "length", GenerateParams(), hidden=hidden, drawn_from=drawn
            )
            loop.observe(done)
        for n in range(queued - 8, queued):
            loop.feedback(f"q{n}", float(n % 2))
        seconds, more = [], True
        while more:
            began = time.perf_counter()
            more = loop.tick(0.1)
            seconds.append(time.perf_counter() - began)
        return seconds

    seconds = made._worker.call(run)
    p99, most = (1e3 * float(np.percentile(seconds, q)) for q in (99, 100))
    said = f"p99 {p99:.0f} ms, longest {most:.0f} ms of {len(seconds)} ticks"
    return f"tick of 100 ms, {queued} trajectories queued", said, {"tick_p99_ms": p99, "tick_max_ms": most}


def idle(learning: Engine, plain: Engine, rounds: int, tokens: int) -> Row:
    """Decoding speed of an engine that could learn and was told nothing by this user, against one that cannot."""
    params = GenerateParams(max_tokens=tokens, temperature=0.7, seed=1, ignore_eos=True, user="somebody else")
    ratios, same = [], True
    for n in range(2 * rounds):  # in turns: who comes second finds other caches
        settle(learning)
        done = {
            made is learning: made.generate("Tell me a story.", params)
            for made in ((learning, plain) if n % 2 else (plain, learning))
        }
        one, other = done[True], done[False]
        same = same and one.token_ids == other.token_ids
        ratios.append(one.timings.decode_tok_s / other.timings.decode_tok_s)
    ratio = median(ratios)
    said = f"{ratio:.3f} of its speed, {'the same' if same else 'OTHER'} tokens"
    return "nothing learned, against no plugin", said, {"idle_speed": ratio, "idle_same_tokens": float(same)}


def sona(made: Engine) -> SonaLoop:
    return next(loop for loop in made._parts.loops if isinstance(loop, SonaLoop))


def settle(made: Engine, learned: bool = True) -> None:
    """Wait until nothing is left to do; or, with `learned` False, until the engine's thread has taken all calls."""
    made._worker.call(lambda: None)
    while learned and made._worker.call(lambda: len(sona(made)._schedule)):
        time.sleep(0.05)


def timed(work: Callable[[], Any]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def timed_next(work: Iterator[Any]) -> float | None:
    """Seconds of the next slice; None at the end."""
    began = time.perf_counter()
    return time.perf_counter() - began if next(work, work) is not work else None


if __name__ == "__main__":
    main()
