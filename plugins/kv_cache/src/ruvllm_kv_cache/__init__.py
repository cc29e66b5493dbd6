"""Cache policies for RuvLLM, and the two-tier cache of a single layer for whoever has keys and values of their own."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ruvllm_kv_cache.settings import KVCacheConfig

if TYPE_CHECKING:
    from ruvllm_kv_cache.layer import TwoTierKVCache, TwoTierStats

__all__ = ["KVCacheConfig", "TwoTierKVCache", "TwoTierStats"]


def __getattr__(name: str) -> Any:  # discovery imports this package and needs no PyTorch
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from ruvllm_kv_cache import layer

    return getattr(layer, name)
