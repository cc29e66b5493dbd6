"""`TwoTierKVCache`: the two tiers for the keys and values of one attention layer, without a model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from ruvllm_core.decode.coded import coded_storage
from ruvllm_core.decode.kv import STORE_BITS, KVStorage, KVView
from ruvllm_core.decode.ops import AttentionInput
from ruvllm_core.decode.reference import DTYPES, attention, kv_append
from ruvllm_core.errors import CacheFull
from ruvllm_core.model.spec import ModelSpec
from ruvllm_core.protocols import CacheContext, Decoder
from ruvllm_core.settings import CacheConfig
from ruvllm_kv_cache.settings import CacheSettings, KVCacheConfig
from ruvllm_kv_cache.two_tier import TwoTierCache, token_limit

_STEP = 512  # tokens appended at a time: all of them are floats until they are in
_NAME = "layer"


@dataclass(frozen=True)
class TwoTierStats:
    """What a `TwoTierKVCache` holds.

    Attributes:
        total_tokens, tail_tokens, store_tokens: all, those read as floats (sinks too), and those read from the store.
        tail_bytes, store_bytes: of the blocks in use, keys and values, scales and means, whole blocks.
        compression_ratio: bytes that all tokens would take in the tail's precision, divided by those in use.
    """

    total_tokens: int
    tail_tokens: int
    store_tokens: int
    tail_bytes: int
    store_bytes: int
    compression_ratio: float


class TwoTierKVCache:
    """Keys and values of one sequence in one layer: recent ones as floats, older ones in 4 or 8 bits.

    The cache policy ``two_tier`` and the reference operations, on the CPU. Storage is sized for `max_tokens`, but the
    operating system backs it with memory only where blocks have been in use.

    Args:
        config: sizes and precisions.
        num_kv_heads, head_dim: K and D of what is appended; None takes them from the first tokens.

    Raises `ConfigError` if the sizes do not go together, and `OutOfMemoryError`.
    """

    def __init__(
        self, config: KVCacheConfig | None = None, *, num_kv_heads: int | None = None, head_dim: int | None = None
    ) -> None:
        self._config = config or KVCacheConfig()
        self._options = CacheSettings(**self._config.model_dump())
        token_limit(self._options, self._config.max_tokens, self._config.max_tokens)
        self._known: tuple[ModelSpec, TwoTierCache] | None = None
        if num_kv_heads is not None and head_dim is not None:
            self._open(num_kv_heads, head_dim)

    def _open(self, num_kv_heads: int, head_dim: int) -> None:
        limit = self._config.max_tokens
        spec = ModelSpec(
            architecture="one layer",
            vocab_size=1,
            hidden_size=num_kv_heads * head_dim,
            intermediate_size=1,
            num_layers=1,
            num_heads=num_kv_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            norm_eps=1e-5,
            max_context=limit,
            rope_dim=2,
        )
        # A policy asks a decoder for storage and for nothing else.
        storages = cast(Decoder, _Storages(spec))
        context = CacheContext(spec, storages, CacheConfig(), limit, 1, min(limit, _STEP), self._options)
        self._known = spec, TwoTierCache(context)
        self._cache.open(_NAME, (), limit)

    @property
    def _spec(self) -> ModelSpec:
        return self._both[0]

    @property
    def _cache(self) -> TwoTierCache:
        return self._both[1]

    @property
    def _both(self) -> tuple[ModelSpec, TwoTierCache]:
        if self._known is None:
            raise ValueError("nothing has been appended yet")
        return self._known

    def append(self, keys: Any, values: Any) -> None:
        """Add T tokens: NumPy arrays or tensors of floats ``[T, K, D]``, the keys as attention is to find them.

        Raises `CacheFull` if there is no room for all of them, and then adds none.
        """
        if self._known is None:
            self._open(*_tensor(keys, (None, None), "keys").shape[1:])
        shape = (self._spec.num_kv_heads, self._spec.head_dim)
        key, value = (_tensor(one, shape, name) for one, name in ((keys, "keys"), (values, "values")))
        if len(key) != len(value):
            raise ValueError(f"{len(key)} keys, but {len(value)} values")
        if (total := self._total + len(key)) > self._config.max_tokens:
            raise CacheFull(f"{total} tokens, but max_tokens is {self._config.max_tokens}", hint="raise max_tokens")
        for at in range(0, len(key), _STEP):
            self._write(key[at : at + _STEP], value[at : at + _STEP])

    def attend(self, query: Any, scale: float | None = None) -> Any:
        """Causal attention of the last T tokens to all up to their own: ``[T, H, D] -> [T, H, D]``, as it came.

        H / K query heads share a key/value head. `scale` multiplies ``q·k``; None is ``D ** -0.5``. The last
        `migration_batch` queries read what they would have read when they were newest; ones before these find more of
        their past in the store.
        """
        kv_heads, dim = self._spec.num_kv_heads, self._spec.head_dim
        rows = _tensor(query, (None, dim), "query")
        if not 1 <= len(rows) <= self._total or rows.shape[1] % kv_heads:
            what = f"T at most {self._total} and H a multiple of {kv_heads}"
            raise ValueError(f"query must be [T, H, {dim}] with {what}, got {list(rows.shape)}")
        start, total, view = self._total - len(rows), self._total, self._view()
        bounds = np.maximum(self._cache.tiers.boundaries(start, total), self._cache.exact_from(_NAME))
        view = replace(view, boundary=bounds.astype(np.int32))
        chosen = dim**-0.5 if scale is None else scale
        call = AttentionInput(rows.float(), 0, view, [0, len(rows)], [start], chosen, None, None)
        with torch.inference_mode():
            out = attention(call)
        return out.to(rows.dtype) if isinstance(query, Tensor) else out.numpy().astype(np.asarray(query).dtype)

    def truncate(self, length: int) -> None:
        """Forget all but the first `length` tokens.

        Taking back up to `migration_batch` tokens leaves no trace; where floats are gone by then, they come back with
        the precision of the store.
        """
        self._cache.truncate(_NAME, length)
        nothing = torch.empty(0, self._spec.num_kv_heads, self._spec.head_dim)
        self._write(nothing, nothing)

    def stats(self) -> TwoTierStats:
        """What is held now."""
        if self._known is None:
            return TwoTierStats(0, 0, 0, 0, 0, 1.0)
        extra = self._cache.stats().extra
        counts = {name: int(value) for name, value in extra.items() if name != "compression_ratio"}
        return TwoTierStats(**counts, compression_ratio=extra["compression_ratio"])

    @property
    def _total(self) -> int:
        return self._cache.stats().tokens

    def _view(self) -> KVView:
        return self._cache.view([_NAME])

    def _write(self, key: Tensor, value: Tensor) -> None:
        self._cache.extend(_NAME, len(key))
        with torch.inference_mode():
            kv_append(self._view(), 0, key, value)
        self._cache.commit(_NAME)


class _Storages:
    """What allocates keys and values in every scheme, as the eager decoder does."""

    kv_schemes = (*DTYPES, *STORE_BITS)

    def __init__(self, spec: ModelSpec) -> None:
        self.spec = spec

    def allocate_kv(self, num_blocks: int, block_size: int, scheme: str) -> KVStorage:
        if scheme in STORE_BITS:
            return coded_storage(self.spec, num_blocks, block_size, scheme, torch.device("cpu"), None)
        shape = (num_blocks, self.spec.num_kv_heads, block_size, self.spec.head_dim)
        keys, values = (torch.zeros(shape, dtype=DTYPES[scheme]) for _ in range(2))
        return KVStorage(scheme, num_blocks, block_size, [keys], [values], keys.nbytes + values.nbytes)


def _tensor(array: Any, shape: Sequence[int | None], name: str) -> Tensor:
    """A tensor of floats on the CPU, ``[T, *shape]``; None is any size."""
    found = array.detach().cpu() if isinstance(array, Tensor) else torch.from_numpy(np.ascontiguousarray(array))
    fits = found.ndim == 3 and all(want in (None, size) for want, size in zip(shape, found.shape[1:], strict=True))
    if not fits or not found.is_floating_point():
        wanted = ", ".join("H" if one is None else str(one) for one in shape)
        raise ValueError(f"{name} must be floats [T, {wanted}], got {found.dtype} {list(found.shape)}")
    return found
