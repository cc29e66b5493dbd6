"""`import_peft`: LoRA adapters that the PEFT library (or `export_peft`) wrote.

Whatever in the configuration would change what the adapter computes, and is not LoRA on linear layers, is refused by
name: a field that is not known here must be unset. Pickled ``.bin`` adapters are refused, since reading one runs code.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ruvllm_core.decode.lora import FINAL_SITE
from ruvllm_core.errors import LearningError
from ruvllm_core.log import get_logger
from ruvllm_core.model.quant import QuantTensor
from ruvllm_core.model.safetensors import Safetensors, open_file, read_json
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
    pieces,
    through_head,
)

_log = get_logger("sona.peft")

#: Fields that say nothing of what the finished adapter computes, or that its tensors repeat.
_HARMLESS = frozenset(
    (
        *("task_type", "base_model_name_or_path", "revision", "inference_mode", "auto_mapping", "peft_version"),
        *("lora_dropout", "layers_to_transform", "layers_pattern", "exclude_modules", "runtime_config"),
        *("loftq_config", "eva_config", "qalora_group_size", "megatron_core", "megatron_config"),
    )
)
_UNDERSTOOD = frozenset(
    ("peft_type", "r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "target_modules")
)
#: These start LoRA from the model's own weights and change those; true, false and the others here leave them alone.
_PLAIN_STARTS = (True, False, None, "gaussian", "orthogonal", "eva")
_NAMED = {
    "use_dora": "DoRA, which rescales the columns of whole weights",
    "modules_to_save": "whole modules that were trained beside LoRA",
    "bias": "trained biases",
    "lora_bias": "a bias beside B",
    "trainable_token_indices": "trained embeddings of single tokens",
    "target_parameters": "deltas of parameters that are no linear module",
    "layer_replication": "layers that occur several times",
    "ensure_weight_tying": "one delta for both sides of a tied embedding",
    "init_lora_weights": "a start that changes the model's own weights",
}
_ROLE = re.compile(r"(?P<module>.+)\.lora_(?P<factor>[AB])(?:\.default)?\.weight")
#: How far from a product with the output projection, or from the model's own weights, is still rounding.
_HEAD_TOLERANCE = 0.01
_COPY_TOLERANCE = 0.15


def import_peft(
    folder: Path,
    spec: ModelSpec,
    names: Mapping[str, TensorSource],
    *,
    weights: Weights,
    force: bool = False,
) -> dict[str, LowRank]:
    """The deltas of an adapter, by site, in the row order of `spec`.

    A LoRA of ``lm_head`` becomes the ``final`` site where it is one: where its B is the output projection times
    something, which is found by least squares.

    Args:
        names: where the model's tensors are found (`Architecture.tensor_names`).
        weights: of the open model.
        force: accept an adapter that carries the fingerprint of another model. Shapes must fit all the same.

    Raises:
        LearningError: there is no adapter, it is pickled, uses what is not supported, does not fit the model, or was
            made for another one.
        ModelError: a file that breaks its format.
    """
    path = folder / WEIGHTS_FILE
    if not (folder / CONFIG_FILE).is_file() or not path.is_file():
        if (folder / "adapter_model.bin").is_file():
            what = f"{folder} has its weights as adapter_model.bin, a pickle, and reading one can run any code"
            raise LearningError(what, hint="load it with PEFT where you trust it, and save it as safetensors")
        raise LearningError(f"{folder} holds no adapter: it needs {CONFIG_FILE} and {WEIGHTS_FILE}")
    config = read_json(folder / CONFIG_FILE)
    _check_config(folder / CONFIG_FILE, config)
    tensors = open_file(path)
    _check_fingerprint(path, spec, weights, force)
    known = modules(names)
    known[HEAD] = Module((spec.vocab_size, spec.hidden_size), {})
    found: dict[str, LowRank] = {}
    for name, a, b in _pairs(path, tensors, known, spec, weights):
        delta = LowRank(a, b, _scale(folder / CONFIG_FILE, config, name, len(a)))
        if name == HEAD:
            found[FINAL_SITE] = _final(path, delta, output_projection(spec, weights))
        else:
            found.update(_split(spec, known[name], delta))
    if not found:
        raise LearningError(f"{path} holds no delta at all")
    return found


def _check_config(path: Path, config: Mapping[str, Any]) -> None:
    if (kind := config.get("peft_type")) != "LORA":
        raise LearningError(f"{path}: adapters of the kind {kind!r} cannot be used, only LORA")
    start = config.get("init_lora_weights")
    surplus = {name: value for name, value in config.items() if name not in _HARMLESS | _UNDERSTOOD}
    if start in _PLAIN_STARTS:
        surplus.pop("init_lora_weights", None)
    if config.get("bias") == "none":
        surplus.pop("bias")
    for name, value in surplus.items():
        if value:  # unset fields are null, false, or empty
            about = f": {_NAMED[name]}" if name in _NAMED else ""
            hint = "merge it into its model with PEFT instead, and convert that"
            raise LearningError(f"{path}: '{name}' is {value!r}, which is not supported{about}", hint=hint)


def _check_fingerprint(path: Path, spec: ModelSpec, weights: Weights, force: bool) -> None:
    from safetensors import safe_open

    with safe_open(path, framework="np") as file:
        text = (file.metadata() or {}).get(FINGERPRINT_KEY)
    if text is None:  # not written by us
        _log.info(
            "the adapter does not say for which weights it was made; shapes are all that is checked", path=str(path)
        )
        return
    try:
        Fingerprint.parse(text, str(path)).check(Fingerprint.of(spec, weights), str(path))
    except LearningError as error:
        if not force:
            raise
        _log.warning("adapter of another model, forced", reason=error.message)


def _pairs(
    path: Path, tensors: Safetensors, known: Mapping[str, Module], spec: ModelSpec, weights: Weights
) -> Iterator[tuple[str, FloatArray, FloatArray]]:
    """Module, A ``[r, in]`` and B ``[out, r]`` of every delta in the file."""
    factors: dict[str, dict[str, FloatArray]] = {}
    for key in tensors:
        match = _ROLE.fullmatch(key.removeprefix(PREFIX))
        if match is None:
            _check_copy(path, key, tensors, spec, weights)
            continue
        name = match["module"]
        if name not in known:
            what = f"{path}: '{name}' is no linear layer of this model, so its delta has no place"
            raise LearningError(what, hint="the adapter was made for another model, or for its embedding")
        values = tensors[key].dequantize()
        if not np.isfinite(values).all():
            raise LearningError(f"{path}: '{key}' has values that are not finite")
        factors.setdefault(name, {})[match["factor"]] = values
    for name, both in factors.items():
        if len(both) < 2:
            raise LearningError(f"{path}: '{name}' has only one of its two factors", hint="the file is incomplete")
        a, b = both["A"], both["B"]
        rows, columns = known[name].shape
        if a.ndim != 2 or b.shape != (rows, len(a)) or a.shape[1] != columns:
            what = f"{path}: '{name}' is {rows} × {columns} in this model, but the factors are {b.shape} and {a.shape}"
            raise LearningError(what, hint="the adapter was made for another model")
        yield name, a, b


def _check_copy(path: Path, key: str, tensors: Safetensors, spec: ModelSpec, weights: Weights) -> None:
    """Let pass what PEFT adds of its own: the model's embeddings, unchanged, where ``lm_head`` has a delta."""
    name = key.removeprefix(PREFIX).removesuffix(".weight").removesuffix(".base_layer")
    if name not in (HEAD, "model.embed_tokens"):
        what = "DoRA is not supported" if "magnitude" in key else "it is neither A nor B of a linear layer"
        raise LearningError(f"{path}: the tensor '{key}' cannot be used: {what}")
    ours = output_projection(spec, weights) if name == HEAD else weights["embed"]
    theirs = tensors[key]
    if theirs.shape == ours.shape:
        off = size = 0.0
        for rows in pieces(ours):
            mine = ours.rows(*rows).dequantize()
            off += float(np.square(theirs.rows(*rows).dequantize() - mine, dtype=np.float64).sum())
            size += float(np.square(mine, dtype=np.float64).sum())
        if math.sqrt(off / size) <= _COPY_TOLERANCE:
            return
    what = f"{path}: '{key}' replaces the model's own embedding by another one, which is not supported"
    raise LearningError(what, hint="use the model that the adapter was made for")


