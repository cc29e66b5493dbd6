"""Both policies through core's suite, with the eager decoder and with the native one."""

from __future__ import annotations

from dataclasses import replace

import pytest

from ruvllm_core.protocols import CacheContext, DecoderOptions, KVCachePolicy
from ruvllm_core.testing import CachePolicySuite, tiny
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


class Native(CachePolicySuite):
    """Steps of C++ over the same weights; what they answer is compared with the eager decoder."""

    def feeder(self, flavour: str = "plain") -> tiny.Feeder:
        provider = pytest.importorskip("ruvllm_kernels_cpu.provider")
        spec = tiny.FLAVOURS[flavour]
        options = DecoderOptions(dtype="float32", device="cpu", threads=2, max_context=spec.max_context)
        decoder = provider.CpuKernels(options).decoder(spec, tiny.tiny_weights(spec), options)
        return tiny.Feeder(decoder, self.make_cache(tiny.cache_context(decoder)))


class TestPagedNative(Native, TestPagedOf4):
    pass


class TestTwoTierNative(Native, TestTwoTierWithSinks):
    pass
