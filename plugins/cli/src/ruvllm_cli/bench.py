"""Speed of a loaded model: its decoder and cache on token ids of no meaning, without text or sampling around them."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from ruvllm_cli.steps import Steps
from ruvllm_core.errors import RequestError
from ruvllm_core.model.spec import ModelSpec, llama_tensor_names
from ruvllm_core.protocols import Adapter, LowRank

if TYPE_CHECKING:
    from ruvllm_core.generate.load import Parts


@dataclass(frozen=True)
class Workload:
    """What to measure.

    Attributes:
        prefill, decode: tokens of each sequence that are computed at once, and then one by one.
        depth: tokens of each sequence that are in the cache before.
        sequences: how many run side by side.
        repeats: measurements, the medians of which count.
        adapter_rank: of a random adapter at every linear site and the final one, whose cost is measured too; 0 is none.
    """

    prefill: int = 128
    decode: int = 32
    depth: int = 0
    sequences: int = 1
    repeats: int = 3
    adapter_rank: int = 0

    @property
    def capacity(self) -> int:
        return self.depth + self.prefill + self.decode


def measure(parts: Parts, work: Workload, chunk: int) -> dict[str, Any]:
    """Tokens a second, all sequences together: medians as ``prefill_tok_s`` and ``decode_tok_s``, and every run.

    ``kv_bytes`` is what keys and values of the whole context take. With an adapter every run has one with it beside it,
    and ``adapter_prefill_cost`` and ``adapter_decode_cost`` are the medians of how much longer that takes, as a share.
    See `Runner` for the rest.
    """
    runner = Runner(parts, work, chunk)
    adapter = random_adapter(parts.model.spec, work.adapter_rank) if work.adapter_rank else None
    runs, costs = [], []
    for _ in range(work.repeats):
        runs.append(runner.run(work.prefill, work.decode))
        if adapter is not None:
            slower = runner.run(work.prefill, work.decode, adapter)
            costs.append([after / before - 1 for before, after in zip(runs[-1], slower, strict=True)])
    prefill = [work.sequences * work.prefill / seconds for seconds, _ in runs]
    decode = [work.sequences * work.decode / seconds for _, seconds in runs]
    return {
        "prefill_tok_s": median(prefill),
        "decode_tok_s": median(decode),
        "prefill_tok_s_runs": prefill,
        "decode_tok_s_runs": decode,
        "kv_bytes": runner.kv_bytes,
        **{
            f"adapter_{name}_cost": median(c)
            for name, c in zip(("prefill", "decode"), zip(*costs, strict=True), strict=False)
        },
    }


def random_adapter(spec: ModelSpec, rank: int) -> Adapter:
    """Small random deltas at every matrix of every layer and at the final site."""
    rng, shapes = np.random.default_rng(0), {"final": (spec.hidden_size, spec.hidden_size)}
    shapes |= {name: s.shape for name, s in llama_tensor_names(spec).items() if len(s.shape) == 2 and "layers" in name}

    def factor(*shape: int) -> npt.NDArray[np.float32]:
        return rng.normal(0.0, 1e-3, shape).astype(np.float32)

    return Adapter(
        "bench", {name: LowRank(factor(rank, width), factor(rows, rank)) for name, (rows, width) in shapes.items()}
    )


def peak_rss_mb() -> float:
    """Most memory this process has had in use so far, mapped files included, in MiB."""
    if sys.platform == "win32":
        import psutil

        return float(psutil.Process().memory_info().peak_wset / 2**20)
    if (status := Path("/proc/self/status")).exists():  # `getrusage` may count what our parent had when it made us
        return int(status.read_text().partition("VmHWM:")[2].split()[0]) / 2**10
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)


class Runner:
    """Sequences that hold `depth` tokens of a `Workload`, and go back to that after every run.

    A decode step ends with the likeliest token of each sequence, which the next step begins with. `chunk` is the most
    tokens computed at once. A short first run warms up. Raises `RequestError` if the sequences do not fit into the
    context.

    Attributes:
        kv_bytes: what keys and values of the whole context take.
    """

    def __init__(self, parts: Parts, work: Workload, chunk: int) -> None:
        check_context(parts, work.capacity)
        spec, cache = parts.model.spec, parts.new_cache(work.sequences)
        self._steps = Steps(parts.decoder, cache, spec.rope_variant(work.capacity), chunk)
        self._depth, self._cache = work.depth, cache
        self._names = [f"bench-{number}" for number in range(work.sequences)]
        shape = (work.sequences, work.depth + work.prefill)
        self._prompts = np.random.default_rng(0).integers(0, spec.vocab_size, shape)
        for name, prompt in zip(self._names, self._prompts, strict=True):
            self._cache.open(name, prompt.tolist(), work.capacity)
            self._steps.prefill(name, prompt, 0, work.depth)
        self.kv_bytes = self._cache.stats().allocated_bytes
        self.run(min(work.prefill, 32), min(work.decode, 2))

    def run(self, prefill: int, decode: int, adapter: Adapter | None = None) -> tuple[float, float]:
        """Seconds for `prefill` tokens of every sequence, and then for `decode` steps, all of them with `adapter`."""
        self._steps.adapter = adapter
        begin = time.perf_counter()
        hidden = [
            self._steps.prefill(name, prompt, self._depth, self._depth + prefill)
            for name, prompt in zip(self._names, self._prompts, strict=True)
        ]
        tokens = self._steps.likeliest(np.concatenate(hidden))
        middle = time.perf_counter()
        self._steps.decode(self._names, tokens, self._depth + prefill, decode)
        end = time.perf_counter()
        for name in self._names:
            self._cache.truncate(name, self._depth)
        return middle - begin, end - middle


def check_context(parts: Parts, tokens: int) -> None:
    """Raise `RequestError` if sequences of so many tokens do not fit."""
    if tokens > parts.info.max_context:
        raise RequestError(
            f"depth, prefill and decode are {tokens} tokens, the context holds {parts.info.max_context}",
            hint="measure fewer, or raise max_context if the model allows it",
        )