def _scale(path: Path, config: Mapping[str, Any], module: str, rank: int) -> float:
    if not _covers(path, config.get("target_modules"), module):
        raise LearningError(f"{path}: 'target_modules' leaves out '{module}', but the weights have a delta for it")
    stated = _pattern(path, config, "rank_pattern", module, config.get("r"))
    alpha = _pattern(path, config, "alpha_pattern", module, config.get("lora_alpha"))
    if stated != rank:
        raise LearningError(f"{path}: the rank of '{module}' should be {stated}, but its factors have {rank}")
    if isinstance(alpha, bool) or not isinstance(alpha, (int, float)) or not math.isfinite(alpha):
        raise LearningError(f"{path}: the alpha of '{module}' should be a number, found {alpha!r}")
    return float(alpha) / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _pattern(path: Path, config: Mapping[str, Any], field: str, module: str, otherwise: Any) -> Any:
    """The value of the first key of a pattern that the end of the module's name matches, as PEFT finds it."""
    pattern = config.get(field) or {}
    if not isinstance(pattern, dict):
        raise LearningError(f"{path}: '{field}' should map names to numbers, found {pattern!r}")
    for key, value in pattern.items():
        if _matches(path, rf"(.*\.)?({key})", module):
            return value
    return otherwise


def _covers(path: Path, targets: Any, module: str) -> bool:
    if isinstance(targets, str):
        return targets == "all-linear" or _matches(path, targets, module)
    return isinstance(targets, list) and any(module == one or module.endswith(f".{one}") for one in targets)


