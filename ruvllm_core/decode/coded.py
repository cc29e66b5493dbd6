"""Quantized keys and values in PyTorch: the reference of the schemes ``q8`` and ``q4``.

A head's vector is turned by a Hadamard matrix, which spreads outliers over all its values (QuaRot, arXiv 2404.00456);
each group of values (`store_group`) then shares a scale d in f16, and a value is ``d * (code - middle)`` with codes of
8 or 4 bits. Keys are centred first, so that codes are spent on what tells them apart (KIVI, arXiv 2402.02750): by the
mean of their block, kept in 8 bits; and where there is a key bias, by that as it stands at the token's position.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ruvllm_core.decode.kv import STORE_BITS, KVStorage, store_group, store_row_bytes
from ruvllm_core.model.spec import ModelSpec

#: The key bias of a layer as it stands in keys at positions [M]: float32 ``[M, K, D]``.
Center = Callable[[int, Tensor], Tensor]
#: Scales of 4 bits that are tried, as shares of what the largest value needs: cutting it off may serve the others.
_SHARES = {8: (1.0,), 4: (1.0, 0.93, 0.86, 0.8)}


@dataclass(eq=False)
class CodedStorage(KVStorage):
    """Keys and values as rows of bytes, uint8 ``[N, K, S, bytes]`` a layer: codes, 4-bit ones in pairs, then scales.

    Tokens come in whole blocks.

    Attributes:
        head_dim: D.
        means: of the keys of each block, after they were turned, uint8 ``[N, K, D + 2]`` a layer, coded like a row.
        center: the key biases, or None if there are none.
    """

    head_dim: int = 0
    means: list[Tensor] = field(default_factory=list)
    center: Center | None = None

    def write(self, layer: int, slots: npt.NDArray[np.int64], key: Tensor, value: Tensor) -> None:
        """Store ``[T, K, D]``, whole blocks of which `slots` name each token's place in order."""
        size, bits, group = self.block_size, STORE_BITS[self.scheme], store_group(self.head_dim)
        blocks = torch.from_numpy(slots[::size] // size).to(key.device)
        turned = [_turn(one).view(-1, size, *one.shape[1:]).transpose(1, 2) for one in (key, value)]
        mean = _encode(turned[0].mean(2, keepdim=True), 8, self.head_dim)
        self.means[layer][blocks] = mean[:, :, 0]
        turned[0] = turned[0] - _decode(mean, 8, self.head_dim)
        for stored, one in zip((self.keys[layer], self.values[layer]), turned, strict=True):
            stored[blocks] = _encode(one, bits, group)

    def read(self, layer: int, blocks: Tensor) -> tuple[Tensor, Tensor]:
        """Keys, less any bias, and values of whole blocks, float32 ``[n, K, S, D]``."""
        bits, dim = STORE_BITS[self.scheme], self.head_dim
        key, value = (_decode(one[layer][blocks], bits, dim) for one in (self.keys, self.values))
        return _turn(key + _decode(self.means[layer][blocks][:, :, None], 8, dim)), _turn(value)


def coded_storage(
    spec: ModelSpec, num_blocks: int, block_size: int, scheme: str, device: torch.device, center: Center | None
) -> CodedStorage:
    """Zeroed storage of a quantized scheme."""
    dim, layers = spec.head_dim, spec.num_layers
    row = store_row_bytes(dim, scheme)
    shapes = [(num_blocks, spec.num_kv_heads, block_size, row)] * 2 + [(num_blocks, spec.num_kv_heads, dim + 2)]
    arrays = [[torch.zeros(shape, dtype=torch.uint8, device=device) for _ in range(layers)] for shape in shapes]
    nbytes = layers * sum(map(math.prod, shapes))
    return CodedStorage(scheme, num_blocks, block_size, arrays[0], arrays[1], nbytes, dim, arrays[2], center)


@lru_cache(maxsize=8)
def rotation(dim: int) -> Tensor:
    """The matrix ``[dim, dim]``, symmetric and orthogonal: Hadamard blocks as large a power of two as divides `dim`."""
    block = torch.ones(1, 1)
    while dim % (2 * len(block)) == 0:
        block = torch.cat((torch.cat((block, block), 1), torch.cat((block, -block), 1)))
    whole: Tensor = torch.kron(torch.eye(dim // len(block)), block * len(block) ** -0.5)
    return whole


def _turn(x: Tensor) -> Tensor:
    return x.float() @ rotation(x.shape[-1]).to(x.device)


def _encode(x: Tensor, bits: int, group: int) -> Tensor:
    """``[..., D]`` as rows of bytes, the scales of least squared error."""
    x, middle = x.reshape(*x.shape[:-1], -1, group), _middle(bits)
    top = x.abs().amax(-1, keepdim=True)
    scale, codes, error = top, x, torch.full_like(top, torch.inf)
    for share in _SHARES[bits]:
        # Within what f16 holds, and never 0, by which codes are divided.
        tried = (top * (share / middle)).half().clamp(6e-8, 65504.0).float()
        found = (x / tried + middle).round().clamp(0, 2 * middle)
        off = ((found - middle) * tried - x).square().sum(-1, keepdim=True)
        better = off < error
        scale, codes = torch.where(better, tried, scale), torch.where(better, found, codes)
        error = torch.where(better, off, error)
    packed = codes.to(torch.uint8).flatten(-2)
    if bits == 4:
        packed = packed[..., 0::2] | packed[..., 1::2] << 4
    return torch.cat((packed, scale[..., 0].half().contiguous().view(torch.uint8)), -1)


def _decode(rows: Tensor, bits: int, dim: int) -> Tensor:
    """Rows of bytes as float32 ``[..., D]``."""
    codes, scale = rows[..., : dim * bits // 8], rows[..., dim * bits // 8 :].contiguous().view(torch.float16).float()
    if bits == 4:
        codes = torch.stack((codes & 15, codes >> 4), -1).flatten(-2)
    values: Tensor = (codes.float() - _middle(bits)).reshape(*scale.shape, -1) * scale[..., None]
    return values.flatten(-2)


def _middle(bits: int) -> float:
    return 2.0 ** (bits - 1) - 0.5
