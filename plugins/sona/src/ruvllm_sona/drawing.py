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


def draw_answers(
    decoder: Decoder,
    adapter: Adapter | None,
    prompts: Sequence[Sequence[int]],
    params: Sequence[GenerateParams],
    stop_ids: frozenset[int],
) -> Iterator[list[tuple[int, ...]] | None]:
    """An answer to each prompt, together and with a cache of their own; yields None between slices, and them at last.

    Raises what the decoder raises, or `GenerationError` if its logits make no sense.
    """
    requests = []
    for prompt, own in zip(prompts, params, strict=True):
        capacity = min(len(prompt) + own.max_tokens, decoder.spec.max_context)
        requests.append(Request(new_request_id(), tuple(prompt), own, stop_ids, capacity, adapter))
    most = max(request.capacity for request in requests)
    cache = ContiguousCache(CacheContext(decoder.spec, decoder, CacheConfig(), most, len(requests)))
    everyone = {request.id: Running(request, cache, decoder.spec) for request in requests}
    running = dict(everyone)
    while running:
        behind = next((one for one in running.values() if one.pending > 1), None)  # one prompt a slice: it is long
        work = [(behind, min(_CHUNK, behind.pending))] if behind else [(one, one.pending) for one in running.values()]
        for event in run_batch(decoder, cache, work):
            if event.error is not None:
                raise event.error
            if event.finish_reason is not None:
                cache.close(event.request_id)
                del running[event.request_id]
        yield None
    yield [tuple(everyone[request.id].token_ids[len(request.prompt_ids) :]) for request in requests]
