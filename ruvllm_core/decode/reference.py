"""Reference operations in PyTorch: any device that PyTorch runs on, and the oracle for every other provider."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from ruvllm_core.decode.coded import CodedStorage
from ruvllm_core.decode.kv import KVStorage, KVView, Segment
from ruvllm_core.decode.ops import AttentionInput, Ops
from ruvllm_core.errors import ConfigError
from ruvllm_core.model.quant import QuantTensor
from ruvllm_core.model.spec import ModelSpec
from ruvllm_core.protocols import Decoder, DecoderOptions, Weights

#: The arithmetic type of each float scheme.
DTYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}
_DECODED = 256  # tokens of a quantized segment that are floats at a time
#: A segment, whether it is the newest, and the positions [low, high) to be read of it.
_Run = tuple[Segment, bool, int, int]


class TorchKernels:
    """Kernel provider over PyTorch's own operations; the eager decoder does the rest.

    Args:
        options: `device` may be ``cpu``, ``cuda[:N]`` or ``mps``; ``auto`` takes CUDA, then Metal, then the CPU.

    Raises `ConfigError` for a device that this PyTorch cannot use.
    """

    def __init__(self, options: DecoderOptions) -> None:
        self.device = pick_device(options)

    def ops(self) -> Mapping[str, Callable[..., Any]]:
        return {}

    def decoder(self, spec: ModelSpec, weights: Weights, options: DecoderOptions) -> Decoder | None:
        return None


def pick_device(options: DecoderOptions) -> str:
    """The PyTorch device that `options` ask for. Raises `ConfigError` if it is not there."""
    cuda, metal = torch.cuda.is_available(), torch.backends.mps.is_available()
    wanted = options.device
    if wanted == "auto":
        wanted = "cuda" if cuda else "mps" if metal else "cpu"
    if wanted.startswith("cuda"):
        if not cuda:
            raise ConfigError("device cuda: this PyTorch has no CUDA device", hint="use device cpu or auto")
        index = int(wanted[5:]) if ":" in wanted else 0
        if index >= torch.cuda.device_count():
            raise ConfigError(f"device {wanted}: there are {torch.cuda.device_count()} CUDA devices, from cuda:0")
        return f"cuda:{index}"
    if wanted == "mps":
        if not metal:
            raise ConfigError("device mps: this PyTorch has no Metal device", hint="use device cpu or auto")
        return f"mps:{options.device_index}"
    return "cpu"


def reference_ops(device: torch.device, dtype: torch.dtype) -> Ops:
    """Every operation of `Ops`, computing in `dtype` on `device`."""
    return Ops(
        prepare=lambda tensors: dense(tensors, device, dtype),
        linear=F.linear,
        embed=lambda weight, tokens: F.embedding(tokens, weight),
        rms_norm=rms_norm,
        add_rms_norm=add_rms_norm,
        rope=rope,
        kv_append=kv_append,
        attention=attention,
        gated=gated,
    )


def dense(tensors: Sequence[QuantTensor], device: torch.device, dtype: torch.dtype) -> Tensor:
    """Matrices of equal width, dequantized and stacked by rows. A single float tensor of `dtype` stays in its file."""
    from ruvllm_core.model.dequant import dequantize

    first = tensors[0]
    if len(tensors) == 1 and DTYPES.get(first.scheme) == dtype and device.type == "cpu":
        with warnings.catch_warnings():  # the mapping is read-only, which PyTorch cannot express
            warnings.simplefilter("ignore", UserWarning)
            flat = torch.from_numpy(first.data.reshape(-1))
        if flat.data_ptr() % dtype.itemsize == 0:
            return flat.view(dtype).view(first.shape)
    heights = [tensor.num_rows for tensor in tensors]
    values = torch.empty((sum(heights), first.columns), dtype=torch.float32)
    for tensor, rows in zip(tensors, torch.split(values, heights), strict=True):
        dequantize(tensor, out=rows.numpy())
    return values.to(device=device, dtype=dtype)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    # In float32 whatever the dtype: the mean of squares overflows half precision.
    wide = x.float()
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return weight * wide.to(x.dtype)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    total = x + residual
    return total, rms_norm(total, weight, eps)


def rope(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    width = 2 * cos.shape[-1]
    cos, sin = cos[:, None].to(x.dtype), sin[:, None].to(x.dtype)
    rotated, rest = x[..., :width], x[..., width:]
    if interleaved:
        first, second = rotated[..., 0::2], rotated[..., 1::2]
    else:
        first, second = rotated.chunk(2, -1)
    halves = (first * cos - second * sin, second * cos + first * sin)
    turned = torch.stack(halves, -1).flatten(-2) if interleaved else torch.cat(halves, -1)
    return torch.cat((turned, rest), -1) if rest.shape[-1] else turned


def gated(gate_up: Tensor, activation: str) -> Tensor:
    gate, up = gate_up.chunk(2, -1)
    if activation == "silu":
        return F.silu(gate) * up
    return F.gelu(gate, approximate="tanh" if activation == "gelu_tanh" else "none") * up


def kv_append(view: KVView, layer: int, key: Tensor, value: Tensor) -> None:
    _write(view.segments[-1].storage, layer, view.slots, key, value)
    for move in view.moves:
        source, target, at = move.source, move.target, torch.from_numpy(move.positions)
        block, offset = _places(source, layer, move.from_slots)
        key, value = (one[torch.arange(len(at)), :, offset] for one in _floats(source, layer, block))
        if (center := _center(source, layer, at)) is not None:
            key = key + center
        if (center := _center(target, layer, at)) is not None:
            key = key - center
        _write(target, layer, move.to_slots, key, value)


def _write(storage: KVStorage, layer: int, slots: npt.NDArray[np.int64], key: Tensor, value: Tensor) -> None:
    """Store ``[T, K, D]`` at `slots`."""
    if isinstance(storage, CodedStorage):
        return storage.write(layer, slots, key, value)
    for target, new in ((storage.keys[layer], key), (storage.values[layer], value)):
        if len(slots) == 1:
            block, offset = divmod(int(slots[0]), storage.block_size)
            target[block, :, offset] = new[0]
        else:
            blocks, offsets = _places(storage, layer, slots)
            target[blocks, :, offsets] = new.to(target.dtype)
    return None


def _places(storage: KVStorage, layer: int, slots: npt.NDArray[np.int64]) -> tuple[Tensor, Tensor]:
    device = storage.keys[layer].device
    block, offset = np.divmod(slots, storage.block_size)
    return torch.from_numpy(block).to(device), torch.from_numpy(offset).to(device)


def _floats(storage: KVStorage, layer: int, blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values of whole blocks, ``[n, K, S, D]``."""
    if isinstance(storage, CodedStorage):
        return storage.read(layer, blocks)
    return storage.keys[layer][blocks], storage.values[layer][blocks]


