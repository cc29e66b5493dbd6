"""The operations an eager decoder is made of. A kernel provider may replace any of them.

Arrays are torch tensors on the provider's device. T tokens, C hidden size, H/K query/key-value heads, D head size.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

from ruvllm_core.errors import PluginError, near

if TYPE_CHECKING:
    from torch import Tensor

    from ruvllm_core.decode.kv import KVView
    from ruvllm_core.model.quant import QuantTensor


@dataclass(frozen=True)
class AttentionInput:
    """One layer's attention over a ragged batch.

    Attributes:
        query: ``[T, H, D]``, rotated.
        layer: which layer's storage to read.
        view: segments, with the keys and values of these very tokens already in.
        cu_q: sequence b owns tokens ``cu_q[b]:cu_q[b+1]``.
        positions: of each sequence's first query token.
        scale: multiplies ``q·k``.
        window: a query sees this many last positions; None is all.
        softcap: ``c * tanh(score / c)``; None is off.
    """

    query: Tensor
    layer: int
    view: KVView
    cu_q: Sequence[int]
    positions: Sequence[int]
    scale: float
    window: int | None
    softcap: float | None


@dataclass(frozen=True)
class Ops:
    """The table.

    Attributes:
        prepare: tensors of equal width, stacked by rows, into whatever `linear` and `embed` take as a weight. Who
            replaces `prepare` replaces those two as well.
        linear: ``(x [T, in], weight) -> [T, out]``.
        embed: ``(weight, tokens [T]) -> [T, C]``.
        rms_norm: ``(x [T, C], weight [C], eps) -> [T, C]`` (arXiv 1910.07467).
        add_rms_norm: ``(x, residual, weight, eps) -> (x + residual, rms_norm of it)``.
        rope: ``(x [T, heads, D], cos [T, d/2], sin [T, d/2], interleaved) -> [T, heads, D]``, first d of D rotated.
        kv_append: ``(view, layer, key [T, K, D], value [T, K, D])`` writes at the view's slots.
        attention: `AttentionInput` ``-> [T, H, D]``; causal, softmax over all segments at once.
        gated: ``(gate_up [T, 2I], activation) -> [T, I]``, ``act(gate) * up``.
    """

    prepare: Callable[[Sequence[QuantTensor]], Any]
    linear: Callable[[Tensor, Any], Tensor]
    embed: Callable[[Any, Tensor], Tensor]
    rms_norm: Callable[[Tensor, Tensor, float], Tensor]
    add_rms_norm: Callable[[Tensor, Tensor, Tensor, float], tuple[Tensor, Tensor]]
    rope: Callable[[Tensor, Tensor, Tensor, bool], Tensor]
    kv_append: Callable[[KVView, int, Tensor, Tensor], None]
    attention: Callable[[AttentionInput], Tensor]
    gated: Callable[[Tensor, str], Tensor]

    def with_replacements(self, replacements: Mapping[str, Callable[..., Any]]) -> Ops:
        """These operations with some replaced. Raises `PluginError` for a name that is none of them."""
        known = [field.name for field in fields(self)]
        for name in replacements:
            if name not in known:
                raise PluginError(f"a kernel provider offers an unknown operation {name!r}", hint=near(name, known))
        trio = {"prepare", "linear", "embed"}
        if "prepare" in replacements and not trio <= set(replacements):
            raise PluginError("a kernel provider that replaces prepare must replace linear and embed too")
        return replace(self, **replacements)
