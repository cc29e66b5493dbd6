"""The cache policy ``two_tier``: recent tokens and the first few as floats, all others in 4 or 8 bits."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ruvllm_core.decode.kv import KVStorage, KVView, Move, Segment, bytes_per_token
from ruvllm_core.errors import CacheFull, ConfigError
from ruvllm_core.protocols import CacheContext, CacheStats
from ruvllm_kv_cache.memory import common_window, float_scheme, require_room
from ruvllm_kv_cache.pool import BlockPool, Promise
from ruvllm_kv_cache.settings import CacheSettings, TierFields
from ruvllm_kv_cache.tables import Slots, Table, int32, joined, slots_of, stacked

_STEP = 64  # a step adds so many tokens at least: drafts, where prompts are computed in smaller pieces


@dataclass(frozen=True)
class Tiers:
    """Who reads what where, whatever it is batched with.

    The query at a position reads the first `sinks` tokens and those from its `boundary` on as floats, and between them
    `stored` tokens, whole batches, from the store; as long as that is none, everything as floats.
    """

    sinks: int
    tail: int
    batch: int

    def stored(self, position: int) -> int:
        return max((position + 1 - self.sinks - self.tail) // self.batch, 0) * self.batch

    def boundary(self, position: int) -> int:
        stored = self.stored(position)
        return self.sinks + stored if stored else 0

    def boundaries(self, start: int, stop: int) -> npt.NDArray[np.int32]:
        """Of the queries at positions [start, stop)."""
        if stop - start == 1:
            return int32([self.boundary(start)])
        batches = np.maximum(np.arange(start, stop) + 1 - self.sinks - self.tail, 0) // self.batch
        return np.where(batches > 0, self.sinks + batches * self.batch, 0).astype(np.int32)


@dataclass(eq=False)
class _Held:
    """A sequence.

    `tail` has its blocks of floats [first, last), and those of the sinks, by number; -1 is none. Positions from `exact`
    on are in them as they were computed. `store` has its blocks of the store [gone, batches), of which those below
    `filled` are whole batches.
    """

    capacity: int
    promise: Promise
    tail: Table
    store: Table
    length: int = 0
    reserved: int = 0
    first: int = 0
    last: int = 0
    exact: int = 0
    filled: int = 0
    batches: int = 0
    gone: int = 0


class TwoTierCache:
    """A sequence's segments are its sinks, a store in 4 or 8 bits, and a tail of floats. See `protocols.KVCachePolicy`.

    Tokens move from the tail to the store in whole batches, in the step in which one first is read there (`Tiers`).
    Their floats are kept for `migration_batch` tokens more, so that as many can be taken back without a trace. Who
    takes back more finds tokens whose floats are gone again in the tail, with the precision of the store.

    Where every layer has a sliding window, what is out of sight leaves the store; it then cannot be taken back to.

    Raises `ConfigError` for settings that do not fit the model or decoder, and `OutOfMemoryError`.
    """

    def __init__(self, context: CacheContext) -> None:
        options = context.options or CacheSettings()
        spec, decoder, size = context.spec, context.decoder, options.migration_batch
        self.tiers = Tiers(options.sink_tokens, options.tail_length, size)
        self._limit = token_limit(options, options.max_tokens, context.max_context)
        self._scheme = scheme = float_scheme(context, options.tail_precision)
        if options.store_precision not in decoder.kv_schemes:
            what = f"this decoder has {', '.join(decoder.kv_schemes)}"
            raise ConfigError(
                f"plugins.kv_cache.store_precision {options.store_precision}: {what}", hint="use other kernels"
            )
        self._size, self._max_sequences = size, context.max_sequences
        self._sink_blocks = -(-options.sink_tokens // size)
        self._window, self._slack = common_window(spec), max(_STEP, size)
        step = max(context.max_step or self._limit, _STEP)
        tail = self._sink_blocks + -(-(options.tail_length + 2 * size + step) // size) + 1
        tail = min(tail, -(-self._limit // size)) * context.max_sequences
        batches = max((self._limit - options.sink_tokens - options.tail_length) // size, 1)
        if options.max_tokens is None:
            batches *= context.max_sequences
        self._float_bytes = bytes_per_token(spec, scheme)
        means = spec.num_layers * spec.num_kv_heads * (spec.head_dim + 2)
        store_block = size * bytes_per_token(spec, options.store_precision) + means
        fixed = tail * size * self._float_bytes
        require_room(
            fixed + batches * store_block,
            fixed,
            store_block,
            size,
            f"keys and values of {batches * size} tokens in {options.store_precision} and {tail * size} in {scheme}",
        )
        self._tail: KVStorage = decoder.allocate_kv(tail, size, scheme)
        self._store: KVStorage = decoder.allocate_kv(batches, size, options.store_precision)
        self._tail_pool, self._store_pool = BlockPool(tail), BlockPool(batches)
        self._held: dict[str, _Held] = {}

    def open(self, sequence: str, token_ids: Sequence[int], capacity: int, key: str = "") -> int:
        if sequence in self._held:
            raise ValueError(f"sequence {sequence} is open already")
        if capacity > self._limit:
            raise CacheFull(f"sequence {sequence} wants {capacity} tokens, there is room for {self._limit}")
        if len(self._held) == self._max_sequences:
            raise CacheFull(f"all {self._max_sequences} sequences that there is room for are open")
        size, pool = self._size, self._store_pool
        batches = self.tiers.stored(len(token_ids) - 1) // size
        if batches > pool.available:
            raise CacheFull(
                f"sequence {sequence}: no {batches} blocks of {size} tokens are free for its prompt",
                hint="wait for others to finish, or raise plugins.kv_cache.max_tokens",
            )
        table = np.full(-(-capacity // size), -1, dtype=np.int32)
        self._held[sequence] = _Held(capacity, pool.promise(batches), table, table.copy())
        return 0

    def extend(self, sequence: str, count: int) -> None:
        held, size = self._held[sequence], self._size
        total = held.length + count
        if total > held.capacity:
            raise CacheFull(f"sequence {sequence}: no room for {count} after {held.length} of {held.capacity} tokens")
        first = min(held.first, self.tiers.boundary(held.length) // size)
        last = max(held.last, -(-total // size))
        batches = max(held.batches, self.tiers.stored(total - 1) // size)
        if first < held.first or last > held.last or batches > held.batches:
            missing = [n for n in (*range(first, held.first), *range(held.last, last)) if held.tail[n] < 0]
            if len(missing) > self._tail_pool.available or not held.promise.affords(batches - held.batches):
                raise CacheFull(
                    f"sequence {sequence}: no block is free for {count} after {held.length} tokens",
                    hint="run fewer sequences at a time, raise plugins.kv_cache.max_tokens, or take smaller steps",
                )
            for n in missing:
                held.tail[n] = self._tail_pool.take()
            for n in range(held.batches, batches):
                held.store[n] = held.promise.take()
            held.first, held.last, held.batches = first, last, batches
        held.reserved = count

    def view(self, sequences: Sequence[str]) -> KVView:
        held, size, tiers = [self._held[sequence] for sequence in sequences], self._size, self.tiers
        totals = [h.length + h.reserved for h in held]
        slots = joined([slots_of(h.tail, size, h.length, total) for h, total in zip(held, totals, strict=True)])
        tail = Segment(
            storage=self._tail,
            block_table=stacked([h.tail[h.first : h.last] for h in held]),
            lengths=int32([total - h.first * size for h, total in zip(held, totals, strict=True)]),
            starts=int32([h.first * size for h in held]),
        )
        stored = [tiers.stored(total - 1) // size for total in totals]
        if not any(stored) and not any(h.first for h in held):
            return KVView([tail], slots, self._restoring(held))
        store = Segment(
            storage=self._store,
            block_table=stacked([h.store[h.gone : n] for h, n in zip(held, stored, strict=True)]),
            lengths=int32([max(n - h.gone, 0) * size for h, n in zip(held, stored, strict=True)]),
            starts=int32([tiers.sinks + h.gone * size for h in held]),
        )
        segments = [store, tail]
        if tiers.sinks:
            lengths = int32([tiers.sinks if n else 0 for n in stored])
            table = stacked([h.tail[: self._sink_blocks] for h in held])
            segments.insert(0, Segment(self._tail, table, lengths, np.zeros_like(lengths)))
        bounds = [tiers.boundaries(h.length, total) for h, total in zip(held, totals, strict=True)]
        boundary = bounds[0] if len(bounds) == 1 else np.concatenate(bounds)
        return KVView(segments, slots, self._restoring(held) + self._migrating(held, stored), boundary)

    def commit(self, sequence: str, token_ids: Sequence[int] = ()) -> None:
        held, size, tiers = self._held[sequence], self._size, self.tiers
        held.exact = min(held.exact, tiers.boundary(held.length))  # what was missing has been restored
        held.length, held.reserved = held.length + held.reserved, 0
        held.filled = max(held.filled, tiers.stored(held.length - 1) // size)
        first = tiers.boundary(held.length - size) // size
        if first > held.first:
            self._free_tail(held, range(max(held.first, self._sink_blocks), first))
            held.first, held.exact = first, max(held.exact, first * size)
        if self._window is not None:
            unseen = max(held.length - self._slack - self._window + 1 - tiers.sinks, 0) // size
            self._free_store(held, range(held.gone, min(unseen, held.filled)))
            held.gone = max(held.gone, min(unseen, held.filled))

    def truncate(self, sequence: str, length: int) -> None:
        held, size, sinks = self._held[sequence], self._size, self.tiers.sinks
        if not 0 <= length <= held.length:
            raise ValueError(f"cannot truncate sequence {sequence} of {held.length} tokens to {length}")
        if self._window is not None and sinks < length and max(length - self._window + 1, sinks) < self._floor(held):
            raise ValueError(f"cannot truncate sequence {sequence} to {length}: what it would see has been given back")
        keep, batches = -(-length // size), -(-max(length - sinks, 0) // size)
        self._free_tail(held, range(keep, max(held.last, self._sink_blocks)))
        held.last = min(held.last, keep)
        held.first = min(held.first, held.last)
        self._free_store(held, range(max(batches, held.gone), held.batches))
        held.batches = min(held.batches, batches)
        held.gone = min(held.gone, held.batches)
        held.filled = min(held.filled, max(length - sinks, 0) // size)
        held.length, held.reserved = length, 0

    def close(self, sequence: str) -> None:
        held = self._held.pop(sequence)
        self._free_tail(held, range(len(held.tail)))
        self._free_store(held, range(held.gone, held.batches))
        held.promise.end()

    def stats(self) -> CacheStats:
        tokens = sum(held.length for held in self._held.values())
        stored = sum(self.tiers.stored(held.length - 1) for held in self._held.values())
        tail, store = (
            pool.used * (storage.nbytes // storage.num_blocks)
            for pool, storage in ((self._tail_pool, self._tail), (self._store_pool, self._store))
        )
        extra = {
            "total_tokens": tokens,
            "tail_tokens": tokens - stored,
            "store_tokens": stored,
            "tail_bytes": tail,
            "store_bytes": store,
            "compression_ratio": tokens * self._float_bytes / (tail + store) if tokens else 1.0,
        }
        return CacheStats(len(self._held), tokens, self._tail.nbytes + self._store.nbytes, tail + store, extra)

    def exact_from(self, sequence: str) -> int:
        """From which boundary on a query finds all it reads as floats, as it was computed."""
        held, tiers = self._held[sequence], self.tiers
        whole = (tiers.sinks - held.exact) // self._size * self._size
        return tiers.sinks + max(-whole, 0) if held.exact else 0

    def _floor(self, held: _Held) -> int:
        """First position that the store has or could have, but for what has left it."""
        return self.tiers.sinks + held.gone * self._size

    def _restoring(self, held: Iterable[_Held]) -> list[Move]:
        """From the store back to the tail: tokens whose floats are gone, but are asked for after a truncation."""
        size, sinks, parts = self._size, self.tiers.sinks, []
        for one in held:
            low = max(self.tiers.boundary(one.length), self._sink_blocks * size, self._floor(one))
            if low < (high := min(one.exact, one.length)):
                source = slots_of(one.store, size, low - sinks, high - sinks)
                parts.append((source, slots_of(one.tail, size, low, high), np.arange(low, high, dtype=np.int64)))
        return self._move(self._store, self._tail, parts)

    def _migrating(self, held: Iterable[_Held], stored: Sequence[int]) -> list[Move]:
        """From the tail to the store: whole batches."""
        size, sinks, parts = self._size, self.tiers.sinks, []
        for one, batches in zip(held, stored, strict=True):
            if batches > one.filled:
                at = one.filled * size, batches * size
                low, high = at[0] + sinks, at[1] + sinks
                source = slots_of(one.tail, size, low, high)
                parts.append((source, slots_of(one.store, size, *at), np.arange(low, high, dtype=np.int64)))
        return self._move(self._tail, self._store, parts)

    def _move(self, source: KVStorage, target: KVStorage, parts: list[tuple[Slots, Slots, Slots]]) -> list[Move]:
        if not parts:
            return []
        return [Move(source, target, *(joined(arrays) for arrays in zip(*parts, strict=True)))]

    def _free_tail(self, held: _Held, blocks: range) -> None:
        for n in reversed(blocks):
            if n < len(held.tail) and held.tail[n] >= 0:
                self._tail_pool.release(int(held.tail[n]))
                held.tail[n] = -1

    def _free_store(self, held: _Held, batches: range) -> None:
        for n in reversed(batches):
            self._store_pool.release(int(held.store[n]))


def token_limit(options: TierFields, max_tokens: int | None, max_context: int) -> int:
    """Most tokens of a sequence. Raises `ConfigError` if tail and sinks alone are more."""
    limit, floats = min(max_context, max_tokens or max_context), options.tail_length + options.sink_tokens
    if floats > limit:
        name = "max_tokens" if limit == max_tokens else "max_context"
        raise ConfigError(
            f"plugins.kv_cache.tail_length {options.tail_length} and sink_tokens {options.sink_tokens} are more than "
            f"{name} {limit}",
            hint="set tail_length lower",
        )
    return limit
