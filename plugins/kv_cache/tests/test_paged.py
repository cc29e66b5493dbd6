"""The policy ``paged``: what is found again, what is copied, what goes first, and what it says when it is full."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from ruvllm_core import machine
from ruvllm_core.errors import CacheFull, ConfigError, OutOfMemoryError
from ruvllm_core.model.spec import ModelSpec, RopeScaling
from ruvllm_core.settings import CacheConfig
from ruvllm_core.testing import tiny
from ruvllm_kv_cache.paged import SLACK, PagedCache
from ruvllm_kv_cache.settings import CacheSettings

TEXT = np.random.default_rng(9).integers(0, 256, 64).tolist()
SPEC = tiny.tiny_spec(max_context=256)


def feeder(spec: ModelSpec = SPEC, **options: Any) -> tiny.Feeder:
    decoder = tiny.tiny_decoder(spec)
    settings = CacheSettings(**{"block_size": 8, **options})
    return tiny.Feeder(decoder, PagedCache(replace(tiny.cache_context(decoder), options=settings, max_step=72)))


def start(feed: tiny.Feeder, name: str, tokens: list[int], key: str = "", capacity: int = 200) -> int:
    feed.open(name, tokens, capacity, cache_key=key)
    return feed.running[name].cached


def rest(feed: tiny.Feeder, name: str) -> Any:
    return feed.feed(**{name: feed.running[name].pending})[name]


def check(feed: tiny.Feeder, name: str, logits: Any) -> None:
    tokens = feed.running[name].token_ids
    expected = tiny.whole(feed.decoder, tokens, feed.running[name].request.capacity)[-len(logits) :]
    tiny.assert_close(logits, expected, 1e-4, name)


@pytest.mark.parametrize(("prompt", "cached"), [(64, 63), (63, 56), (57, 56), (56, 55), (9, 8), (8, 7), (7, 0)])
def test_a_prefix_that_is_found_answers_like_one_that_is_not(prompt: int, cached: int) -> None:
    feed = feeder()
    assert start(feed, "first", TEXT) == 0
    rest(feed, "first")
    for name, others in (("shared", True), ("left behind", False)):
        if not others:
            feed.cache.close("first")
            feed.cache.close("shared")
        assert start(feed, name, TEXT[:prompt]) == cached
        check(feed, name, rest(feed, name))
    assert feed.cache.stats().extra["cached_tokens"] == 2 * cached


def test_answers_are_found_too() -> None:
    """The next turn of a conversation begins with the answer of the one before."""
    feed = feeder()
    start(feed, "turn", TEXT[:20])
    rest(feed, "turn")
    for token in TEXT[20:41]:
        feed.running["turn"].token_ids.append(token)
        feed.feed(turn=1)
    feed.cache.close("turn")
    assert start(feed, "next", TEXT[:50]) == 40
    check(feed, "next", rest(feed, "next"))


def test_what_must_not_be_shared_is_not() -> None:
    feed = feeder()
    for key in ("", "adapter 1", "adapter 2", "adapter 1|salt"):
        assert start(feed, key, TEXT, key) == 0
        rest(feed, key)
        feed.cache.close(key)
    assert start(feed, "again", TEXT, "adapter 2") == 63


def test_keys_rotated_by_another_table_are_not_found() -> None:
    scaling = RopeScaling("longrope", 2.0, 100, short_factors=(1.0,) * 8, long_factors=tuple(2.0 + i for i in range(8)))
    feed = feeder(replace(SPEC, rope_scaling=scaling))
    for name, capacity, cached in (("short", 90, 0), ("long", 190, 0), ("long again", 190, 63), ("short too", 90, 63)):
        assert start(feed, name, TEXT, capacity=capacity) == cached
        check(feed, name, rest(feed, name))


def test_a_draft_taken_back_leaves_no_digest_of_another_text() -> None:
    feed, other = feeder(), TEXT[::-1]
    start(feed, "s", TEXT[:40])
    rest(feed, "s")
    feed.cache.truncate("s", 12)
    feed.running["s"].token_ids[12:], feed.running["s"].computed = [*other[:28], *TEXT[40:]], 12
    rest(feed, "s")
    feed.cache.close("s")
    for name, cached in (("old", 8), ("old again", 63)):
        assert start(feed, name, TEXT) == cached
        check(feed, name, rest(feed, name))
        feed.cache.close(name)
    assert start(feed, "new", [*TEXT[:12], *other[:28], *TEXT[40:]]) == 63
    check(feed, "new", rest(feed, "new"))


def test_sharing_takes_no_memory_and_writing_takes_a_copy() -> None:
    feed = feeder()
    start(feed, "a", TEXT)
    rest(feed, "a")
    block = feed.cache.stats().used_bytes // 8
    for n, name in enumerate("bc", 9):
        start(feed, name, TEXT)
        check(feed, name, rest(feed, name))
        assert feed.cache.stats().used_bytes == n * block  # of the block in which the last token is
    for name, token in zip("abc", TEXT, strict=False):
        feed.running[name].token_ids.append(token)
    for name, logits in feed.feed(a=1, b=1, c=1).items():
        check(feed, name, logits)
    assert (feed.cache.stats().used_bytes, feed.cache.stats().tokens) == (13 * block, 195)


def test_the_longest_unused_goes_first_and_the_end_of_a_prefix_before_its_beginning() -> None:
    feed = feeder(max_tokens=17 * 8)
    for n in range(2):
        start(feed, f"{n}", np.roll(TEXT, n).tolist())
        rest(feed, f"{n}")
    for name in "01":
        feed.cache.close(name)
    assert feed.cache.stats().extra["cached_blocks"] == 16
    start(feed, "third", np.roll(TEXT, 2).tolist()[:24])
    rest(feed, "third")
    feed.cache.close("third")
    stats = feed.cache.stats().extra
    assert (stats["evictions"], stats["free_blocks"], stats["cached_blocks"]) == (2, 0, 17)
    assert start(feed, "0", TEXT) == 48
    assert start(feed, "1", np.roll(TEXT, 1).tolist()) == 63


def test_what_cannot_be_held_is_refused_and_hits_nobody_else() -> None:
    feed = feeder(max_tokens=80)
    with pytest.raises(CacheFull, match="81 tokens, but there is room for 80"):
        start(feed, "never", [*TEXT, *TEXT][:81])
    with pytest.raises(CacheFull, match="max_context is 256"):
        feed.open("long", TEXT, 257)
    start(feed, "a", TEXT[:40])
    before = feed.cache.stats()
    with pytest.raises(CacheFull, match="no 6 blocks of 8 tokens are free"):
        start(feed, "b", TEXT[5:50])  # what was promised to a prompt is not given away
    start(feed, "c", TEXT[5:40])
    rest(feed, "a")
    check(feed, "c", rest(feed, "c"))
    feed.running["a"].token_ids.append(1)
    before = feed.cache.stats()
    with pytest.raises(CacheFull, match="no block is free for 1 after 40 tokens"):
        feed.cache.extend("a", 1)
    assert feed.cache.stats() == before
    feed.cache.close("c")
    check(feed, "a", feed.feed(a=1)["a"])


def test_blocks_out_of_every_layers_sight_are_given_back() -> None:
    window, text = 16, (TEXT * 4)[:250]
    feed = feeder(replace(SPEC, sliding_window=window), max_tokens=160)
    start(feed, "s", text, capacity=256)
    for count in (70, 60, 1, 1, 1, 67, 50):
        logits = feed.feed(s=count)["s"]
        expected = tiny.whole(feed.decoder, text[: feed.running["s"].computed], 256)
        tiny.assert_close(logits, expected[-count:], 1e-4, "a window")
    view = feed.cache.view(["s"])
    assert view.segments[0].starts[0] == (250 - SLACK - window + 1) // 8 * 8
    with pytest.raises(ValueError, match="given back"):
        feed.cache.truncate("s", 250 - SLACK - 8)
    feed.cache.truncate("s", 250 - SLACK)
    feed.running["s"].computed = 250 - SLACK
    tiny.assert_close(feed.feed(s=SLACK)["s"], expected[-SLACK:], 1e-4, "after a long draft")
    mixed = feeder(replace(SPEC, sliding_window=window, sliding_layers=(True, False)))
    start(mixed, "s", text, capacity=256)
    mixed.feed(s=250)
    assert mixed.cache.view(["s"]).segments[0].starts[0] == 0


def test_memory_that_does_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (machine, __import__("ruvllm_kv_cache.memory", fromlist=["memory"])):
        monkeypatch.setattr(module, "available_memory", lambda: 1000 * 512 + 100)
    context = tiny.cache_context(tiny.tiny_decoder(SPEC))  # 512 bytes a token, 4 × 256 tokens
    with pytest.raises(OutOfMemoryError, match=r"(?s)1024 tokens in f32 need 0.00 GiB.*\b960 tokens would fit"):
        PagedCache(context)
    PagedCache(replace(context, options=CacheSettings(max_tokens=960)))


def test_a_precision_that_the_decoder_does_not_have() -> None:
    decoder = tiny.tiny_decoder(SPEC)
    decoder.kv_schemes = ("f32",)
    with pytest.raises(ConfigError, match=r"cache\.precision f16: this decoder has f32"):
        PagedCache(replace(tiny.cache_context(decoder), config=CacheConfig(precision="f16")))