def _center(storage: KVStorage, layer: int, positions: Tensor) -> Tensor | None:
    """The bias that was taken off the keys at `positions` ``[M]``, ``[M, K, D]``; None is nothing."""
    if not isinstance(storage, CodedStorage) or storage.center is None:
        return None
    return storage.center(layer, positions)


def attention(call: AttentionInput) -> Tensor:
    """Causal attention of each sequence over its segments, grouped queries sharing their key/value head."""
    parts = []
    for b, position in enumerate(call.positions):
        rows = slice(call.cu_q[b], call.cu_q[b + 1])
        limits = None if call.view.boundary is None else call.view.boundary[rows]
        parts.append(_attend(call.query[rows], _runs(call, b, position, limits), b, position, limits, call))
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _runs(call: AttentionInput, b: int, position: int, limits: npt.NDArray[np.int32] | None) -> list[_Run]:
    """What the tokens of sequence b see of each segment, in pieces if it has to be decoded."""
    runs: list[_Run] = []
    for segment in call.view.segments:
        newest, start = segment is call.view.segments[-1], int(segment.starts[b])
        low, high = start, start + int(segment.lengths[b])
        if call.window is not None:
            low = max(low, position - call.window + 1)
        if limits is not None:
            low, high = (max(low, int(limits.min())), high) if newest else (low, min(high, int(limits.max())))
        step = _DECODED if isinstance(segment.storage, CodedStorage) else max(high - low, 1)
        runs += [(segment, newest, at, min(at + step, high)) for at in range(low, high, step)]
    return runs