def _matches(path: Path, pattern: str, module: str) -> bool:
    try:
        return re.fullmatch(pattern, module) is not None
    except re.error as error:
        raise LearningError(f"{path}: {pattern!r} is no regular expression: {error}") from None


def _split(spec: ModelSpec, module: Module, delta: LowRank) -> dict[str, LowRank]:
    """The deltas of the parts of a module, without the ranks that do nothing in a part."""
    found = {}
    for site, (start, stop) in module.parts.items():
        b = delta.b[start:stop]
        if (order := hf_order(spec, site)) is not None:
            ours = np.empty_like(b)
            ours[order] = b
            b = ours
        used = np.ones(len(delta.a), bool) if len(module.parts) == 1 else b.any(axis=0)
        if used.any():
            found[site] = LowRank(np.ascontiguousarray(delta.a[used]), np.ascontiguousarray(b[:, used]), delta.scale)
    return found


def _final(path: Path, delta: LowRank, head: QuantTensor) -> LowRank:
    """The ``final`` delta that does what `delta` does to the output projection W: the B for which W·B is its B."""
    # Every row of W is one equation for B; a few times as many as there are unknowns are enough, and all are checked.
    step = max(head.num_rows // (4 * head.columns), 1)
    data = np.ascontiguousarray(head.data[::step])
    some, wanted = QuantTensor(head.scheme, (len(data), head.columns), data), delta.b[::step].astype(np.float64)
    gram, seen = np.zeros((head.columns, head.columns)), np.zeros((head.columns, len(delta.a)))
    for start, stop in pieces(some):
        w = some.rows(start, stop).dequantize().astype(np.float64)
        gram += w.T @ w
        seen += w.T @ wanted[start:stop]
    gram += 1e-12 * np.trace(gram) / len(gram) * np.eye(len(gram))  # a direction that W ignores gets nothing
    b = np.linalg.solve(gram, seen).astype(np.float32)
    size = float(np.linalg.norm(delta.b.astype(np.float64)))
    off = float(np.linalg.norm(through_head(head, b) - delta.b))
    if off > _HEAD_TOLERANCE * size:
        what = f"{path}: {off / size:.0%} of the delta of '{HEAD}' cannot be had by changing hidden states"
        raise LearningError(what, hint=f"train the adapter without '{HEAD}', or merge it into its model with PEFT")
    return LowRank(delta.a, b, delta.scale)
