"""The policy ``two_tier`` under a model: accuracy, independence of batches, memory, and what it refuses."""

from __future__ import annotations

import re
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest

from ruvllm_core import machine
from ruvllm_core.decode.contiguous import ContiguousCache
from ruvllm_core.errors import CacheFull, ConfigError, OutOfMemoryError
from ruvllm_core.generate.sampler import log_softmax
from ruvllm_core.model.quant import QuantTensor
from ruvllm_core.protocols import CacheContext, Decoder
from ruvllm_core.settings import CacheConfig
from ruvllm_core.testing import tiny
from ruvllm_kv_cache import memory
from ruvllm_kv_cache.settings import CacheSettings
from ruvllm_kv_cache.two_tier import TwoTierCache

LENGTH = 2048
SMALL = {"tail_length": 20, "migration_batch": 16, "sink_tokens": 3}


@cache
def qwen_like(bias: float) -> Decoder:
    """Qwen2's shape, small and random; each layer's key bias has the norm `bias`."""
    spec = tiny.tiny_spec(
        hidden_size=256,
        intermediate_size=512,
        num_layers=3,
        num_heads=4,
        num_kv_heads=2,
        head_dim=64,
        max_context=LENGTH,
        qkv_bias=True,
        rope_theta=1e6,
    )
    weights, rng = tiny.tiny_weights(spec), np.random.default_rng(3)
    for name, tensor in weights.items():
        values = tensor.dequantize()
        if name.endswith("attn.k.bias"):
            values = rng.normal(size=values.shape).astype(np.float32)
            values *= np.float32(bias) / np.linalg.norm(values)
        elif name.endswith("bias"):
            values = np.zeros_like(values)
        elif name == "embed":  # what a token is counts for more than what it is told
            values = values * 6
        elif name.endswith("attn.q"):  # scores of a few units, whatever the bias
            values = values / (32 if bias else 2)
        elif values.ndim == 2:
            values = values / 2
        weights[name] = QuantTensor.from_float(values)
    return tiny.tiny_decoder(spec, weights)


def context(decoder: Decoder, max_sequences: int = 2, **options: Any) -> CacheContext:
    return replace(tiny.cache_context(decoder, max_sequences), options=CacheSettings(**options))


def logits(decoder: Decoder, policy: Any, tokens: list[int]) -> Any:
    feed = tiny.Feeder(decoder, policy)
    feed.open("s", tokens, len(tokens))
    return np.concatenate([feed.feed(s=min(512, len(tokens) - at))["s"] for at in range(0, len(tokens), 512)])


@cache
def floats(bias: float) -> tuple[list[int], Any]:
    """A text, and its logits over a cache of f16."""
    decoder, tokens = qwen_like(bias), np.random.default_rng(8).integers(0, 256, LENGTH).tolist()
    cache = ContiguousCache(replace(tiny.cache_context(decoder, 1), config=CacheConfig(precision="f16")))
    return tokens, logits(decoder, cache, tokens)


@pytest.mark.parametrize("bias", [0.0, 600.0])
@pytest.mark.parametrize(("precision", "perplexity", "agreement"), [("q4", 0.01, 0.95), ("q8", 0.001, 0.99)])
def test_accuracy_against_floats(precision: str, bias: float, perplexity: float, agreement: float) -> None:
    tokens, expected = floats(bias)
    policy = TwoTierCache(context(qwen_like(bias), store_precision=precision))
    loss, same = compare(logits(qwen_like(bias), policy, tokens), expected, tokens)
    assert 0 < abs(loss) <= perplexity
    assert same >= agreement


def test_keys_with_a_bias_need_it_taken_off() -> None:
    """The limits above are not met by just any 4 bits."""
    tokens, expected = floats(600.0)
    policy: Any = TwoTierCache(context(qwen_like(600.0), store_precision="q4"))
    policy._store.center = None
    assert compare(logits(qwen_like(600.0), policy, tokens), expected, tokens)[1] < 0.94


def compare(found: Any, expected: Any, tokens: list[int]) -> tuple[float, float]:
    """By how much perplexity is larger, as a share of it, and how often the most likely token is the same."""
    target = np.array(tokens)[1:, None]
    found_loss, loss = (-np.take_along_axis(log_softmax(x)[:-1], target, 1).mean() for x in (found, expected))
    return float(np.exp(found_loss - loss) - 1), float(np.mean(found.argmax(-1) == expected.argmax(-1)))


@pytest.mark.parametrize("precision", ["q4", "q8"])
def test_it_does_not_matter_what_a_token_is_batched_with(precision: str) -> None:
    """A prompt at once, in pieces, token by token, and in company."""
    decoder, tokens = qwen_like(0.0), np.random.default_rng(1).integers(0, 256, 200).tolist()
    found = []
    for pieces in ((200,), (77, 100, 23), (60, *[1] * 50, 40, *[1] * 50), (9,) * 22 + (2,)):
        feed = tiny.Feeder(decoder, TwoTierCache(context(decoder, store_precision=precision, **SMALL)))
        feed.open("s", tokens, 300)
        feed.open("other", tokens[::-1] * 4, 900)
        company = {"other": 30} if len(pieces) == 22 + 1 else {}
        found.append(np.concatenate([feed.feed(**company, s=count)["s"] for count in pieces]))
    for one in found[1:]:
        tiny.assert_close(one, found[0], 5e-3, "in pieces")


