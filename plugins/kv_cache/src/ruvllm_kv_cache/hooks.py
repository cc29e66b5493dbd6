"""What this plugin registers: the cache policies ``paged`` and ``two_tier``."""

from __future__ import annotations

from ruvllm_core.hookspecs import Offer, hookimpl
from ruvllm_kv_cache.settings import CacheSettings

RUVLLM_API_VERSION = 1
Settings = CacheSettings


@hookimpl
def cache_policies() -> list[Offer]:
    return [
        Offer("paged", "ruvllm_kv_cache.paged:PagedCache", "blocks of one pool; prefixes in common are kept once"),
        Offer("two_tier", "ruvllm_kv_cache.two_tier:TwoTierCache", "recent tokens as floats, older in 4 or 8 bits"),
    ]
