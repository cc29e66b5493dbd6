"""Where adapters attach, and the sets of low-rank deltas that everything here passes around."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from ruvllm_core.decode.lora import FINAL_SITE
from ruvllm_core.model.spec import ModelSpec, llama_tensor_names
from ruvllm_core.protocols import LowRank

#: Low-rank deltas by site: `FINAL_SITE`, or the canonical name of a layer's matrix, as in ``layers.3.mlp.down``.
Deltas = Mapping[str, LowRank]


def linear_sites(spec: ModelSpec) -> dict[str, tuple[int, int]]:
    """Every linear layer's name and shape ``(out, in)``, layer after layer; neither embedding nor output projection."""
    names = llama_tensor_names(spec)
    return {
        name: (source.shape[0], source.shape[1])
        for name, source in names.items()
        if name.startswith("layers.") and len(source.shape) == 2
    }


def final_site(spec: ModelSpec) -> dict[str, tuple[int, int]]:
    """The one site after the last norm, hidden to hidden; it leaves keys and values as they are."""
    return {FINAL_SITE: (spec.hidden_size, spec.hidden_size)}


def start(shapes: Mapping[str, tuple[int, int]], rank: int, seed: int, scale: float = 1.0) -> dict[str, LowRank]:
    """Deltas that change nothing yet: A uniform with the variance 1 / (3 in) that LoRA starts from, B zero."""
    random = np.random.default_rng(seed)
    found = {}
    for site, (rows, columns) in shapes.items():
        bound = columns**-0.5
        a = random.uniform(-bound, bound, (rank, columns)).astype(np.float32)
        found[site] = LowRank(a, np.zeros((rows, rank), np.float32), scale)
    return found