def test_tokens_move_once_in_whole_batches_and_in_the_step_that_needs_them() -> None:
    decoder, moved = qwen_like(0.0), []
    policy = TwoTierCache(context(decoder, **SMALL))
    policy.open("s", range(100), 300)
    for count in (100, *[1] * 60):
        policy.extend("s", count)
        moved.append([move.positions.tolist() for move in policy.view(["s"]).moves])
        policy.commit("s")
    # The last position p of a step needs the first (p + 1 - 3 - 20) // 16 batches after the sinks.
    assert moved[0] == [list(range(3, 3 + 64))]
    assert {n: one for n, one in enumerate(moved) if one and n} == {
        stop - 100: [list(range(stop - 36, stop - 20))] for stop in (103, 119, 135, 151)
    }


def test_what_was_restored_is_not_restored_again() -> None:
    policy = TwoTierCache(context(qwen_like(0.0), **SMALL))
    policy.open("s", range(100), 300)
    policy.extend("s", 200)
    policy.commit("s")
    policy.truncate("s", 100)
    moves = []
    for _ in range(3):
        policy.extend("s", 1)
        moves.append([(move.source.scheme, move.positions.tolist()) for move in policy.view(["s"]).moves])
        policy.commit("s")
    assert moves == [[("q4", list(range(67, 100)))], [], []]


def test_what_is_out_of_every_layers_sight_leaves_the_store() -> None:
    decoder = tiny.tiny_decoder(tiny.tiny_spec(max_context=512, sliding_window=40))
    policy = TwoTierCache(context(decoder, 1, **SMALL))
    policy.open("s", range(400), 400)
    for _ in range(40):
        policy.extend("s", 10)
        policy.commit("s")
    held = policy.stats()
    assert held.extra["store_bytes"] == policy._store.nbytes // policy._store.num_blocks * 5
    with pytest.raises(ValueError, match="given back"):
        policy.truncate("s", 300)
    policy.truncate("s", 336)
    policy.close("s")
    assert policy.stats().used_bytes == 0


def test_room() -> None:
    decoder = qwen_like(0.0)
    policy = TwoTierCache(context(decoder, 2, max_tokens=900, **SMALL))
    with pytest.raises(CacheFull, match="wants 901 tokens, there is room for 900"):
        policy.open("long", range(9), 901)
    policy.open("a", range(600), 900)
    with pytest.raises(CacheFull, match="no 36 blocks of 16 tokens are free for its prompt"):
        policy.open("b", range(600), 900)
    policy.open("b", range(300), 900)
    with pytest.raises(CacheFull, match="all 2 sequences"):
        policy.open("c", range(3), 30)
    for name, count in (("a", 600), ("b", 300)):
        policy.extend(name, count)
        policy.commit(name)
    policy.extend("a", 20)
    policy.commit("a")
    before = policy.stats()
    with pytest.raises(CacheFull, match="no block is free for 100 after 620 tokens"):
        policy.extend("a", 100)
    assert policy.stats() == before
    assert before.extra["total_tokens"] == before.extra["tail_tokens"] + before.extra["store_tokens"] == 920
    policy.close("b")
    policy.extend("a", 100)


def test_settings_that_do_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = qwen_like(0.0)
    with pytest.raises(ConfigError, match="tail_length 2040 and sink_tokens 9 are more than max_context 2048"):
        TwoTierCache(context(decoder, tail_length=2040, sink_tokens=9))
    with pytest.raises(ConfigError, match="tail_length 256 and sink_tokens 4 are more than max_tokens 259"):
        TwoTierCache(context(decoder, max_tokens=259))
    with pytest.raises(ConfigError, match=r"cache\.precision is f32, but plugins\.kv_cache\.tail_precision f16"):
        TwoTierCache(replace(context(decoder), config=CacheConfig(precision="f32")))
    with pytest.raises(ConfigError, match="head_dim 20 is not divisible by the group"):
        TwoTierCache(context(tiny.tiny_decoder(tiny.tiny_spec(head_dim=20)), tail_length=8))
    bare = tiny.tiny_decoder(tiny.tiny_spec(max_context=512))
    bare.kv_schemes = ("f32", "f16")
    with pytest.raises(ConfigError, match="store_precision q4: this decoder has f32, f16"):
        TwoTierCache(context(bare))
    for module in (machine, memory):
        monkeypatch.setattr(module, "available_memory", lambda: 2_000_000)
    with pytest.raises(OutOfMemoryError, match=r"in q4 and \d+ in f16 need .*\n.* \d+ tokens would fit") as raised:
        TwoTierCache(replace(context(decoder, 1), max_step=512))
    fits = int(re.findall(r"(\d+) tokens would fit", str(raised.value))[0])
    TwoTierCache(replace(context(decoder, 1, max_tokens=fits), max_step=512))
