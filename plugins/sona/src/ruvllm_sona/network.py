"""`Network`: a model that gradients flow through, its own weights frozen, adapters at every linear layer.

The mathematics is that of the core's eager decoder, without a cache: a padded batch of whole texts. It is cut at
layers, so that whoever runs it can stop between two of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ruvllm_core.decode.reference import rope as rotated
from ruvllm_core.decode.rope import rope_tables
from ruvllm_core.machine import available_memory
from ruvllm_core.model.quant import QuantTensor
from ruvllm_core.model.spec import ModelSpec
from ruvllm_core.protocols import Weights
from ruvllm_sona.adapters import AdapterStack
from ruvllm_sona.frozen import FrozenLinear

#: What mixes values, given a layer's number, queries ``[G, H, T, D]``, keys and values ``[G, K, T, D]``.
Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]
_NO_ADAPTERS = AdapterStack({}, {})
_FUSED = {
    "attn.qkv": ("attn.q", "attn.k", "attn.v"),
    "attn.o": ("attn.o",),
    "mlp.gate_up": ("mlp.gate", "mlp.up"),
    "mlp.down": ("mlp.down",),
}


class Network:
    """A model for training adapters. Arrays are ``[G, T, C]``: G rows, padded on the right to T tokens.

    Args:
        spec: the model.
        weights: its weights by canonical name.
        device: where to compute.
        dtype: of products with weights; None is bfloat16 where the processor multiplies it, else float32. Everything
            else, adapters and the residual stream too, is float32.
        resident: keep decoded weights in memory; None does so if half of what is free has room for them. Otherwise they
            are decoded every time they are used, which is slower and takes no memory.
    """

    def __init__(
        self,
        spec: ModelSpec,
        weights: Weights,
        *,
        device: str = "cpu",
        dtype: torch.dtype | None = None,
        resident: bool | None = None,
    ) -> None:
        self.spec, self.device = spec, torch.device(device)
        self.dtype = dtype if dtype is not None else fast_dtype(self.device)
        if resident is None:
            resident = self.device.type != "cpu" or spec.parameters * self.dtype.itemsize <= available_memory() // 2
        self._resident = resident
        self._weights = weights
        self._widths = [spec.num_heads, spec.num_kv_heads, spec.num_kv_heads]
        self._layers = [self._layer(n) for n in range(spec.num_layers)]
        self._final_norm = self._vector("final_norm")
        self._embed: QuantTensor = weights["embed"]
        head = weights["embed" if spec.tied_embeddings else "lm_head"]
        self._head = FrozenLinear([head], [], self.device, self.dtype, resident)
        self._rope: dict[int, tuple[Tensor, Tensor]] = {}

    def load(self) -> Iterator[None]:
        """Decode all weights that are to be kept, a piece at a time; until that is done, computing is slower."""
        for linear in (self._head, *(one for layer in self._layers for one in layer.values())):
            if isinstance(linear, FrozenLinear):
                yield from linear.load()

    def _layer(self, n: int) -> dict[str, FrozenLinear | Tensor]:
        prefix = f"layers.{n}."
        layer: dict[str, FrozenLinear | Tensor] = {
            norm: self._vector(prefix + norm) for norm in ("attn_norm", "mlp_norm")
        }
        for name, parts in _FUSED.items():
            tensors = [self._weights[prefix + part] for part in parts]
            biases = [self._vector(f"{prefix}{part}.bias") for part in parts if f"{prefix}{part}.bias" in self._weights]
            layer[name] = FrozenLinear(tensors, biases, self.device, self.dtype, self._resident)
        return layer

    def embed(self, tokens: Tensor) -> Tensor:
        """Token ids int64 ``[G, T]`` to float32 ``[G, T, C]``."""
        if (weight := self._head.weight) is not None and self.spec.tied_embeddings and self._head.exact:
            return F.embedding(tokens, weight)
        found, places = torch.unique(tokens, return_inverse=True)
        picked = self._embed.data[found.cpu().numpy()]
        rows = QuantTensor(self._embed.scheme, (len(found), self._embed.columns), picked).dequantize()
        return torch.from_numpy(rows).to(self.device)[places]

    def layer(
        self,
        n: int,
        x: Tensor,
        rope: tuple[Tensor, Tensor],
        adapters: AdapterStack = _NO_ADAPTERS,
        attend: Attend | None = None,
    ) -> Tensor:
        """Layer `n` of the residual stream; `rope` comes from `rope`, `attend` is causal attention unless given."""
        layer, spec, prefix = self._layers[n], self.spec, f"layers.{n}."
        normed = self._norm(x, layer["attn_norm"])
        widths = [width * spec.head_dim for width in self._widths]
        parts = self._linear(layer["attn.qkv"], normed).split(widths, -1)  # type: ignore[no-untyped-call]
        query, key, value = (
            adapters.add(prefix + site, normed, part).unflatten(-1, (-1, spec.head_dim)).transpose(1, 2)  # type: ignore[no-untyped-call]
            for site, part in zip(_FUSED["attn.qkv"], parts, strict=True)
        )
        query, key = (rotated(one, *rope, spec.rope_interleaved) for one in (query, key))
        mixed = (attend or self.causal)(n, query, key, value).transpose(1, 2).flatten(2)
        x = x + adapters.add(prefix + "attn.o", mixed, self._linear(layer["attn.o"], mixed))
        normed = self._norm(x, layer["mlp_norm"])
        halves = self._linear(layer["mlp.gate_up"], normed).chunk(2, -1)
        gate, up = (
            adapters.add(prefix + site, normed, half) for site, half in zip(_FUSED["mlp.gate_up"], halves, strict=True)
        )
        gated = self._activate(gate) * up
        return x + adapters.add(prefix + "mlp.down", gated, self._linear(layer["mlp.down"], gated))

    def norm(self, x: Tensor, adapters: AdapterStack = _NO_ADAPTERS) -> Tensor:
        """Hidden states after the last norm, with the ``final`` adapter."""
        hidden = self._norm(x, self._final_norm)
        return adapters.add("final", hidden, hidden)

    def logits(self, hidden: Tensor) -> Tensor:
        """Output projection, float32 ``[…, V]``."""
        out = self._linear(self._head, hidden)
        cap = self.spec.logit_softcap
        return out if cap is None else cap * torch.tanh(out / cap)

    def hidden(self, tokens: Tensor, adapters: AdapterStack = _NO_ADAPTERS) -> Tensor:
        """All of it at once: token ids ``[G, T]`` to ``[G, T, C]``."""
        x, rope = self.embed(tokens), self.rope(tokens.shape[1])
        for n in range(self.spec.num_layers):
            x = self.layer(n, x, rope, adapters)
        return self.norm(x, adapters)

    def rope(self, length: int, positions: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """cos and sin for positions 0 … `length` - 1, or ``[G, T]`` of them; ``[1 or G, T, rope_dim / 2]``."""
        variant = self.spec.rope_variant(length)
        if variant not in self._rope or len(self._rope[variant][0]) < length:
            room = min(max(256, 2 * length), max(self.spec.max_context, length))
            cos, sin = (torch.from_numpy(table).to(self.device) for table in rope_tables(self.spec, variant, room))
            self._rope[variant] = cos, sin
        cos, sin = self._rope[variant]
        if positions is None:
            return cos[None, :length], sin[None, :length]
        return cos[positions], sin[positions]

    def causal(self, n: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Causal attention within each row, ``[G, H, T, D]``; padding on the right is seen by nobody before it."""
        spec, group, length = self.spec, self.spec.num_heads // self.spec.num_kv_heads, query.shape[2]
        if group > 1:
            key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
        window = spec.window_of(n)
        if spec.attention_softcap is None and (window is None or window >= length):
            return F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=spec.scale)
        at = torch.arange(length, device=query.device)
        seen = at[:, None] >= at
        if window is not None:
            seen &= at[:, None] - at < window
        return self.masked(query, key, value, seen)

    def apart(self, ends: Sequence[int]) -> Attend:
        """Causal attention within each of several texts that are one row, and end there."""
        parts = [slice(*both) for both in zip((0, *ends), ends, strict=False)]

        def attend(n: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            return torch.cat([self.causal(n, query[:, :, at], key[:, :, at], value[:, :, at]) for at in parts], 2)

        return attend

    def masked(self, query: Tensor, key: Tensor, value: Tensor, seen: Tensor) -> Tensor:
        """Attention where `seen`, a boolean that broadcasts to ``[G, H, T, S]``; keys are there for every head."""
        scores = (query @ key.transpose(-1, -2)) * self.spec.scale
        if (cap := self.spec.attention_softcap) is not None:
            scores = cap * torch.tanh(scores / cap)
        return torch.softmax(scores.masked_fill(~seen, float("-inf")), -1) @ value

    def _activate(self, gate: Tensor) -> Tensor:
        if self.spec.activation == "silu":
            return F.silu(gate)
        return F.gelu(gate, approximate="tanh" if self.spec.activation == "gelu_tanh" else "none")

    def _norm(self, x: Tensor, weight: FrozenLinear | Tensor) -> Tensor:
        assert isinstance(weight, Tensor)
        return F.rms_norm(x, (x.shape[-1],), weight, self.spec.norm_eps)

    def _linear(self, layer: FrozenLinear | Tensor, x: Tensor) -> Tensor:
        assert isinstance(layer, FrozenLinear)
        return layer(x)

    def _vector(self, name: str) -> Tensor:
        return torch.from_numpy(self._weights[name].dequantize().copy()).to(self.device)


def padded(texts: Sequence[Sequence[int]], device: str | torch.device = "cpu") -> Tensor:
    """Token ids as int64 ``[G, T]``, padded on the right with 0."""
    length = max(map(len, texts))
    return torch.tensor([[*text, *[0] * (length - len(text))] for text in texts], device=device)


def fast_dtype(device: torch.device) -> torch.dtype:
    """What products are fastest in, and still exact enough for gradients: bfloat16 if there are instructions for it."""
    if device.type == "cpu":
        return torch.bfloat16 if torch.ops.mkldnn._is_mkldnn_bf16_supported() else torch.float32
    return torch.bfloat16 if device.type == "cuda" else torch.float32
