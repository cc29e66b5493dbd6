"""The eager decoder: any `ModelSpec`, one operation after the other, over a table of operations."""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor

from ruvllm_core.decode.batch import Batch
from ruvllm_core.decode.coded import coded_storage
from ruvllm_core.decode.kv import STORE_BITS, KVStorage
from ruvllm_core.decode.lora import apply_final
from ruvllm_core.decode.ops import AttentionInput
from ruvllm_core.decode.reference import DTYPES, pick_device, reference_ops, rope
from ruvllm_core.decode.rope import rope_tables
from ruvllm_core.log import get_logger
from ruvllm_core.machine import available_memory, require_memory, usable_cpus
from ruvllm_core.model.spec import ModelSpec
from ruvllm_core.protocols import Adapter, DecoderOptions, FloatArray, KernelProvider, Weights

_log = get_logger("decoder")


class EagerDecoder:
    """Executes a model with a provider's operations; PyTorch's fill the gaps. See `ruvllm_core.protocols.Decoder`.

    Weights are held unquantized in the arithmetic type, so that each is decoded once and not once a token.
    Raises `OutOfMemoryError` if they do not fit.
    """

    def __init__(self, spec: ModelSpec, weights: Weights, provider: KernelProvider, options: DecoderOptions) -> None:
        self.spec = spec
        self._device = torch.device(pick_device(options))
        # PyTorch knows OMP_NUM_THREADS, but not the limits of a control group.
        torch.set_num_threads(options.threads or min(torch.get_num_threads(), usable_cpus()))
        self._dtype = _pick_dtype(spec, options, self._device)
        self.kv_schemes = (*sorted(DTYPES, key=lambda scheme: DTYPES[scheme] != self._dtype), *STORE_BITS)
        self._ops = reference_ops(self._device, self._dtype).with_replacements(provider.ops())
        self._embed: Any = self._ops.prepare([weights["embed"]])
        self._head: Any = self._embed if spec.tied_embeddings else self._ops.prepare([weights["lm_head"]])
        self._final_norm: Any = self._tensor(weights["final_norm"].dequantize())
        self._heads = [spec.num_heads, spec.num_kv_heads, spec.num_kv_heads]
        self._sites: dict[str, list[tuple[str, int, int]]] = {}
        for name, parts in _FUSED.items():
            stops = np.cumsum([weights[f"layers.0.{part}"].num_rows for part in parts]).tolist()
            self._sites[name] = list(zip(parts, [0, *stops[:-1]], stops, strict=True))
        self._layers = [self._load_layer(weights, f"layers.{n}.") for n in range(spec.num_layers)]
        self._rope: dict[int, tuple[Tensor, Tensor]] = {}
        self._max_context = options.max_context
        self._deltas: WeakKeyDictionary[Adapter, dict[str, tuple[Tensor, Tensor, float]]] = WeakKeyDictionary()

    def allocate_kv(self, num_blocks: int, block_size: int, scheme: str) -> KVStorage:
        spec = self.spec
        if scheme in STORE_BITS:
            # Which of two tables turned a key is not known here; no model with both has a key bias.
            centered = spec.qkv_bias and spec.rope_scaling.kind != "longrope"
            center = self._key_bias if centered else None
            return coded_storage(spec, num_blocks, block_size, scheme, self._device, center)
        dtype = DTYPES[scheme]
        shape = (num_blocks, spec.num_kv_heads, block_size, spec.head_dim)
        nbytes = 2 * spec.num_layers * int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
        keys, values = ([_zeros(shape, dtype, self._device) for _ in range(spec.num_layers)] for _ in range(2))
        return KVStorage(scheme, num_blocks, block_size, keys, values, nbytes)

    @torch.inference_mode()
    def forward(self, batch: Batch) -> FloatArray:
        ops, spec, eps = self._ops, self.spec, self.spec.norm_eps
        tokens = torch.from_numpy(batch.tokens).to(self._device)
        cos, sin = self._rope_rows(batch)
        cu_q = batch.cu_q.tolist()
        starts = batch.positions[batch.cu_q[:-1]].tolist()
        residual = ops.embed(self._embed, tokens)
        x = ops.rms_norm(residual, self._layers[0]["attn_norm"], eps)
        for n, layer in enumerate(self._layers):
            qkv = self._linear(x, n, "attn.qkv", batch)
            query, key, value = torch.split(qkv.view(len(tokens), -1, spec.head_dim), self._heads, 1)
            query = ops.rope(query, cos, sin, spec.rope_interleaved)
            ops.kv_append(batch.kv, n, ops.rope(key, cos, sin, spec.rope_interleaved), value)
            call = AttentionInput(
                query, n, batch.kv, cu_q, starts, spec.scale, spec.window_of(n), spec.attention_softcap
            )
            x = self._linear(ops.attention(call).reshape(len(tokens), -1), n, "attn.o", batch)
            residual, x = ops.add_rms_norm(x, residual, layer["mlp_norm"], eps)
            x = ops.gated(self._linear(x, n, "mlp.gate_up", batch), spec.activation)
            x = self._linear(x, n, "mlp.down", batch)
            if n + 1 == spec.num_layers:
                rows = torch.from_numpy(batch.rows).to(self._device)
                residual, x = ops.add_rms_norm(x[rows], residual[rows], self._final_norm, eps)
            else:
                residual, x = ops.add_rms_norm(x, residual, self._layers[n + 1]["attn_norm"], eps)
        return _to_host(x)

    @torch.inference_mode()
    def logits(self, hidden: FloatArray, batch: Batch | None = None) -> FloatArray:
        if batch is not None:
            hidden = apply_final(hidden, batch)
        x = torch.from_numpy(hidden).to(self._device, self._dtype)
        out = self._ops.linear(x, self._head).float()
        if (cap := self.spec.logit_softcap) is not None:
            out = cap * torch.tanh(out / cap)
        return _to_host(out)

    def close(self) -> None:
        self._embed = self._head = self._final_norm = None
        self._layers.clear()
        self._rope.clear()

    def _key_bias(self, layer: int, positions: Tensor) -> Tensor:
        """The bias as it stands in keys at `positions`, ``[M, K, D]``; in float32, as stored keys have more of it."""
        bias = self._layers[layer]["attn.qkv.bias"].view(-1, self.spec.head_dim)[slice(*np.cumsum(self._heads)[:2])]
        cos, sin = (table[positions.to(self._device)] for table in self._rope_table(0))
        return rope(bias.float().expand(len(positions), -1, -1), cos, sin, self.spec.rope_interleaved)

    def _load_layer(self, weights: Weights, prefix: str) -> dict[str, Any]:
        norms = ("attn_norm", "mlp_norm")
        layer: dict[str, Any] = {norm: self._tensor(weights[prefix + norm].dequantize()) for norm in norms}
        for name, parts in _FUSED.items():
            layer[name] = self._ops.prepare([weights[prefix + part] for part in parts])
            biases = [f"{prefix}{part}.bias" for part in parts]
            if any(bias in weights for bias in biases):  # the spec has them for all parts or for none
                layer[f"{name}.bias"] = torch.cat([self._tensor(weights[bias].dequantize()) for bias in biases])
        return layer

    def _linear(self, x: Tensor, n: int, name: str, batch: Batch) -> Tensor:
        layer = self._layers[n]
        y = self._ops.linear(x, layer[name])
        if (bias := layer.get(f"{name}.bias")) is not None:
            y = y + bias
        if batch.adapters:
            self._add_deltas(x, y, n, name, batch)
        return y

    def _add_deltas(self, x: Tensor, y: Tensor, n: int, name: str, batch: Batch) -> None:
        for b, adapter in enumerate(batch.adapters):
            if adapter is None or not adapter.changes_cache:
                continue
            rows = slice(int(batch.cu_q[b]), int(batch.cu_q[b + 1]))
            if adapter not in self._deltas:
                sites = adapter.sites.items()
                self._deltas[adapter] = {site: (self._tensor(d.a), self._tensor(d.b), d.scale) for site, d in sites}
            for part, start, stop in self._sites[name]:
                if found := self._deltas[adapter].get(f"layers.{n}.{part}"):
                    a, b_factor, scale = found
                    y[rows, start:stop] += scale * ((x[rows] @ a.T) @ b_factor.T)

    def _tensor(self, values: FloatArray) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(values)).to(self._device, self._dtype)

    def _rope_rows(self, batch: Batch) -> tuple[Tensor, Tensor]:
        positions = torch.from_numpy(batch.positions).to(self._device)
        variants = np.repeat(batch.rope_variants, np.diff(batch.cu_q))
        found = np.unique(variants)
        tables = [self._rope_table(int(variant)) for variant in found]
        if len(found) == 1:
            return tables[0][0][positions], tables[0][1][positions]
        which = torch.from_numpy(np.searchsorted(found, variants)).to(self._device)
        cos, sin = (torch.stack(both)[which, positions] for both in zip(*tables, strict=True))
        return cos, sin

    def _rope_table(self, variant: int) -> tuple[Tensor, Tensor]:
        if variant not in self._rope:
            cos, sin = rope_tables(self.spec, variant, self._max_context)
            self._rope[variant] = torch.from_numpy(cos).to(self._device), torch.from_numpy(sin).to(self._device)
        return self._rope[variant]


