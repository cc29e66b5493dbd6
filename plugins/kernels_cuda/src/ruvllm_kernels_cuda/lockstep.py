"""One rank has the engine, the others follow: every call of its decoder is made on all ranks.

So an engine, its cache, its random numbers and its learning loops exist once, and nothing of them has to be repeatable.
A call is a message over a Gloo group; caches and adapters are named in it by numbers, and an adapter's factors are sent
when it is first used.
"""

from __future__ import annotations

import io
import os
import pickle
from collections import deque
from collections.abc import Callable, Mapping
from datetime import timedelta
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary, finalize

import torch
import torch.distributed as dist

from ruvllm_core.decode.batch import Batch
from ruvllm_core.decode.kv import KVStorage
from ruvllm_core.errors import ConfigError, GenerationError, OutOfMemoryError, RuvLLMError
from ruvllm_core.log import get_logger
from ruvllm_core.protocols import Adapter, Decoder, FloatArray

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

_LEADER = 0
_IDLE = timedelta(days=365)  # that followers wait for the next call
_log = get_logger("lockstep")


def join(device: torch.device) -> tuple[ProcessGroup, ProcessGroup]:
    """The groups of all processes that ``torchrun`` has started: NCCL's over `device`, and Gloo's for calls.

    Raises `ConfigError` if it has not started this one, or if groups exist already.
    """
    if missing := [name for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]:
        raise ConfigError(
            f"tensor parallelism: the environment has no {missing[0]}",
            hint="start ruvllm with torchrun, as the README of ruvllm-kernels-cuda shows",
        )
    if dist.is_initialized():
        raise ConfigError(
            "tensor parallelism is for one model a process, and there is one already",
            hint="draft models cannot run beside it: set speculative to ngram or off",
        )
    torch.cuda.set_device(device)
    dist.init_process_group("nccl", device_id=device)
    calls = dist.new_group(backend="gloo", timeout=_IDLE)
    assert dist.group.WORLD is not None and isinstance(calls, dist.ProcessGroup)
    return dist.group.WORLD, calls


class Leader:
    """The decoder of rank 0, whose calls are made on all ranks; see `ruvllm_core.protocols.Decoder`.

    Args:
        decoder: this rank's.
        calls: a Gloo group of all ranks; the others are in `follow`.
    """

    def __init__(self, decoder: Decoder, calls: ProcessGroup) -> None:
        self.spec, self.kv_schemes = decoder.spec, decoder.kv_schemes
        self._decoder: Decoder | None = decoder
        self._calls = calls
        self._numbers: WeakKeyDictionary[Any, int] = WeakKeyDictionary()
        self._next, self._gone = 0, deque[int]()

    def allocate_kv(self, num_blocks: int, block_size: int, scheme: str) -> KVStorage:
        decoder = self._send("allocate_kv", self._next, num_blocks, block_size, scheme)
        storage = _allocate(decoder, self._calls, num_blocks, block_size, scheme)
        self._number(storage)
        return storage

    def forward(self, batch: Batch) -> FloatArray:
        return self._send("forward", batch).forward(batch)

    def logits(self, hidden: FloatArray, batch: Batch | None = None) -> FloatArray:
        return self._send("logits", hidden, batch).logits(hidden, batch)

    def close(self) -> None:
        if self._decoder is not None:
            self._send("close").close()
            self._decoder = None

    def _send(self, name: str, *arguments: Any) -> Decoder:
        """Have the others make a call; the decoder to make it on here."""
        if self._decoder is None:
            raise GenerationError("this decoder is closed")
        new: list[tuple[int, str, Any]] = []

        def number_of(value: Any) -> int | None:
            if isinstance(value, Adapter) and value not in self._numbers:
                new.append((self._number(value), value.version, dict(value.sites)))
            return self._numbers[value] if isinstance(value, (Adapter, KVStorage)) else None

        body = io.BytesIO()
        _Writer(body, number_of).dump((name, arguments))
        gone = [self._gone.popleft() for _ in range(len(self._gone))]
        dist.broadcast_object_list([(gone, new, body.getvalue())], _source(self._calls), self._calls)
        return self._decoder

    def _number(self, value: Any) -> int:
        """A new number, which is given up when `value` is."""
        number, self._next = self._next, self._next + 1
        self._numbers[value] = number
        finalize(value, self._gone.append, number).atexit = False
        return number


def follow(decoder: Decoder, calls: ProcessGroup) -> None:
    """Make the leader's calls on this rank's `decoder` until it is closed."""
    held: dict[int, Any] = {}
    name = ""
    while name != "close":
        message: list[Any] = [None]
        dist.broadcast_object_list(message, _source(calls), calls)
        gone, new, body = message[0]
        for number in gone:
            held.pop(number, None)
        held |= {number: Adapter(version, sites) for number, version, sites in new}
        name, arguments = _Reader(io.BytesIO(body), held).load()
        try:
            if name == "allocate_kv":
                held[arguments[0]] = _allocate(decoder, calls, *arguments[1:])
            else:
                getattr(decoder, name)(*arguments)
        except (RuvLLMError, ValueError) as error:  # the leader's call has failed alike, and its caller is told
            _log.debug("a call has failed", call=name, error=str(error))


class _Writer(pickle.Pickler):
    """Puts numbers in the place of what the others have already."""

    def __init__(self, file: io.BytesIO, number_of: Callable[[Any], int | None]) -> None:
        super().__init__(file, protocol=pickle.HIGHEST_PROTOCOL)
        self._number_of = number_of

    def persistent_id(self, value: Any) -> int | None:
        return self._number_of(value)


class _Reader(pickle.Unpickler):
    """Finds what is meant by a number."""

    def __init__(self, file: io.BytesIO, held: Mapping[int, Any]) -> None:
        super().__init__(file)
        self._held = held

    def persistent_load(self, number: int) -> Any:
        return self._held[number]


def _allocate(decoder: Decoder, calls: ProcessGroup, num_blocks: int, block_size: int, scheme: str) -> KVStorage:
    """Storage on every rank or on none. Raises `OutOfMemoryError` if another rank has no room."""
    storage, failed = None, None
    try:
        storage = decoder.allocate_kv(num_blocks, block_size, scheme)
    except RuvLLMError as error:
        failed = error
    failures = torch.tensor(failed is not None, dtype=torch.int32)
    dist.all_reduce(failures, group=calls)
    if failed is not None:
        raise failed
    if failures.item() or storage is None:
        raise OutOfMemoryError(
            f"keys and values of {num_blocks} x {block_size} tokens in {scheme} do not fit on every GPU",
            hint="set max_context or plugins.kv_cache.max_tokens lower, or run fewer sequences at a time",
        )
    return storage


def _source(calls: ProcessGroup) -> int:
    return dist.get_global_rank(calls, _LEADER)
