"""`Recipe`: which tensor of a model gets which scheme.

A plain scheme name (``q4_k``) encodes every matrix alike. A mixed recipe (``q4_k_m``) spends more bits where errors
cost most: the output matrix, and in some layers the value projection and the feed-forward's second matrix. Norms,
biases and other vectors stay f32. The choices are those of llama.cpp's recipes of the same names, so files compare.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType, SimpleNamespace

import numpy as np
import numpy.typing as npt

from ruvllm_core.model.quant import SCHEMES, QuantTensor

from .encode import quantize

_LAYER = re.compile(r"blk\.(\d+)\.(\w+)\.weight")
_KEPT = re.compile(r"norm|ffn_gate_inp|rope_freqs")
_FALLBACKS = {"q2_k": "q4_0", "q3_k": "q4_0", "q4_k": "q5_0", "q5_k": "q5_1", "q6_k": "q8_0"}

LayerTest = Callable[[int, int], bool]  # of a layer's index and the number of layers
Rules = Mapping[str, tuple[tuple[str, LayerTest], ...]]  # tensor role → the first (scheme, test) that holds


def _every(layer: int, count: int) -> bool:
    return True


def _more_bits(layer: int, count: int) -> bool:
    """The first and last eighth of the layers, and every third in between."""
    eighth = count // 8
    return layer < eighth or layer >= 7 * count // 8 or (layer - eighth) % 3 == 2


def _first(fraction: int) -> LayerTest:
    return lambda layer, count: layer < count // fraction


@dataclass(frozen=True)
class Recipe:
    """A quantizer: a base scheme, and rules that raise certain tensors above it.

    Attributes:
        name: what users select it by.
        file_type: GGUF's ``general.file_type``.
        base: scheme of every matrix that no rule names.
        output: scheme of ``output.weight``. A tied embedding doubles as output matrix: ask for it by that name.
        rules: by tensor role, as in ``attn_v``.
    """

    name: str
    file_type: int
    base: str
    output: str
    rules: Rules = field(default_factory=dict)

    def scheme_for(self, tensor_name: str, shape: tuple[int, ...], num_layers: int) -> str:
        """The scheme of a tensor by its GGUF name; one with smaller blocks where rows do not fill whole blocks."""
        if len(shape) < 2 or not tensor_name.endswith(".weight") or _KEPT.search(tensor_name):
            return "f32"
        scheme = self.output if tensor_name == "output.weight" else self.base
        if match := _LAYER.fullmatch(tensor_name):
            layer, role = int(match[1]), match[2]
            scheme = next((s for s, holds in self.rules.get(role, ()) if holds(layer, num_layers)), scheme)
            if self.name == "q2_k" and role == "attn_v" and shape[1] >= 4 * shape[0]:
                scheme = "q4_k"  # four or more query heads share a value head, so it is small and matters more
        if shape[-1] % SCHEMES[scheme].block_size:
            scheme = _FALLBACKS.get(scheme, "f16")
        return scheme if shape[-1] % SCHEMES[scheme].block_size == 0 else "f16"

    def quantize(self, values: npt.NDArray[np.float32], scheme: str, *, name: str = "") -> QuantTensor:
        """Encode ``[rows, columns]`` floats; see `ruvllm_quantizers.encode.quantize`."""
        return quantize(values, scheme, name=name)


def _pure(scheme: str, file_type: int) -> Recipe:
    return Recipe(scheme, file_type, scheme, scheme)


def _mixed(name: str, file_type: int, base: str, **raised: tuple[tuple[str, LayerTest], ...]) -> Recipe:
    return Recipe(name, file_type, base, "q6_k", MappingProxyType(raised))


_Q6_MORE = (("q6_k", _more_bits),)
_ALL = (
    _pure("f32", 0),
    _pure("f16", 1),
    _pure("bf16", 32),
    _mixed("q4_0", 2, "q4_0"),
    _mixed("q4_1", 3, "q4_1"),
    _mixed("q5_0", 8, "q5_0"),
    _mixed("q5_1", 9, "q5_1"),
    _pure("q8_0", 7),
    _mixed(
        "q2_k", 10, "q2_k", attn_v=(("q3_k", _every),), attn_output=(("q3_k", _every),), ffn_down=(("q3_k", _every),)
    ),
    _pure("q3_k", 11),
    _mixed("q3_k_s", 11, "q3_k"),
    _mixed(
        "q3_k_m",
        12,
        "q3_k",
        attn_v=(("q5_k", lambda layer, _: layer < 2), ("q4_k", _every)),
        attn_qkv=(("q4_k", _every),),
        attn_output=(("q4_k", _every),),
        ffn_down=(("q5_k", _first(16)), ("q4_k", _every)),
    ),
    _mixed(
        "q3_k_l",
        13,
        "q3_k",
        attn_v=(("q5_k", _every),),
        attn_qkv=(("q4_k", _every),),
        attn_output=(("q5_k", _every),),
        ffn_down=(("q5_k", _every),),
    ),
    _pure("q4_k", 14),
    _mixed("q4_k_s", 14, "q4_k", attn_v=(("q5_k", lambda layer, _: layer < 4),), ffn_down=(("q5_k", _first(8)),)),
    _mixed("q4_k_m", 15, "q4_k", attn_v=_Q6_MORE, attn_qkv=(("q5_k", _every),), ffn_down=_Q6_MORE),
    _pure("q5_k", 16),
    _mixed("q5_k_s", 16, "q5_k"),
    _mixed("q5_k_m", 17, "q5_k", attn_v=_Q6_MORE, attn_qkv=(("q6_k", _every),), ffn_down=_Q6_MORE),
    _pure("q6_k", 18),
)
#: Every recipe, as an attribute of its name.
RECIPES = SimpleNamespace(**{recipe.name: recipe for recipe in _ALL})
