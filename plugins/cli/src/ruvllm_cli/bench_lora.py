"""What low-rank adapters cost a model: in its layers, at the final site, and at both."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING, Any

from ruvllm_cli.bench import Runner, Workload, random_adapter
from ruvllm_core.decode.lora import FINAL_SITE
from ruvllm_core.model.spec import ModelSpec
from ruvllm_core.protocols import Adapter

if TYPE_CHECKING:
    from ruvllm_core.generate.load import Parts


@dataclass(frozen=True)
class Ranks:
    """Of the adapters: at every linear matrix of the layers, and at the final site."""

    layers: int = 1
    final: int = 2

    def adapters(self, spec: ModelSpec) -> dict[str, Adapter]:
        """Adapters of small random numbers, by what they change: ``layers``, ``final`` and ``both``."""
        layers = {site: d for site, d in random_adapter(spec, self.layers).sites.items() if site != FINAL_SITE}
        final = {FINAL_SITE: random_adapter(spec, self.final).sites[FINAL_SITE]}
        found = {"layers": layers, "final": final, "both": layers | final}
        return {name: Adapter(f"bench-{name}", sites) for name, sites in found.items()}


def measure(parts: Parts, work: Workload, ranks: Ranks, chunk: int) -> Iterator[dict[str, Any]]:
    """One row without adapters (``none``) and one for each of `Ranks.adapters`.

    Each run with an adapter stands between two without, and its cost is how much longer than their mean it takes, as a
    share: a machine that slows down meanwhile slows both. Yields ``prefill_tok_s``, ``decode_tok_s``, ``prefill_cost``,
    ``decode_cost`` (medians of `work.repeats` runs, of none as many for each adapter) and ``decode_cost_runs``. Raises
    `RequestError` if the tokens do not fit into the context.
    """
    runner, adapters = Runner(parts, work, chunk), ranks.adapters(parts.model.spec)

    def run(adapter: Adapter | None = None) -> tuple[float, float]:
        return runner.run(work.prefill, work.decode, adapter)

    for adapter in adapters.values():
        runner.run(1, 1, adapter)  # warms up: kernels prepare each adapter once
    runs: dict[str, list[tuple[float, float]]] = {"none": [run()], **{name: [] for name in adapters}}
    costs: dict[str, list[list[float]]] = {name: [] for name in adapters}
    for _ in range(work.repeats):
        for name, adapter in adapters.items():
            runs[name].append(run(adapter))
            runs["none"].append(run())
            around = zip(*runs["none"][-2:], runs[name][-1], strict=True)
            costs[name].append([2 * own / (before + after) - 1 for before, after, own in around])
    for name, own in runs.items():
        prefill, decode = (median(seconds) for seconds in zip(*own, strict=True))
        row = {
            "adapter": name,
            "prefill_tok_s": work.sequences * work.prefill / prefill,
            "decode_tok_s": work.sequences * work.decode / decode,
        }
        if name in costs:
            found = [list(one) for one in zip(*costs[name], strict=True)]
            row |= {"prefill_cost": median(found[0]), "decode_cost": median(found[1]), "decode_cost_runs": found[1]}
        yield row
