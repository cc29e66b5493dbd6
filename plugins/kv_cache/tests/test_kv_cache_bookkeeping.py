"""Random lives of sequences against a plain list of what each has to see, with storage that holds what was written."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, cast

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ruvllm_core.decode.kv import KVStorage, KVView
from ruvllm_core.errors import CacheFull
from ruvllm_core.model.spec import ModelSpec
from ruvllm_core.protocols import CacheContext, Decoder
from ruvllm_core.settings import CacheConfig
from ruvllm_core.testing.tiny import tiny_spec
from ruvllm_kv_cache.paged import PagedCache
from ruvllm_kv_cache.pool import BlockPool
from ruvllm_kv_cache.settings import CacheSettings
from ruvllm_kv_cache.two_tier import TwoTierCache

CONTEXT, SEQUENCES, STEP = 200, 3, 90
CODED = 1 << 40  # a mark on what has been through a quantized store


class Recorder:
    """Allocates storage that holds one number a token: what its keys and values stand for."""

    kv_schemes = ("f32", "f16", "q8", "q4")

    def __init__(self, spec: ModelSpec) -> None:
        self.spec = spec

    def allocate_kv(self, num_blocks: int, block_size: int, scheme: str) -> KVStorage:
        cells = np.full((num_blocks, block_size), -1, dtype=np.int64)
        return KVStorage(scheme, num_blocks, block_size, [cells], [cells], cells.nbytes)


@dataclass
class Life:
    """What a sequence has been through; `written` has for each position what its keys and values depend on."""

    key: str
    text: list[int]
    capacity: int
    written: list[int] = field(default_factory=list)
    prompt: int = 0
    peak: int = 0
    lossy: bool = False


class World:
    """A policy, its sequences, and what they should be."""

    def __init__(self, cache: Any, window: int | None) -> None:
        self.cache, self.window = cache, window
        self.lives: dict[str, Life] = {}
        self.known: dict[tuple[Any, ...], int] = {}
        self.opened = 0

    def meaning(self, life: Life, length: int) -> list[int]:
        """For the first `length` tokens: a number for the key and all tokens up to each."""
        found: list[int] = []
        for token in life.text[:length]:
            place = found[-1] if found else life.key, token
            found.append(self.known.setdefault(place, len(self.known)))
        return found

    def open(self, kind: int, length: int) -> None:
        """Half of all prompts end with a block, most have a beginning in common with others."""
        name, start, length = f"s{self.opened}", [kind % 2] * 12, length + -length % (8 if kind % 4 else 1)
        life = Life("mine" if kind % 5 else "theirs", [*start, *([7] * CONTEXT)], min(CONTEXT, length + 40))
        before = self.cache.stats()
        try:
            cached = self.cache.open(name, life.text[:length], life.capacity, life.key)
        except CacheFull:
            assert self.cache.stats() == before
            return
        assert 0 <= cached < length
        self.opened += 1
        life.written, life.peak, life.prompt = self.meaning(life, cached), cached, length
        self.lives[name] = life

    def step(self, counts: dict[str, int]) -> None:
        running = {}
        for name, count in counts.items():
            before = self.cache.stats()
            try:
                self.cache.extend(name, count)
                running[name] = count
            except CacheFull:
                assert self.cache.stats() == before
                fits = len(self.lives[name].written) + count <= self.lives[name].prompt
                assert not fits or self.window is not None, "admitted, but there is no room for its prompt"
        if not running:
            return
        view, again = (self.cache.view(list(running)) for _ in range(2))
        for one, other in zip(view.segments, again.segments, strict=True):
            np.testing.assert_array_equal(one.block_table, other.block_table)
        np.testing.assert_array_equal(view.slots, again.slots)
        assert len(view.moves) == len(again.moves)
        new = {name: self.meaning(life := self.lives[name], len(life.written) + n) for name, n in running.items()}
        self.write(view, [new[name][-count:] for name, count in running.items()])
        at = 0
        for row, (name, count) in enumerate(running.items()):
            life = self.lives[name]
            for query in range(count):
                bound = None if view.boundary is None else int(view.boundary[at + query])
                self.look(view, row, life, len(life.written) + query, bound, new[name])
            at += count
        for name, count in running.items():
            life, start = self.lives[name], len(self.lives[name].written)
            self.cache.commit(name, life.text[start : start + count] if life.capacity % 2 else ())
            life.written, life.peak = new[name], max(life.peak, start + count)

    def write(self, view: KVView, meanings: list[list[int]]) -> None:
        """What a decoder does: write the new tokens, then move what is to be moved."""
        target, values = view.segments[-1].storage, list(chain.from_iterable(meanings))
        assert len(set(view.slots.tolist())) == len(values)
        self.check_alone(target, view.slots)
        target.keys[0].reshape(-1)[view.slots] = values
        for move in view.moves:
            size = move.target.block_size
            assert len(set(move.to_slots.tolist())) == len(move.to_slots) == len(move.positions)
            if move.source is move.target:
                assert not set(move.to_slots.tolist()) & set(move.from_slots.tolist())
            self.check_alone(move.target, move.to_slots)
            for pool, owned, _ in pools(self.cache):
                if owned is move.source:
                    assert all(pool.refs[block] for block in set((move.from_slots // owned.block_size).tolist()))
            moved = move.source.keys[0].reshape(-1)[move.from_slots]
            if move.target.scheme.startswith("q"):
                assert (move.to_slots % size == np.arange(len(moved)) % size).all() and len(moved) % size == 0
                moved = moved | CODED
            move.target.keys[0].reshape(-1)[move.to_slots] = moved

    def check_alone(self, storage: KVStorage, slots: Any) -> None:
        for pool, owned, _ in pools(self.cache):
            if owned is storage:
                assert all(pool.refs[block] == 1 for block in set((slots // storage.block_size).tolist()))

    def look(self, view: KVView, row: int, life: Life, position: int, bound: int | None, expected: list[int]) -> None:
        """The query at `position` sees each earlier token once, as it was written, and in the right tier."""
        low = 0 if self.window is None else max(0, position - self.window + 1)
        seen = np.full(position + 1, -1, dtype=np.int64)
        for segment in view.segments:
            start, length = int(segment.starts[row]), int(segment.lengths[row])
            at = np.arange(start, start + length)
            if bound is not None:
                at = at[at >= bound] if segment is view.segments[-1] else at[at < bound]
            at = at[(at <= position) & (at >= low)]
            size = segment.storage.block_size
            blocks = segment.block_table[row][(at - start) // size]
            assert (seen[at] == -1).all(), "seen twice"
            seen[at] = segment.storage.keys[0][blocks, (at - start) % size]
        np.testing.assert_array_equal(seen[low:] & ~CODED, expected[low : position + 1])
        if isinstance(self.cache, TwoTierCache) and not life.lossy:
            at, tiers = np.arange(low, position + 1), self.cache.tiers
            stored = max(0, (position + 1 - tiers.sinks - tiers.tail) // tiers.batch) * tiers.batch
            coded = (at >= tiers.sinks) & (at < tiers.sinks + stored)
            np.testing.assert_array_equal(seen[low:] >= CODED, coded)

    def truncate(self, name: str, back: int) -> None:
        life = self.lives[name]
        length = max(len(life.written) - back, 0)
        if self.window is not None and length and length < life.peak - 64:
            return
        self.cache.truncate(name, length)
        life.lossy |= isinstance(self.cache, TwoTierCache) and length < life.peak - self.cache.tiers.batch
        life.prompt = 0 if length < life.prompt else life.prompt  # others may take what it gave up
        if length == len(life.written):
            return
        life.written = life.written[:length]
        other = [back % 4] * (4 * (back % 3))  # and then on as before, so that a digest of the wrong parent is found
        life.text[length : length + len(other)] = other

    def close(self, name: str) -> None:
        self.cache.close(name)
        del self.lives[name]

    def check(self) -> None:
        stats = self.cache.stats()
        assert (stats.sequences, stats.tokens) == (
            len(self.lives),
            sum(len(life.written) for life in self.lives.values()),
        )
        for pool, storage, tables in pools(self.cache):
            held = Counter(block for table in tables for block in table)
            assert all(len(set(table)) == len(table) for table in tables)
            assert {block: count for block, count in enumerate(pool.refs) if count} == dict(held)
            blank, waiting = pool._blank, list(pool._waiting)
            assert sorted([*blank, *waiting, *held]) == list(range(storage.num_blocks)), "lost, or in two places"
            assert pool.used + pool.waiting + len(blank) == storage.num_blocks
            assert all(pool.find(d) == b for b, d in enumerate(pool._digests) if d is not None)
            assert len(pool._blocks) == sum(d is not None for d in pool._digests)
            assert all(pool._digests[block] is None for block in blank)
            assert pool.available >= 0
        if not self.lives:
            assert stats.used_bytes == 0
            assert all(pool._promised == 0 for pool, *_ in pools(self.cache))


def pools(cache: Any) -> list[tuple[BlockPool, KVStorage, list[list[int]]]]:
    """Each pool with its storage and what every sequence holds of it."""
    held = cache._held.values()
    if isinstance(cache, PagedCache):
        tables = [[*h.blocks[h.first : h.count].tolist(), *([h.copy[0]] if h.copy else [])] for h in held]
        return [(cache._pool, cache._storage, tables)]
    tails = [h.tail[h.tail >= 0].tolist() for h in held]
    stores = [h.store[h.gone : h.batches].tolist() for h in held]
    return [(cache._tail_pool, cache._tail, tails), (cache._store_pool, cache._store, stores)]


def context(spec: ModelSpec, options: CacheSettings) -> CacheContext:
    decoder = cast(Decoder, Recorder(spec))
    return CacheContext(spec, decoder, CacheConfig(), CONTEXT, SEQUENCES, STEP, options)


FULL, WINDOW = tiny_spec(), tiny_spec(sliding_window=24)
KINDS: dict[str, tuple[Any, ModelSpec, CacheSettings]] = {
    "paged": (PagedCache, FULL, CacheSettings(block_size=4)),
    "paged, scarce": (PagedCache, FULL, CacheSettings(block_size=4, max_tokens=150)),
    "paged, one token a block": (PagedCache, FULL, CacheSettings(block_size=1)),
    "paged, window": (PagedCache, WINDOW, CacheSettings(block_size=8)),
    "paged, window, scarce": (PagedCache, WINDOW, CacheSettings(block_size=8, max_tokens=260)),
    "two tiers": (TwoTierCache, FULL, CacheSettings(tail_length=20, migration_batch=16, sink_tokens=0)),
    "two tiers, sinks": (TwoTierCache, FULL, CacheSettings(tail_length=5, migration_batch=16, sink_tokens=3)),
    "two tiers, many sinks": (TwoTierCache, FULL, CacheSettings(tail_length=1, migration_batch=16, sink_tokens=37)),
    "two tiers, scarce": (
        TwoTierCache,
        FULL,
        CacheSettings(tail_length=20, migration_batch=16, sink_tokens=4, max_tokens=160),
    ),
    "two tiers, window": (TwoTierCache, WINDOW, CacheSettings(tail_length=8, migration_batch=16, sink_tokens=3)),
}
OPERATIONS = st.lists(
    st.tuples(
        st.sampled_from(["open", "open", "step", "step", "token", "back", "draft", "close"]),
        st.integers(0, 99),
        st.integers(0, 99),
    ),
    min_size=30,
    max_size=60,
)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=60, deadline=None)
@given(operations=OPERATIONS)
def test_everybody_sees_what_was_written(kind: str, operations: Sequence[tuple[str, int, int]]) -> None:
    make, spec, options = KINDS[kind]
    world = World(make(context(spec, options)), spec.sliding_window)
    for operation, a, b in operations:
        names = list(world.lives)
        chosen = names[a % len(names)] if names else ""
        if operation == "open":
            world.open(a, 1 + b % 50)
        elif not names:
            continue
        elif operation == "step":  # some of all, as many tokens each as a prompt may come in
            world.step({name: 1 + (a + b * n) % STEP for n, name in enumerate(names) if (a >> n) & 1 or n == b % 3})
        elif operation == "token":
            for _ in range(1 + b % 20):
                world.step(dict.fromkeys(names, 1))
        elif operation == "back":
            world.truncate(chosen, b if a % 3 else b % 17)
        elif operation == "draft":  # and think better of it before it is computed
            try:
                world.cache.extend(chosen, 1 + b % 9)
            except CacheFull:
                continue
            world.truncate(chosen, b % 3)
        else:
            world.close(chosen)
        world.check()
    for name in list(world.lives):
        world.close(name)
    world.check()