_FUSED = {
    "attn.qkv": ("attn.q", "attn.k", "attn.v"),
    "attn.o": ("attn.o",),
    "mlp.gate_up": ("mlp.gate", "mlp.up"),
    "mlp.down": ("mlp.down",),
}


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    # NumPy asks for zeroed pages, which take no memory until they are written; PyTorch writes them.
    plain = np.zeros(shape, dtype=np.float32 if dtype == torch.float32 else np.int16)
    return torch.from_numpy(plain).view(dtype)


def _to_host(x: Tensor) -> FloatArray:
    values: FloatArray = x.float().cpu().numpy()
    return values


def _pick_dtype(spec: ModelSpec, options: DecoderOptions, device: torch.device) -> torch.dtype:
    """The arithmetic type; ``auto`` is float32 on a CPU where that fits and bfloat16 elsewhere."""
    if options.dtype != "auto":
        dtype: torch.dtype = getattr(torch, options.dtype)
        if device.type == "cpu":
            require_memory(spec.parameters * dtype.itemsize, f"weights in {options.dtype}")
        return dtype
    if device.type != "cpu":
        return torch.float16 if device.type == "mps" else torch.bfloat16
    if spec.parameters * 4 <= available_memory():
        return torch.float32
    require_memory(spec.parameters * 2, "weights in bfloat16")
    _log.warning("weights do not fit in float32, computing in bfloat16", parameters=spec.parameters)
    return torch.bfloat16
