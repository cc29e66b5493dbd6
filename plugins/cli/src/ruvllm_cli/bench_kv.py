"""Memory and speed of cache policies as a sequence grows."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import numpy as np

from ruvllm_cli.bench import check_context
from ruvllm_cli.steps import Steps
from ruvllm_core.errors import ConfigError, PluginError
from ruvllm_core.protocols import CacheContext, KVCachePolicy
from ruvllm_core.settings import Settings, validate_options

if TYPE_CHECKING:
    from ruvllm_core.generate.load import Parts
    from ruvllm_core.registry import Registry

_NAME = "bench"
_MIB = 2**20


@dataclass(frozen=True)
class Case:
    """A policy and settings of its plugin, written ``NAME[,SETTING=VALUE…]``, as in ``two_tier,store_precision=q8``."""

    label: str
    policy: str
    changes: dict[str, str]

    @classmethod
    def parse(cls, text: str) -> Case:
        """Raises `ConfigError` for what is not written so."""
        policy, *rest = text.split(",")
        pairs = [part.partition("=") for part in rest]
        for name, equals, value in pairs:
            if not (name and equals and value):
                raise ConfigError(f"cache policy {text!r}: {name!r} is not SETTING=VALUE")
        return cls(text, policy, {name: value for name, _, value in pairs})

    def open(self, parts: Parts, settings: Settings, registry: Registry, context: int) -> KVCachePolicy:
        """An empty cache of this policy for one sequence of `context` tokens. Raises `ConfigError`, `PluginError`."""
        entry = registry.entry("cache_policies", self.policy)
        options = registry.options(entry.plugin)
        if self.changes:
            if options is None:
                raise ConfigError(f"cache policy {self.label!r}: plugin {entry.plugin} has no settings")
            values = {**settings.plugins.get(entry.plugin, {}), **self.changes}
            options = validate_options(type(options), values, entry.plugin)
        make: Any = registry.load("cache_policies", self.policy)
        chunk = settings.prefill_chunk
        found: KVCachePolicy = make(
            CacheContext(parts.decoder.spec, parts.decoder, settings.cache, context, 1, chunk, options)
        )
        return found


class Growing:
    """One sequence in one cache, which grows to each depth in turn."""

    def __init__(self, case: Case, parts: Parts, cache: KVCachePolicy, context: int, chunk: int) -> None:
        self.case, self._cache, self._depth = case, cache, 0
        spec = parts.decoder.spec
        self._tokens = np.random.default_rng(0).integers(0, spec.vocab_size, context)
        self._steps = Steps(parts.decoder, cache, spec.rope_variant(context), chunk)
        cache.open(_NAME, self._tokens.tolist(), context)

    def grow(self, depth: int) -> float:
        """Compute tokens up to `depth`; tokens a second."""
        begin, new = time.perf_counter(), depth - self._depth
        self._steps.prefill(_NAME, self._tokens, self._depth, depth)
        self._depth = depth
        return new / (time.perf_counter() - begin)

    def decode(self, steps: int) -> float:
        """Tokens a second one by one, which are forgotten afterwards."""
        begin = time.perf_counter()
        self._steps.decode([_NAME], self._tokens[:1], self._depth, steps)
        seconds = time.perf_counter() - begin
        self._cache.truncate(_NAME, self._depth)
        return steps / seconds

    @property
    def used_bytes(self) -> int:
        return self._cache.stats().used_bytes


def measure(
    parts: Parts,
    settings: Settings,
    registry: Registry,
    cases: Sequence[Case],
    depths: Sequence[int],
    *,
    decode: int,
    repeats: int,
) -> Iterator[dict[str, Any]]:
    """One row for each depth and policy as soon as it is known; policies are measured in turn.

    Yields ``kv_mb`` (MiB in use), ``decode_tok_s`` (median), ``decode_tok_s_runs``, and ``prefill_tok_s`` of the tokens
    since the last depth. Raises `RequestError` if the deepest does not fit into the context.
    """
    context = max(depths) + decode
    check_context(parts, context)
    chunk = settings.prefill_chunk
    growing = [Growing(case, parts, case.open(parts, settings, registry, context), context, chunk) for case in cases]
    for depth in sorted(set(depths)):
        prefill = [one.grow(depth) for one in growing]
        runs: list[list[float]] = [[] for _ in growing]
        for one in growing:
            one.decode(min(2, decode))  # warms up
        for _ in range(repeats):
            for one, own in zip(growing, runs, strict=True):
                own.append(one.decode(decode))
        for one, speed, own in zip(growing, prefill, runs, strict=True):
            yield {
                "policy": one.case.label,
                "depth": depth,
                "kv_mb": one.used_bytes / _MIB,
                "prefill_tok_s": speed,
                "decode_tok_s": median(own),
                "decode_tok_s_runs": own,
            }


def check_plot() -> None:
    """Raise `PluginError` if nothing can be drawn here."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise PluginError("drawing needs matplotlib", hint="pip install 'ruvllm-cli[plot]'") from None


def plot(rows: Sequence[dict[str, Any]], title: str, path: Path) -> None:
    """Memory and decode speed against depth, a line for each policy, as a PNG file."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title)
    memory, speed = figure.subplots(1, 2)
    for policy in dict.fromkeys(row["policy"] for row in rows):
        own = [row for row in rows if row["policy"] == policy]
        depths = [row["depth"] for row in own]
        memory.plot(depths, [row["kv_mb"] for row in own], marker="o", label=policy)
        speed.plot(depths, [row["decode_tok_s"] for row in own], marker="o", label=policy)
    for axes, label in ((memory, "keys and values, MiB"), (speed, "decode, tokens a second")):
        axes.set_xlabel("tokens in the cache")
        axes.set_ylabel(label)
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(path, format="png", dpi=120)


def write(result: dict[str, Any], title: str, output: Path) -> tuple[Path, Path]:
    """`result` as OUTPUT.json and its picture as OUTPUT.png."""
    files = output.with_name(output.name + ".json"), output.with_name(output.name + ".png")
    output.parent.mkdir(parents=True, exist_ok=True)
    files[0].write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    plot(result["results"], title, files[1])
    return files
