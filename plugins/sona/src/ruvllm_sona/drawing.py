"""Answers drawn by the decoder that serves requests, a step at a time, for learning's own use."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from ruvllm_core.decode.contiguous import ContiguousCache
from ruvllm_core.generate.request import GenerateParams, Request, new_request_id
from ruvllm_core.generate.sequence import Sequence as Running
from ruvllm_core.generate.sequence import run_batch
from ruvllm_core.protocols import Adapter, CacheContext, Decoder
from ruvllm_core.settings import CacheConfig

_CHUNK = 32  # prompt tokens a slice


def draw_answer(
    decoder: Decoder,
    adapter: Adapter | None,
    prompt_ids: Sequence[int],
    params: GenerateParams,
    stop_ids: frozenset[int],
) -> Iterator[Sequence[int] | None]:
    """An answer with a cache of its own; yields None between slices, and its tokens at last.

    Raises what the decoder raises, or `GenerationError` if its logits make no sense.
    """
    capacity = min(len(prompt_ids) + params.max_tokens, decoder.spec.max_context)
    request = Request(new_request_id(), tuple(prompt_ids), params, stop_ids, capacity, adapter)
    cache = ContiguousCache(CacheContext(decoder.spec, decoder, CacheConfig(), capacity, 1))
    running = Running(request, cache, decoder.spec)
    while True:
        events = run_batch(decoder, cache, [(running, min(_CHUNK, running.pending))])
        for event in events:
            if event.error is not None:
                raise event.error
            if event.finish_reason is not None:
                cache.close(request.id)
                yield running.token_ids[len(prompt_ids) :]
                return
        yield None
