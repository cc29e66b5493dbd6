"""The cache policy of core: every sequence owns one block that holds its whole context."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ruvllm_core.decode.kv import KVStorage, KVView, Segment, bytes_per_token
from ruvllm_core.errors import CacheFull, ConfigError
from ruvllm_core.machine import require_memory
from ruvllm_core.protocols import CacheContext, CacheStats


@dataclass
class _Held:
    block: int
    capacity: int
    length: int = 0
    reserved: int = 0


class ContiguousCache:
    """One block of `max_context` tokens for each of `max_sequences` sequences. See `protocols.KVCachePolicy`.

    The operating system backs a block with memory only where tokens have been written. Nothing is shared, so no
    prefix is ever found. Raises `OutOfMemoryError` if the blocks do not fit, `ConfigError` for a precision that the
    decoder does not have.
    """

    def __init__(self, context: CacheContext) -> None:
        decoder, precision = context.decoder, context.config.precision
        scheme = decoder.kv_schemes[0] if precision == "auto" else precision
        if scheme not in decoder.kv_schemes:
            raise ConfigError(f"cache.precision {scheme}: this decoder has {', '.join(decoder.kv_schemes)}")
        self._per_token = per_token = bytes_per_token(context.spec, scheme)
        require_memory(
            per_token * context.max_context * context.max_sequences,
            f"keys and values of {context.max_sequences} × {context.max_context} tokens",
            f"a token takes {per_token} bytes: set a smaller max_context, or cache.precision f16",
        )
        self._storage: KVStorage = decoder.allocate_kv(context.max_sequences, context.max_context, scheme)
        self._free = list(reversed(range(context.max_sequences)))
        self._held: dict[str, _Held] = {}

    def open(self, sequence: str, token_ids: Sequence[int], capacity: int, key: str = "") -> int:
        if sequence in self._held:
            raise ValueError(f"sequence {sequence} is open already")
        if capacity > self._storage.block_size:
            raise CacheFull(f"sequence {sequence} wants {capacity} tokens, a block holds {self._storage.block_size}")
        if not self._free:
            raise CacheFull(f"all {self._storage.num_blocks} blocks are in use")
        self._held[sequence] = _Held(self._free.pop(), capacity)
        return 0

    def extend(self, sequence: str, count: int) -> None:
        held = self._held[sequence]
        if held.length + count > held.capacity:
            raise CacheFull(f"sequence {sequence}: no room for {count} after {held.length} of {held.capacity} tokens")
        held.reserved = count

    def view(self, sequences: Sequence[str]) -> KVView:
        held = [self._held[sequence] for sequence in sequences]
        size = self._storage.block_size
        slots = [np.arange(h.length, h.length + h.reserved, dtype=np.int64) + h.block * size for h in held]
        segment = Segment(
            storage=self._storage,
            block_table=np.array([[h.block] for h in held], dtype=np.int32),
            lengths=np.array([h.length + h.reserved for h in held], dtype=np.int32),
            starts=np.zeros(len(held), dtype=np.int32),
        )
        return KVView([segment], np.concatenate(slots))

    def commit(self, sequence: str, token_ids: Sequence[int] = ()) -> None:
        held = self._held[sequence]
        held.length, held.reserved = held.length + held.reserved, 0

    def truncate(self, sequence: str, length: int) -> None:
        held = self._held[sequence]
        if not 0 <= length <= held.length:
            raise ValueError(f"cannot truncate sequence {sequence} of {held.length} tokens to {length}")
        held.length, held.reserved = length, 0

    def close(self, sequence: str) -> None:
        self._free.append(self._held.pop(sequence).block)

    def stats(self) -> CacheStats:
        tokens = sum(held.length for held in self._held.values())
        return CacheStats(len(self._held), tokens, self._storage.nbytes, tokens * self._per_token)