def _read(call: AttentionInput, segment: Segment, b: int, low: int, high: int) -> list[Tensor]:
    """Keys and values ``[K, high - low, D]`` of sequence b at positions [low, high)."""
    storage, start = segment.storage, int(segment.starts[b])
    first, last = (low - start) // storage.block_size, (high - start - 1) // storage.block_size
    skip = slice(low - start - first * storage.block_size, high - start - first * storage.block_size)
    if first == last and not isinstance(storage, CodedStorage):  # a view, no copy
        block = int(segment.block_table[b, first])
        found = [stored[call.layer][block, :, skip] for stored in (storage.keys, storage.values)]
    else:
        blocks = torch.from_numpy(segment.block_table[b, first : last + 1]).to(storage.keys[call.layer].device)
        both = _floats(storage, call.layer, blocks)
        found = [run.transpose(0, 1).flatten(1, 2)[:, skip] for run in both]
    if (center := _center(storage, call.layer, torch.arange(low, high))) is not None:
        found[0] = found[0] + center.transpose(0, 1)
    return [one.to(call.query.dtype) for one in found]


def _attend(
    query: Tensor,
    runs: list[_Run],
    b: int,
    position: int,
    limits: npt.NDArray[np.int32] | None,
    call: AttentionInput,
) -> Tensor:
    """Online softmax over runs (arXiv 2205.14135): ``query [n, H, D] -> [n, H, D]``."""
    count, heads, dim = query.shape
    kv_heads = call.view.segments[0].storage.keys[call.layer].shape[1]
    group = heads // kv_heads
    if limits is not None and limits.min() == limits.max():
        limits = None  # the runs end where everybody's view does
    if len(runs) == 1 and call.softcap is None and limits is None:
        segment, _, start, stop = runs[0]
        key, value = (one[None] for one in _read(call, segment, b, start, stop))
        if count == 1:  # the queries of a group are rows of one small product with their key/value head
            wide = query.view(1, kv_heads, group, dim)
            return F.scaled_dot_product_attention(wide, key, value, scale=call.scale).reshape(1, heads, dim)
        plain = call.window is None and start == position
        mask = None if plain else _mask(count, key.shape[2], position, start, call.window, query.device)
        out = F.scaled_dot_product_attention(
            query.transpose(0, 1)[None], key, value, mask, is_causal=plain, scale=call.scale, enable_gqa=group > 1
        )
        return out[0].transpose(0, 1)
    # One small matrix product a key/value head: its queries are the rows.
    rows = query.view(count, kv_heads, group, dim).permute(1, 2, 0, 3).reshape(kv_heads, group * count, dim)
    best = torch.full((kv_heads, group * count, 1), -torch.inf, device=query.device)
    total = mixed = torch.zeros_like(best)
    for segment, newest, start, stop in runs:
        key, value = _read(call, segment, b, start, stop)
        scores = (rows @ key.transpose(1, 2)).float() * call.scale
        if call.softcap is not None:
            scores = call.softcap * torch.tanh(scores / call.softcap)
        if count > 1:
            mask = _mask(count, key.shape[1], position, start, call.window, query.device)
            if limits is not None:
                older = torch.arange(start, stop) < torch.from_numpy(limits)[:, None]
                mask &= (~older if newest else older).to(query.device)
            scores = scores.masked_fill(~mask.repeat(group, 1), -torch.inf)
        top = torch.maximum(scores.amax(-1, keepdim=True), best)
        finite = torch.where(top == -torch.inf, 0.0, top)
        weights, fade = torch.exp(scores - finite), torch.exp(best - finite)
        total = total * fade + weights.sum(-1, keepdim=True)
        mixed = mixed * fade + (weights.to(value.dtype) @ value).float()
        best = top
    out = (mixed / total).to(query.dtype).view(kv_heads, group, count, dim)
    return out.permute(2, 0, 1, 3).reshape(count, heads, dim)


def _mask(count: int, length: int, position: int, start: int, window: int | None, device: torch.device) -> Tensor:
    """Bool ``[count, length]``: which key each query may see."""
    queries = torch.arange(count, device=device)[:, None] + (position - start)
    distance = queries - torch.arange(length, device=device)
    seen = distance >= 0
    return seen if window is None else seen & (distance < window)
