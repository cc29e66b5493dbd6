"""`TwoTierKVCache` against softmax in float64: over what was appended, and over what the cache made of it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from ruvllm_core.errors import CacheFull, ConfigError
from ruvllm_kv_cache import KVCacheConfig, TwoTierKVCache, TwoTierStats
from ruvllm_kv_cache.settings import CacheSettings

HEADS, KV_HEADS = 6, 2
#: How far off an output may be, as a share of the largest value appended.
BOUNDS = {"q4": 0.05, "q8": 0.004}


def random(*shape: int, seed: int = 0) -> Any:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def exact(query: Any, keys: Any, values: Any, scale: float, reads: Any = None) -> Any:
    """Causal attention of the last T of S positions in float64; `reads` gives other keys and values to each query."""
    out = np.empty(query.shape)
    for t in range(len(query)):
        last = len(keys) - len(query) + t
        k, v = (keys, values) if reads is None else reads(last)
        k, v = (np.repeat(one[: last + 1].astype(np.float64), query.shape[1] // one.shape[1], 1) for one in (k, v))
        scores = np.einsum("hd,shd->hs", query[t].astype(np.float64), k) * scale
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        out[t] = np.einsum("hs,shd->hd", weights / weights.sum(-1, keepdims=True), v)
    return out


def filled(dim: int, config: KVCacheConfig, count: int, *pieces: int) -> tuple[TwoTierKVCache, Any, Any]:
    cache = TwoTierKVCache(config, num_kv_heads=KV_HEADS, head_dim=dim)
    keys, values = random(count, KV_HEADS, dim, seed=1), random(count, KV_HEADS, dim, seed=2)
    stops = [*np.cumsum(pieces).tolist(), count]
    for start, stop in zip([0, *stops], stops, strict=False):
        cache.append(keys[start:stop], values[start:stop])
    return cache, keys, values


def decoded(cache: TwoTierKVCache) -> tuple[Any, Any]:
    """Keys and values that the store has now, ``[S, K, D]``."""
    policy = cache._cache
    held = policy._held["layer"]
    blocks = torch.from_numpy(held.store[: held.filled])
    both = policy._store.read(0, blocks)  # type: ignore[attr-defined]
    return tuple(one.transpose(1, 2).flatten(0, 1).numpy() for one in both)  # type: ignore[return-value]


@pytest.mark.parametrize("precision", ["q4", "q8"])
@pytest.mark.parametrize("dim", [64, 128, 80, 16])
@pytest.mark.parametrize("scale", [None, 0.1])
def test_attention(precision: Any, dim: int, scale: float | None) -> None:
    config = KVCacheConfig(tail_length=40, store_precision=precision, sink_tokens=3, migration_batch=32)
    cache, keys, values = filled(dim, config, 600, 7, 300, 1, 1)
    query, chosen = random(32, HEADS, dim), dim**-0.5 if scale is None else scale
    got = cache.attend(query, scale)
    assert got.dtype == np.float32
    off = abs(got - exact(query, keys, values, chosen)).max()
    assert off <= BOUNDS[precision] * abs(values).max()
    stored_keys, stored_values = decoded(cache)
    halves = keys.astype(np.float16), values.astype(np.float16)

    def reads(position: int) -> tuple[Any, Any]:
        stored = (position + 1 - 3 - 40) // 32 * 32
        mine = tuple(half.astype(np.float32) for half in halves)
        mine[0][3 : 3 + stored], mine[1][3 : 3 + stored] = stored_keys[:stored], stored_values[:stored]
        return mine  # type: ignore[return-value]

    expected = exact(query, keys, values, chosen, reads)
    assert abs(got - expected).max() <= 1e-5 * abs(values).max()


@pytest.mark.parametrize(("dim", "ratio"), [(64, 3.7), (128, 3.7), (16, 2.5)])
def test_bytes_are_those_of_the_arrays(dim: int, ratio: float) -> None:
    cache, *_ = filled(dim, KVCacheConfig(), 4096)
    stats, policy = cache.stats(), cache._cache
    assert (stats.total_tokens, stats.tail_tokens, stats.store_tokens) == (4096, 260 + 60, 4096 - 260 - 60)
    store = policy._store
    arrays = [*store.keys, *store.values, *store.means]  # type: ignore[attr-defined]
    per_block = sum(one.nbytes for one in arrays) / store.num_blocks
    assert stats.store_bytes == stats.store_tokens / 64 * per_block
    floats = stats.store_tokens * 2 * 2 * KV_HEADS * dim
    assert floats / stats.store_bytes >= ratio
    # The tail has the blocks of 64 that hold the sinks, the tail, what is not a batch yet, and one batch more.
    assert stats.tail_bytes == (1 + 6) * 64 * 2 * 2 * KV_HEADS * dim
    whole = 4096 * 2 * 2 * KV_HEADS * dim
    assert stats.compression_ratio == pytest.approx(whole / (stats.store_bytes + stats.tail_bytes))


def test_it_does_not_matter_in_which_pieces_it_came() -> None:
    config, query = KVCacheConfig(tail_length=30, migration_batch=16), random(9, HEADS, 64)
    caches = [filled(64, config, 1200, *pieces)[0] for pieces in ((), (1,) * 90, (700, 3, 200))]
    outs, stats = [cache.attend(query) for cache in caches], {cache.stats() for cache in caches}
    assert len(stats) == 1
    for out in outs[1:]:
        np.testing.assert_allclose(out, outs[0], atol=1e-6)


@pytest.mark.parametrize("back", [1, 31, 32])
def test_what_was_taken_back_has_never_been(back: int) -> None:
    config = KVCacheConfig(tail_length=40, sink_tokens=3, migration_batch=32)
    (cache, keys, values), (other, *_) = filled(64, config, 300), filled(64, config, 300)
    cache.append(random(back, KV_HEADS, 64, seed=5), random(back, KV_HEADS, 64, seed=6))
    cache.truncate(300)
    for one in (cache, other):
        one.append(keys[:60], values[:60])
    query = random(20, HEADS, 64)
    np.testing.assert_array_equal(cache.attend(query), other.attend(query))


def test_who_takes_back_more_finds_the_precision_of_the_store() -> None:
    config = KVCacheConfig(tail_length=40, store_precision="q8", sink_tokens=3, migration_batch=32)
    cache, keys, values = filled(64, config, 600)
    for length in (233, 100, 30, 2):
        cache.truncate(length)
        query = random(min(length, 12), HEADS, 64)
        off = cache.attend(query) - exact(query, keys[:length], values[:length], 0.125)
        assert abs(off).max() <= 2 * BOUNDS["q8"] * abs(values).max()
        assert cache.stats().total_tokens == length


def test_older_queries_than_a_batch_find_more_in_the_store() -> None:
    config = KVCacheConfig(tail_length=40, store_precision="q8", sink_tokens=3, migration_batch=32)
    cache, keys, values = filled(64, config, 400)
    query = random(400, HEADS, 64)
    off = cache.attend(query) - exact(query, keys, values, 0.125)
    assert abs(off).max() <= 2 * BOUNDS["q8"] * abs(values).max()


def test_tensors_come_back_as_tensors() -> None:
    cache = TwoTierKVCache(num_kv_heads=1, head_dim=64)
    cache.append(torch.ones(3, 1, 64, dtype=torch.bfloat16), torch.full((3, 1, 64), 2.0, dtype=torch.bfloat16))
    out = cache.attend(torch.ones(2, 4, 64, dtype=torch.bfloat16))
    assert out.dtype == torch.bfloat16 and (out == 2.0).all()


def test_sizes_are_those_of_the_first_tokens() -> None:
    config = KVCacheConfig(tail_length=32, store_precision="q8", max_tokens=200, migration_batch=16)
    cache, told = TwoTierKVCache(config), TwoTierKVCache(config, num_kv_heads=KV_HEADS, head_dim=64)
    assert cache.stats() == TwoTierStats(0, 0, 0, 0, 0, 1.0)
    with pytest.raises(ValueError, match="nothing has been appended yet"):
        cache.attend(random(1, HEADS, 64))
    keys, values, query = random(100, KV_HEADS, 64), random(100, KV_HEADS, 64), random(1, HEADS, 64)
    for one in (cache, told):
        one.append(keys, values)
    np.testing.assert_array_equal(cache.attend(query), told.attend(query))
    assert cache.stats() == told.stats()


def test_errors() -> None:
    cache = TwoTierKVCache(KVCacheConfig(max_tokens=300), num_kv_heads=2, head_dim=64)
    cache.append(random(280, 2, 64), random(280, 2, 64))
    with pytest.raises(CacheFull, match="301 tokens, but max_tokens is 300"):
        cache.append(random(21, 2, 64), random(21, 2, 64))
    assert cache.stats().total_tokens == 280
    with pytest.raises(ValueError, match=r"keys must be floats \[T, 2, 64\], got torch.float32 \[1, 2, 32\]"):
        cache.append(random(1, 2, 32), random(1, 2, 64))
    with pytest.raises(ValueError, match=r"values must be floats .* got torch.int64"):
        cache.append(random(1, 2, 64), np.ones((1, 2, 64), dtype=np.int64))
    with pytest.raises(ValueError, match="3 keys, but 2 values"):
        cache.append(random(3, 2, 64), random(2, 2, 64))
    for shape in ((281, 2, 64), (1, 3, 64), (0, 2, 64)):
        with pytest.raises(ValueError, match="T at most 280 and H a multiple of 2"):
            cache.attend(random(*shape))
    with pytest.raises(ValueError, match="to 281"):
        cache.truncate(281)
    with pytest.raises(ConfigError, match="head_dim 20 is not divisible by the group"):
        TwoTierKVCache(num_kv_heads=1, head_dim=20)
    with pytest.raises(ConfigError, match="tail_length 256 and sink_tokens 4 are more than max_tokens 259"):
        TwoTierKVCache(KVCacheConfig(max_tokens=259))


@pytest.mark.parametrize(
    ("values", "problem"),
    [
        ({"store_precision": "q5"}, "store_precision: Input should be 'q4' or 'q8'"),
        ({"tail_precision": "fp16"}, "tail_precision: Input should be 'f16', 'f32' or 'bf16'"),
        ({"migration_batch": 24}, "migration_batch: Input should be a multiple of 16"),
        ({"tail_length": 0}, "tail_length: Input should be greater than or equal to 1"),
        ({"sink_token": 4}, "did you mean sink_tokens"),
    ],
)
def test_a_configuration_that_makes_no_sense(values: dict[str, Any], problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        KVCacheConfig(**values)


def test_one_layer_and_the_policies_have_the_same_defaults() -> None:
    shared = KVCacheConfig.model_fields.keys() & CacheSettings.model_fields.keys() - {"max_tokens"}
    assert len(shared) == 5
    assert all(getattr(KVCacheConfig(), name) == getattr(CacheSettings(), name) for name in shared)
