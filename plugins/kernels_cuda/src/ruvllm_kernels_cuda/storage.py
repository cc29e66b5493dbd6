"""Keys and values of all layers on the device."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from ruvllm_core.decode.kv import STORE_BITS, KVStorage
from ruvllm_core.errors import ConfigError, OutOfMemoryError
from ruvllm_core.model.spec import ModelSpec
from ruvllm_kernels_cuda.segments import KV_DTYPES, CodedKV, FloatKV, coded_kv

#: Every scheme there is storage for.
SCHEMES = (*KV_DTYPES, *STORE_BITS)


@dataclass(eq=False)
class DeviceStorage(KVStorage):
    """`keys` and `values` are those of `layers`: floats ``[N, K, S, D]``, of quantized schemes codes alone."""

    layers: list[FloatKV | CodedKV] = field(default_factory=list)


def allocate(spec: ModelSpec, num_blocks: int, block_size: int, scheme: str, device: torch.device) -> DeviceStorage:
    """Zeroed storage. Raises `ConfigError` for a scheme that is not in `SCHEMES`, and `OutOfMemoryError`."""
    if scheme not in SCHEMES:
        raise ConfigError(f"keys and values in {scheme}: kernels cuda have {', '.join(SCHEMES)}")
    layers: list[FloatKV | CodedKV] = []
    shape = num_blocks, spec.num_kv_heads, block_size, spec.head_dim
    try:
        for _ in range(spec.num_layers):
            if scheme in STORE_BITS:
                layers.append(coded_kv(*shape, scheme, str(device)))
            else:
                layers.append(FloatKV(*(torch.zeros(shape, dtype=KV_DTYPES[scheme], device=device) for _ in "kv")))
    except torch.OutOfMemoryError as error:
        raise OutOfMemoryError(
            f"keys and values of {num_blocks} x {block_size} tokens in {scheme} do not fit on {device}: {error}",
            hint="set max_context or plugins.kv_cache.max_tokens lower, or run fewer sequences at a time",
        ) from None
    nbytes = sum(one.nbytes for kv in layers for one in _tensors(kv))
    keys, values = [kv.keys for kv in layers], [kv.values for kv in layers]
    return DeviceStorage(scheme, num_blocks, block_size, keys, values, nbytes, layers)


def _tensors(kv: FloatKV | CodedKV) -> list[torch.Tensor]:
    return [one for one in vars(kv).values() if isinstance(one, torch.Tensor)]
