"""The cache policy ``paged``: blocks of one pool, given out as sequences grow (PagedAttention, arXiv 2309.06180)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from hashlib import blake2b

import numpy as np

from ruvllm_core.decode.kv import KVStorage, KVView, Move, Segment, bytes_per_token
from ruvllm_core.errors import CacheFull
from ruvllm_core.protocols import CacheContext, CacheStats
from ruvllm_kv_cache.memory import common_window, float_scheme, require_room
from ruvllm_kv_cache.pool import BlockPool, Promise
from ruvllm_kv_cache.settings import CacheSettings
from ruvllm_kv_cache.tables import Table, int32, joined, slots_of, stacked

#: A sequence in a sliding window keeps so many tokens more than it can see, so that as many can be taken back.
SLACK = 64


@dataclass(eq=False)
class _Held:
    """A sequence. `blocks` has its blocks [first, count); `digests` those of its leading full blocks.

    `token_ids` are those known, at least `prompt` of them until it is truncated. `copy` is a block that somebody else
    holds too, and how many tokens of it are to be copied: this step writes to the copy.
    """

    token_ids: list[int]
    prompt: int
    capacity: int
    root: bytes
    promise: Promise
    blocks: Table
    length: int = 0
    reserved: int = 0
    first: int = 0
    count: int = 0
    digests: list[bytes] = field(default_factory=list)
    copy: tuple[int, int] | None = None


class PagedCache:
    """Blocks of one pool. See `protocols.KVCachePolicy`.

    Full blocks are found by a digest of their tokens and all before them, and shared as long as nobody writes to them:
    a writer gets a copy. What nobody holds is kept until its block is needed. Where every layer has a sliding window,
    blocks out of everyone's sight are given back; no more than `SLACK` tokens can be taken back then.

    Raises `OutOfMemoryError` if the pool does not fit, `ConfigError` for a precision that the decoder does not have.
    """

    def __init__(self, context: CacheContext) -> None:
        options = context.options or CacheSettings()
        self._size = size = options.block_size
        self._max_context = context.max_context
        scheme = float_scheme(context, None)
        per_sequence = -(-context.max_context // size)
        blocks = -(-options.max_tokens // size) if options.max_tokens else per_sequence * context.max_sequences
        per_block = size * bytes_per_token(context.spec, scheme)
        require_room(blocks * per_block, 0, per_block, size, f"keys and values of {blocks * size} tokens in {scheme}")
        self._storage: KVStorage = context.decoder.allocate_kv(blocks, size, scheme)
        self._block_bytes = self._storage.nbytes // blocks
        self._window = common_window(context.spec)
        step = context.max_step or context.max_context
        # What a sequence holds at most; in a window that is what is seen, slack, and what a step adds.
        self._most = per_sequence if self._window is None else -(-(self._window + SLACK + step) // size) + 1
        self._root = f"{context.spec}|{scheme}".encode()
        self._spec = context.spec
        self._pool = BlockPool(blocks)
        self._held: dict[str, _Held] = {}
        self._hits = self._asked = 0

    def open(self, sequence: str, token_ids: Sequence[int], capacity: int, key: str = "") -> int:
        if sequence in self._held:
            raise ValueError(f"sequence {sequence} is open already")
        if capacity > self._max_context:
            raise CacheFull(f"sequence {sequence} wants {capacity} tokens, max_context is {self._max_context}")
        pool, size, prompt = self._pool, self._size, len(token_ids)
        variant = self._spec.rope_variant(capacity)
        root = blake2b(self._root + f"|{variant}|{key}".encode(), digest_size=32).digest()
        found, digests = self._find(root, token_ids)
        cached = max(min(len(found) * size, prompt - 1), 0)
        found = found[: -(-cached // size)]
        whole = min(-(-prompt // size), self._most)
        if whole > pool.num_blocks:
            raise CacheFull(
                f"sequence {sequence}: a prompt of {prompt} tokens, but there is room for {pool.num_blocks * size}",
                hint="raise plugins.kv_cache.max_tokens, or give a shorter prompt",
            )
        inside = cached % size > 0  # the last token to be computed is in the last block found
        shared = inside and pool.refs[found[-1]] > 0
        needed = max(whole - len(found), 0) + shared
        if needed > pool.available - sum(not pool.refs[block] for block in found):
            raise CacheFull(
                f"sequence {sequence}: no {needed} blocks of {size} tokens are free for its prompt",
                hint="wait for others to finish, or raise plugins.kv_cache.max_tokens",
            )
        for block in found:
            pool.hold(block)
        if inside and not shared:
            pool.forget(found[-1])  # it is about to be written to: nobody else may come to share it
        table = np.zeros(-(-capacity // size), dtype=np.int32)
        held = _Held(list(token_ids), prompt, capacity, root, pool.promise(needed), table, cached)
        held.blocks[: len(found)], held.count, held.digests = found, len(found), digests[: cached // size]
        self._held[sequence] = held
        self._hits, self._asked = self._hits + cached, self._asked + prompt
        return cached

    def extend(self, sequence: str, count: int) -> None:
        held, pool, size = self._held[sequence], self._pool, self._size
        total = held.length + count
        if total > held.capacity:
            raise CacheFull(f"sequence {sequence}: no room for {count} after {held.length} of {held.capacity} tokens")
        wanted, (index, kept) = -(-total // size), divmod(held.length, size)
        shared = bool(kept) and pool.refs[held.blocks[index]] > 1
        if (needed := max(wanted - held.count, 0) + shared) and not held.promise.affords(needed):
            raise CacheFull(
                f"sequence {sequence}: no block is free for {count} after {held.length} tokens",
                hint="run fewer sequences at a time, or raise plugins.kv_cache.max_tokens",
            )
        if shared:
            held.copy = int(held.blocks[index]), kept
            held.blocks[index] = held.promise.take()
        elif kept:
            pool.forget(held.blocks[index])  # it will not be what it was
        while held.count < wanted:
            held.blocks[held.count] = held.promise.take()
            held.count += 1
        held.reserved = count

    def view(self, sequences: Sequence[str]) -> KVView:
        held, size = [self._held[sequence] for sequence in sequences], self._size
        segment = Segment(
            storage=self._storage,
            block_table=stacked([h.blocks[h.first : h.count] for h in held]),
            lengths=int32([h.length + h.reserved - h.first * size for h in held]),
            starts=int32([h.first * size for h in held]),
        )
        slots = joined([slots_of(h.blocks, size, h.length, h.length + h.reserved) for h in held])
        return KVView([segment], slots, [self._copies(held)] if any(h.copy for h in held) else ())

    def commit(self, sequence: str, token_ids: Sequence[int] = ()) -> None:
        held = self._held[sequence]
        if token_ids and len(held.token_ids) >= held.length:
            held.token_ids[held.length : held.length + held.reserved] = token_ids
        held.length, held.reserved = held.length + held.reserved, 0
        if held.copy:
            self._pool.release(held.copy[0])
            held.copy = None
        if held.length >= (len(held.digests) + 1) * self._size:
            self._register(held)
        if held.promise.count and held.length >= held.prompt:
            held.promise.end()
        if self._window is not None:
            unseen = max(held.length - SLACK - self._window + 1, 0) // self._size
            for block in held.blocks[held.first : unseen]:
                self._pool.release(int(block))
            held.first = max(held.first, unseen)

    def truncate(self, sequence: str, length: int) -> None:
        held, size = self._held[sequence], self._size
        if not 0 <= length <= held.length:
            raise ValueError(f"cannot truncate sequence {sequence} of {held.length} tokens to {length}")
        if self._window is not None and held.first and 0 < length < held.first * size + self._window - 1:
            raise ValueError(f"cannot truncate sequence {sequence} to {length}: what it would see has been given back")
        if held.copy:  # which has not been made
            self._pool.release(int(held.blocks[held.length // size]))
            held.blocks[held.length // size] = held.copy[0]
            held.copy = None
        keep = -(-length // size)
        self._release(held, max(keep, held.first))
        if length < held.length:
            del held.token_ids[length:]
        held.first, held.count = min(held.first, keep), min(held.count, keep)
        held.length, held.reserved = length, 0
        del held.digests[length // size :]

    def close(self, sequence: str) -> None:
        held = self._held.pop(sequence)
        if held.copy:
            self._pool.release(held.copy[0])
        self._release(held, held.first)
        held.promise.end()

    def stats(self) -> CacheStats:
        pool, tokens = self._pool, sum(held.length for held in self._held.values())
        extra = {
            "prompt_tokens": self._asked,
            "cached_tokens": self._hits,
            "cached_blocks": pool.waiting,
            "free_blocks": pool.num_blocks - pool.used - pool.waiting,
            "evictions": pool.evictions,
        }
        return CacheStats(len(self._held), tokens, self._storage.nbytes, pool.used * self._block_bytes, extra)

    def _find(self, root: bytes, token_ids: Sequence[int]) -> tuple[list[int], list[bytes]]:
        """Blocks that hold the beginning of `token_ids`, and their digests."""
        blocks: list[int] = []
        digests: list[bytes] = []
        for start in range(0, len(token_ids) // self._size * self._size, self._size):
            digest = _digest(digests[-1] if digests else root, token_ids[start : start + self._size])
            if (block := self._pool.find(digest)) is None:
                break
            blocks.append(block)
            digests.append(digest)
        return blocks, digests

    def _register(self, held: _Held) -> None:
        """Let others find the full blocks whose tokens are known."""
        size, digests = self._size, held.digests
        for index in range(len(digests), min(held.length, len(held.token_ids)) // size):
            parent = digests[-1] if digests else held.root
            digests.append(_digest(parent, held.token_ids[index * size : (index + 1) * size]))
            if index >= held.first:
                self._pool.register(int(held.blocks[index]), digests[-1])

    def _release(self, held: _Held, keep: int) -> None:
        """Give back all blocks from `keep` on, the last one first: what begins a prefix is evicted last."""
        for block in held.blocks[keep : held.count][::-1]:
            self._pool.release(int(block))
        held.count = min(held.count, keep)

    def _copies(self, held: Sequence[_Held]) -> Move:
        """The tokens that go along from shared blocks to their copies."""
        size, sources, targets, positions = self._size, [], [], []
        for one in held:
            if one.copy:
                block, kept = one.copy
                offsets, index = np.arange(kept, dtype=np.int64), one.length // size
                sources.append(offsets + block * size)
                targets.append(offsets + int(one.blocks[index]) * size)
                positions.append(offsets + index * size)
        return Move(self._storage, self._storage, joined(sources), joined(targets), joined(positions))


def _digest(parent: bytes, token_ids: Sequence[int]) -> bytes:
    return blake2b(np.array(token_ids, dtype=np.int64).tobytes(), digest_size=32, key=parent).digest()
