"""Speed of a loaded model: its decoder and cache on token ids of no meaning, without text or sampling around them."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from ruvllm_core.decode.batch import Batch
from ruvllm_core.decode.lora import apply_final
from ruvllm_core.errors import RequestError
from ruvllm_core.model.spec import ModelSpec, llama_tensor_names
from ruvllm_core.protocols import Adapter, LowRank

if TYPE_CHECKING:
    from ruvllm_core.generate.load import Parts

_IDS = npt.NDArray[np.int64]


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
        if work.capacity > parts.info.max_context:
            raise RequestError(
                f"depth, prefill and decode are {work.capacity} tokens, the context holds {parts.info.max_context}",
                hint="measure fewer, or raise max_context if the model allows it",
            )
        self._spec, self._decoder, self._chunk = parts.model.spec, parts.decoder, chunk
        self._depth = work.depth
        self._adapter: Adapter | None = None
        self._cache = parts.new_cache(work.sequences)
        self._names = [f"bench-{number}" for number in range(work.sequences)]
        self._variant = self._spec.rope_variant(work.capacity)
        shape = (work.sequences, work.depth + work.prefill)
        self._prompts = np.random.default_rng(0).integers(0, self._spec.vocab_size, shape)
        for name, prompt in zip(self._names, self._prompts, strict=True):
            self._cache.open(name, prompt.tolist(), work.capacity)
            self._compute(name, prompt, 0, work.depth)
        self.kv_bytes = self._cache.stats().allocated_bytes
        self.run(min(work.prefill, 32), min(work.decode, 2))

    def run(self, prefill: int, decode: int, adapter: Adapter | None = None) -> tuple[float, float]:
        """Seconds for `prefill` tokens of every sequence, and then for `decode` steps, all of them with `adapter`."""
        self._adapter = adapter
        begin = time.perf_counter()
        hidden = [
            self._compute(name, prompt, self._depth, self._depth + prefill)
            for name, prompt in zip(self._names, self._prompts, strict=True)
        ]
        tokens = self._decoder.logits(np.concatenate(hidden)).argmax(-1)
        middle = time.perf_counter()
        for step in range(decode):
            position = self._depth + prefill + step
            tokens = self._decoder.logits(self._forward(self._names, tokens, position)).argmax(-1)
        end = time.perf_counter()
        for name in self._names:
            self._cache.truncate(name, self._depth)
        return middle - begin, end - middle

    def _compute(self, name: str, prompt: _IDS, start: int, stop: int) -> npt.NDArray[np.float32]:
        """Prefill positions ``[start, stop)`` in chunks; the hidden state of the last one, ``[1, C]``."""
        hidden = np.empty((0, self._spec.hidden_size), dtype=np.float32)
        for position in range(start, stop, self._chunk):
            hidden = self._forward([name], prompt[position : min(position + self._chunk, stop)], position)
        return hidden

    def _forward(self, names: Sequence[str], tokens: _IDS, position: int) -> npt.NDArray[np.float32]:
        """Compute as many tokens for each of `names`, from `position` on; hidden states of the last of each."""
        each = len(tokens) // len(names)
        for name in names:
            self._cache.extend(name, each)
        ends = np.arange(1, len(names) + 1) * each
        batch = Batch(
            tokens=np.ascontiguousarray(tokens, dtype=np.int64),
            positions=np.tile(np.arange(position, position + each, dtype=np.int64), len(names)),
            cu_q=np.concatenate([[0], ends]).astype(np.int32),
            rows=ends.astype(np.int64) - 1,
            kv=self._cache.view(names),
            rope_variants=np.full(len(names), self._variant, dtype=np.uint8),
        )
        batch.adapters = (self._adapter,) * len(names) if self._adapter else ()
        hidden = apply_final(self._decoder.forward(batch), batch)
        for name in names:
            self._cache.commit(name)
        return hidden
