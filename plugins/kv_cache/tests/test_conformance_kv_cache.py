"""Both policies through core's suite."""

from __future__ import annotations

from dataclasses import replace

from ruvllm_core.protocols import CacheContext, KVCachePolicy
from ruvllm_core.testing import CachePolicySuite
from ruvllm_kv_cache.paged import PagedCache
from ruvllm_kv_cache.settings import CacheSettings
from ruvllm_kv_cache.two_tier import TwoTierCache


class TestPagedOf1(CachePolicySuite):
    block_size = 1

    def make_cache(self, context: CacheContext) -> KVCachePolicy:
        return PagedCache(replace(context, options=CacheSettings(block_size=self.block_size)))


class TestPagedOf4(TestPagedOf1):
    block_size = 4


class TestPagedOf16(TestPagedOf1):
    block_size = 16


class TestTwoTier(CachePolicySuite):
    tolerance = 0.06  # of 8 bits, where weights are as large as these
    rounding = 1e-3  # a value may fall to the next code
    sinks = 0

    def make_cache(self, context: CacheContext) -> KVCachePolicy:
        options = CacheSettings(tail_length=8, migration_batch=16, sink_tokens=self.sinks, store_precision="q8")
        return TwoTierCache(replace(context, options=options))


class TestTwoTierWithSinks(TestTwoTier):
    sinks = 3
