"""`export_peft`: adapters in the format of the PEFT library.

Format: ``adapter_config.json`` and ``adapter_model.safetensors`` as `peft.PeftModel.from_pretrained` reads them. Per
module, ``y += alpha / r * (x Aᵀ) Bᵀ`` (LoRA, arXiv 2106.09685).

The ``final`` site becomes a LoRA of ``lm_head`` without any loss: W (h + s·B·A·h) = W h + s·(W·B)·A·h. Where input and
output embeddings are one matrix, PEFT puts that LoRA beside the shared matrix, so the input side stays as it is; the
configuration asks PEFT not to tie adapters. Merging there would change the input embedding, too: with PEFT, untie the
embeddings first (see its warning), or merge with `ruvllm_sona.gguf_merge`, which unties them itself.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ruvllm_core.decode.lora import FINAL_SITE
from ruvllm_core.errors import LearningError, near
from ruvllm_core.model.spec import ModelSpec, TensorSource
from ruvllm_core.protocols import FloatArray, LowRank, Weights

from .fingerprint import Fingerprint
from .peft_modules import (
    CONFIG_FILE,
    FINGERPRINT_KEY,
    HEAD,
    PREFIX,
    WEIGHTS_FILE,
    Module,
    hf_order,
    modules,
    output_projection,
    through_head,
)
from .sites import Deltas


def export_peft(
    deltas: Deltas,
    spec: ModelSpec,
    names: Mapping[str, TensorSource],
    folder: Path,
    *,
    base_model: str,
    weights: Weights,
) -> None:
    """Write `deltas` into `folder`, replacing an adapter that is there; each file appears complete or not at all.

    Args:
        deltas: by site, in the row order of `spec`.
        names: where the model's tensors are found (`Architecture.tensor_names`).
        base_model: hub id or folder of the Hugging Face model that the adapter is for, written into the configuration.
        weights: of the open model; its output projection and its fingerprint are needed.

    Raises:
        LearningError: nothing to export, a site the model does not have, a delta of another shape or with values that
            are not finite, or the files cannot be written.
    """
    check_deltas(deltas, spec, names)
    found: dict[str, LowRank] = {}
    for name, module in modules(names).items():
        parts = {site: deltas[site] for site in module.parts if site in deltas}
        if parts:
            found[name] = _fused(spec, module, parts)
    if FINAL_SITE in deltas:
        final = deltas[FINAL_SITE]
        b = through_head(output_projection(spec, weights), final.b).astype(np.float32)
        found[HEAD] = LowRank(final.a, b, final.scale)
    tensors: dict[str, FloatArray] = {}
    for name, delta in found.items():
        tensors[f"{PREFIX}{name}.lora_A.weight"] = np.ascontiguousarray(delta.a, dtype=np.float32)
        tensors[f"{PREFIX}{name}.lora_B.weight"] = np.ascontiguousarray(delta.b, dtype=np.float32)
    from safetensors.numpy import save

    metadata = {"format": "pt", FINGERPRINT_KEY: Fingerprint.of(spec, weights).text()}
    config = json.dumps(_config(found, modules(names), base_model), indent=2) + "\n"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _replace(folder / WEIGHTS_FILE, save(tensors, metadata))
        _replace(folder / CONFIG_FILE, config.encode())
    except OSError as error:
        raise LearningError(f"cannot write the adapter to {folder}: {error}", hint="choose another folder") from error


def check_deltas(deltas: Deltas, spec: ModelSpec, names: Mapping[str, TensorSource]) -> None:
    """Raise `LearningError` unless `deltas` are some, and fit the model."""
    if not deltas:
        raise LearningError("there is nothing in the adapter: no site has a delta")
    shapes = {site: source.shape for site, source in names.items() if site.startswith("layers.") and source.shape[1:]}
    shapes[FINAL_SITE] = (spec.hidden_size, spec.hidden_size)
    for site, delta in deltas.items():
        if site not in shapes:
            raise LearningError(f"the model has no site '{site}'", hint=near(site, shapes))
        rows, columns = shapes[site]
        rank = delta.a.shape[0]
        if delta.a.shape != (rank, columns) or delta.b.shape != (rows, rank) or not rank:
            what = f"'{site}' is {rows} × {columns}, but the delta's factors are {delta.b.shape} and {delta.a.shape}"
            raise LearningError(what, hint="the adapter was made for another model")
        if not (np.isfinite(delta.a).all() and np.isfinite(delta.b).all() and np.isfinite(delta.scale)):
            raise LearningError(f"the delta at '{site}' has values that are not finite", hint="roll back the adapter")


def _fused(spec: ModelSpec, module: Module, parts: Mapping[str, LowRank]) -> LowRank:
    """One delta of the whole module: factors side by side, each part in its own rows, so nothing is lost."""
    rank = sum(len(delta.a) for delta in parts.values())
    scales = {delta.scale for delta in parts.values()}
    scale = scales.pop() if len(scales) == 1 else 1.0  # parts of several scales carry them in B
    b, at = np.zeros((module.shape[0], rank), np.float32), 0
    for site, delta in parts.items():
        start, stop = module.parts[site]
        own = delta.b if scale == delta.scale else delta.b * np.float32(delta.scale)
        order = hf_order(spec, site)
        b[start:stop, at : at + len(delta.a)] = own if order is None else own[order]
        at += len(delta.a)
    return LowRank(np.concatenate([delta.a for delta in parts.values()]), b, scale)


def _config(found: Mapping[str, LowRank], known: Iterable[str], base_model: str) -> dict[str, Any]:
    ranks = {name: len(delta.a) for name, delta in found.items()}
    alphas = {name: float(delta.scale) * ranks[name] for name, delta in found.items()}
    rank, alpha = (Counter(values.values()).most_common(1)[0][0] for values in (ranks, alphas))
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "inference_mode": True,
        "target_modules": _targets(found, known),
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {name: value for name, value in ranks.items() if value != rank},
        "alpha_pattern": {name: value for name, value in alphas.items() if value != alpha},
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "modules_to_save": None,
        "use_rslora": False,
        "use_dora": False,
        # A delta of lm_head alone must stay on the output side of a shared matrix.
        **({"ensure_weight_tying": False} if HEAD in found else {}),
    }


def _targets(found: Mapping[str, LowRank], known: Iterable[str]) -> list[str]:
    """Last names, as in ``q_proj``, where a delta is on every module so called; whole names elsewhere."""
    last = {name: name.rpartition(".")[2] for name in (*known, HEAD)}
    missing = {last[name] for name in last if name not in found}
    return sorted({name if last[name] in missing else last[name] for name in found})


def _replace(path: Path, data: bytes) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
