"""From a ``config.json`` or GGUF metadata to the fields of `ModelSpec` that all Llama-like families share.

Field names follow the Hugging Face configuration classes and the GGUF specification (docs/gguf.md of the GGML
project); the meaning of the rotary scaling fields follows ``modeling_rope_utils`` of transformers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import numpy as np

from ruvllm_core.errors import ModelError, near
from ruvllm_core.model.spec import Activation, RopeKind, RopeScaling
from ruvllm_core.protocols import TensorLookup

T = TypeVar("T")

_ACTIVATIONS: dict[str, Activation] = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
}
_SCALINGS: dict[str, RopeKind] = {"linear": "linear", "yarn": "yarn", "longrope": "longrope"}
_HF_ROPE_KINDS: dict[str, RopeKind] = {**_SCALINGS, "default": "none", "llama3": "llama3", "su": "longrope"}
_GGUF_ROPE_KINDS: dict[str, RopeKind] = {**_SCALINGS, "none": "none"}


class Fields:
    """Typed look-ups in a parsed mapping, where null means missing.

    Every method raises `ModelError` naming the field if its value is of another type, or missing without a default.
    """

    def __init__(self, values: Mapping[str, Any], prefix: str = "", label: str = "") -> None:
        """`prefix` is put before every name that is looked up, `label` before every name in a message."""
        self._values, self._prefix, self._label = values, prefix, label + prefix

    def raw(self, name: str) -> Any:
        """The value as it is, or None."""
        return self._values.get(self._prefix + name)

    def section(self, name: str) -> Fields:
        """The mapping nested under `name`; an empty one if it is missing."""
        value = self._get(name, "an object", lambda value: isinstance(value, Mapping), {})
        return Fields(value, label=f"{self._label}{name}.")

    def integer(self, name: str, default: int | None = None) -> int:
        return int(self._get(name, "an integer", lambda value: _is_number(value) and value == int(value), default))

    def number(self, name: str, default: float | None = None) -> float:
        return float(self._get(name, "a finite number", _is_number, default))

    def maybe_number(self, name: str) -> float | None:
        return None if self.raw(name) is None else self.number(name)

    def flag(self, name: str, default: bool) -> bool:
        return bool(self._get(name, "true or false", lambda value: isinstance(value, bool), default))

    def text(self, name: str, default: str | None = None) -> str:
        return str(self._get(name, "a string", lambda value: isinstance(value, str), default))

    def choice(self, name: str, default: str, choices: Mapping[str, T]) -> T:
        """What `choices` has for the string found. Raises `ModelError` also for one that it does not have."""
        value = self.text(name, default)
        if value not in choices:
            raise ModelError(f"the {self._label}{name} {value!r} is not supported", hint=near(value, choices))
        return choices[value]

    def numbers(self, name: str) -> tuple[float, ...]:
        value = self._get(name, "a list of numbers", lambda v: isinstance(v, list) and all(map(_is_number, v)), None)
        return tuple(map(float, value))

    def _get(self, name: str, expected: str, test: Callable[[Any], bool], default: Any) -> Any:
        value = self.raw(name)
        if value is None and default is None:
            raise ModelError(
                f"the field '{self._label}{name}' ({expected}) is missing",
                hint="the model is of another family, or its files are incomplete: download it again",
            )
        if value is not None and not test(value):
            found = repr(value) if isinstance(value, bool | int | float | str) else type(value).__name__
            raise ModelError(f"the field '{self._label}{name}' should be {expected}, found {found:.60}")
        return default if value is None else value


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) < 2.0**63  # false for NaN, too


def hf_common(config: Mapping[str, Any]) -> dict[str, Any]:
    """Sizes, norm, activation, embeddings and rotary positions of a parsed ``config.json``, as `ModelSpec` fields."""
    fields = Fields(config)
    hidden, heads = fields.integer("hidden_size"), fields.integer("num_attention_heads")
    head_dim = fields.integer("head_dim", hidden // max(heads, 1))
    return {
        "vocab_size": fields.integer("vocab_size"),
        "hidden_size": hidden,
        "intermediate_size": fields.integer("intermediate_size"),
        "num_layers": fields.integer("num_hidden_layers"),
        "num_heads": heads,
        "num_kv_heads": fields.integer("num_key_value_heads", heads),
        "head_dim": head_dim,
        "norm_eps": fields.number("rms_norm_eps"),
        "max_context": fields.integer("max_position_embeddings"),
        "activation": fields.choice("hidden_act", "silu", _ACTIVATIONS),
        "tied_embeddings": fields.flag("tie_word_embeddings", False),
        **_hf_rope(fields, head_dim),
    }


def _hf_rope(config: Fields, head_dim: int) -> dict[str, Any]:
    """From ``rope_scaling`` beside ``rope_theta``, or from ``rope_parameters``, which transformers 5 writes instead."""
    rope = config.section("rope_scaling" if config.raw("rope_scaling") else "rope_parameters")
    theta = rope.number("rope_theta", config.number("rope_theta", 10000.0))
    rotated = rope.number("partial_rotary_factor", config.number("partial_rotary_factor", 1.0))
    if not 0.0 < rotated <= 1.0:
        raise ModelError(f"partial_rotary_factor is {rotated}, but must be above 0 and at most 1")
    max_context = config.integer("max_position_embeddings")
    kind = rope.choice("rope_type", rope.text("type", "default"), _HF_ROPE_KINDS)
    trained = "original_max_position_embeddings"
    original = config.integer(trained, rope.integer(trained, max_context))
    longer = max_context / max(original, 1)
    numbers: dict[RopeKind, dict[str, float | None]] = {  # the numbers of each kind; None has no default
        "none": {},
        "linear": {"factor": None},
        "llama3": {"factor": None, "low_freq_factor": None, "high_freq_factor": None},
        "yarn": {"factor": longer, "beta_fast": 32.0, "beta_slow": 1.0},
        "longrope": {"factor": longer},
    }
    values: dict[str, Any] = {name: rope.number(name, default) for name, default in numbers[kind].items()}
    if kind in ("yarn", "longrope"):
        values["attention_factor"] = rope.maybe_number("attention_factor")
    if kind == "longrope":
        values |= {"short_factors": rope.numbers("short_factor"), "long_factors": rope.numbers("long_factor")}
    for unsupported in ("mscale", "mscale_all_dim", "truncate"):
        if kind == "yarn" and rope.raw(unsupported) is not None:
            raise ModelError(f"the yarn field '{unsupported}' in the rope scaling is not supported")
    scaling = RopeScaling(kind, original_context=original, **values)
    return {"rope_theta": theta, "rope_dim": int(head_dim * rotated), "rope_scaling": scaling}


def gguf_common(metadata: Mapping[str, Any], tensor: TensorLookup) -> dict[str, Any]:
    """Sizes, norm, embeddings, windows and rotary positions of a GGUF file, as `ModelSpec` fields.

    The vocabulary is as large as the embedding; embeddings are tied where the file has no output tensor.
    """
    fields = Fields(metadata, Fields(metadata).text("general.architecture") + ".")
    if fields.integer("expert_count", 0):
        raise ModelError(f"models with experts are not supported (expert_count is {fields.raw('expert_count')})")
    embedding = tensor("token_embd.weight")
    if embedding is None:
        raise ModelError("the tensor 'token_embd.weight' is missing", hint="the file is incomplete or not a text model")
    hidden, heads = fields.integer("embedding_length"), fields.integer("attention.head_count")
    head_dim = fields.integer("attention.key_length", hidden // max(heads, 1))
    if fields.integer("attention.value_length", head_dim) != head_dim:
        raise ModelError("heads whose keys and values differ in width are not supported (attention.value_length)")
    window = fields.integer("attention.sliding_window", 0)  # 0 is how converters say that there is none
    return {
        "vocab_size": embedding.shape[0],
        "hidden_size": hidden,
        "intermediate_size": fields.integer("feed_forward_length"),
        "num_layers": fields.integer("block_count"),
        "num_heads": heads,
        "num_kv_heads": fields.integer("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "norm_eps": fields.number("attention.layer_norm_rms_epsilon"),
        "max_context": fields.integer("context_length"),
        "tied_embeddings": tensor("output.weight") is None,
        "sliding_window": window or None,
        "sliding_layers": _sliding_pattern(fields) if window else (),
        "rope_theta": fields.number("rope.freq_base", 10000.0),
        "rope_dim": fields.integer("rope.dimension_count", head_dim),
        "rope_scaling": _gguf_rope(fields, tensor),
    }


def _sliding_pattern(fields: Fields) -> tuple[bool, ...]:
    pattern = fields.raw("attention.sliding_window_pattern")
    if pattern is None:
        return ()
    if not isinstance(pattern, np.ndarray) or pattern.dtype != np.bool_:
        raise ModelError(f"attention.sliding_window_pattern should say of each layer true or false, found {pattern!r}")
    return tuple(map(bool, pattern))


def _gguf_rope(fields: Fields, tensor: TensorLookup) -> RopeScaling:
    short, long = _factors(tensor, "rope_factors_short.weight"), _factors(tensor, "rope_factors_long.weight")
    kind = fields.choice("rope.scaling.type", "none", _GGUF_ROPE_KINDS)
    if long:  # older converters write the factors of longrope without naming it
        kind = "longrope"
    if kind == "longrope" and not (short and long):
        raise ModelError("longrope needs the tensors 'rope_factors_short.weight' and 'rope_factors_long.weight'")
    if fields.number("rope.scaling.yarn_log_multiplier", 0.0) or fields.number("attention.temperature_scale", 0.0):
        raise ModelError("scaling attention by position (attention.temperature_scale) is not supported")
    context = fields.integer("context_length")
    original = fields.integer("rope.scaling.original_context_length", context)
    factor = context / max(original, 1) if kind == "longrope" else fields.number("rope.scaling.factor", 1.0)
    attention = fields.maybe_number("rope.scaling.yarn_attn_factor")
    if attention is None and (multiplier := fields.maybe_number("rope.scaling.attn_factor")) is not None:
        # For yarn this multiplies the factor of its own rule; elsewhere it is the whole factor.
        attention = multiplier * (0.1 * math.log(factor) + 1.0 if kind == "yarn" and factor > 1.0 else 1.0)
    frequencies = _factors(tensor, "rope_freqs.weight")
    if frequencies and kind != "none":
        raise ModelError(f"the tensor 'rope_freqs.weight' together with {kind} rope scaling is not supported")
    return RopeScaling(
        kind=kind,
        factor=factor,
        original_context=original,
        beta_fast=fields.number("rope.scaling.yarn_beta_fast", 32.0),
        beta_slow=fields.number("rope.scaling.yarn_beta_slow", 1.0),
        attention_factor=attention,
        freq_factors=frequencies,
        short_factors=short,
        long_factors=long,
    )


def _factors(tensor: TensorLookup, name: str) -> tuple[float, ...]:
    found = tensor(name)
    if found is None:
        return ()
    values = found.dequantize().reshape(-1)
    if not (np.isfinite(values).all() and (values > 0).all()):
        raise ModelError(f"the tensor '{name}' should hold positive factors")
    return tuple(values.tolist())
