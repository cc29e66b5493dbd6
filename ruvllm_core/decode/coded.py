"""Quantized keys and values in PyTorch: the reference of the schemes ``q8`` and ``q4``.

A head's vector is turned by a Hadamard matrix, which spreads outliers over all its values (QuaRot, arXiv 2404.00456);
each group of values (`store_group`) then shares a scale d in f16, and a value is ``d * (code - middle)`` with codes of
8 or 4 bits. Keys are centred first where there is a key bias: it is taken off, as it stands at the token's position.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache

import torch
from torch import Tensor

from ruvllm_core.decode.kv import STORE_BITS, KVStorage, store_group
from ruvllm_core.model.spec import ModelSpec

#: The key bias of a layer as it stands in keys at positions [M]: float32 ``[M, K, D]``.
Center = Callable[[int, Tensor], Tensor]
#: Scales of 4 bits that are tried, as shares of what the largest value needs: cutting it off may serve the others.
_SHARES = {8: (1.0,), 4: (1.0, 0.93, 0.86, 0.8)}


@dataclass(eq=False)
class CodedStorage(KVStorage):
    """Keys and values as rows of bytes, uint8 ``[N, K, S, bytes]`` a layer: codes, 4-bit ones in pairs, then scales.

    Attributes:
        head_dim: D.
        center: the key biases, or None if there are none.
    """

    head_dim: int = 0
    center: Center | None = field(default=None, repr=False)

    def encode(self, x: Tensor) -> Tensor:
        """``[..., D]`` as rows of bytes."""
        bits, group = STORE_BITS[self.scheme], store_group(self.head_dim)
        turned = (x.float() @ rotation(self.head_dim).to(x.device)).reshape(*x.shape[:-1], -1, group)
        scale, codes = _codes(turned, bits)
        codes = codes.flatten(-2)
        if bits == 4:
            codes = codes[..., 0::2] | codes[..., 1::2] << 4
        return torch.cat((codes, scale[..., 0].contiguous().view(torch.uint8)), -1)

    def decode(self, rows: Tensor) -> Tensor:
        """Rows of bytes as float32 ``[..., D]``."""
        bits, dim = STORE_BITS[self.scheme], self.head_dim
        codes, scale = rows[..., : dim * bits // 8], rows[..., dim * bits // 8 :].contiguous().view(torch.float16)
        if bits == 4:
            codes = torch.stack((codes & 15, codes >> 4), -1).flatten(-2)
        groups = (codes.float() - _middle(bits)).reshape(*scale.shape, -1)
        values: Tensor = (groups * scale.float()[..., None]).flatten(-2) @ rotation(dim).to(rows.device)
        return values


def coded_storage(
    spec: ModelSpec, num_blocks: int, block_size: int, scheme: str, device: torch.device, center: Center | None
) -> CodedStorage:
    """Zeroed storage of a quantized scheme."""
    dim = spec.head_dim
    width = dim * STORE_BITS[scheme] // 8 + 2 * (dim // store_group(dim))
    shape = (num_blocks, spec.num_kv_heads, block_size, width)
    keys, values = (
        [torch.zeros(shape, dtype=torch.uint8, device=device) for _ in range(spec.num_layers)] for _ in range(2)
    )
    return CodedStorage(
        scheme, num_blocks, block_size, keys, values, 2 * spec.num_layers * math.prod(shape), dim, center
    )


@lru_cache(maxsize=8)
def rotation(dim: int) -> Tensor:
    """The matrix ``[dim, dim]``, symmetric and orthogonal: Hadamard blocks as large a power of two as divides `dim`."""
    block = torch.ones(1, 1)
    while dim % (2 * len(block)) == 0:
        block = torch.cat((torch.cat((block, block), 1), torch.cat((block, -block), 1)))
    whole: Tensor = torch.kron(torch.eye(dim // len(block)), block * len(block) ** -0.5)
    return whole


def _middle(bits: int) -> float:
    return 2.0 ** (bits - 1) - 0.5


def _codes(x: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Scales f16 ``[..., groups, 1]`` and codes uint8 ``[..., groups, group]``, of least squared error."""
    top, middle = x.abs().amax(-1, keepdim=True), _middle(bits)
    best: tuple[Tensor, Tensor, Tensor] | None = None
    for share in _SHARES[bits]:
        # A smaller scale than f16 holds is of no use, and none of 0 has to be divided by.
        scale = (top * (share / middle)).half().clamp(6e-8, 65504.0)
        codes = (x / scale.float() + middle).round().clamp(0, 2 * middle)
        error = ((codes - middle) * scale.float() - x).square().sum(-1, keepdim=True)
        if best is None:
            best = error, scale, codes
        else:
            better = error < best[0]
            best = tuple(torch.where(better, new, old) for new, old in zip((error, scale, codes), best, strict=True))  # type: ignore[assignment]
    assert best is not None
    return best[1], best[2].to(torch.uint8)
