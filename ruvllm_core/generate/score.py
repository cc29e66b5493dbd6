"""How likely a model finds a text it is given."""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf

import numpy as np

from ruvllm_core.generate.request import GenerateParams, Request
from ruvllm_core.generate.sampler import log_softmax
from ruvllm_core.generate.sequence import Sequence, advance
from ruvllm_core.protocols import Decoder, FloatArray, KVCachePolicy

_ROWS = 64


def token_logprobs(decoder: Decoder, cache: KVCachePolicy, token_ids: SequenceOf[int], chunk: int) -> FloatArray:
    """Natural log-probability of each of ``token_ids[1:]`` given those before it, float32 ``[n - 1]``.

    Runs one sequence through `cache`, an empty one, `chunk` tokens at a time. Raises `CacheFull` if it does not fit.
    """
    # The last token is only predicted; nothing follows from it.
    request = Request("score", tuple(token_ids[:-1]), GenerateParams(), frozenset(), capacity=len(token_ids) - 1)
    sequence = Sequence(request, cache, decoder.spec)
    found: list[float] = []
    try:
        while count := min(chunk, sequence.pending):
            cache.extend(request.id, count)
            hidden, _ = advance(decoder, cache, [(sequence, count)], every=True)
            for row in range(0, count, _ROWS):
                logprobs = log_softmax(decoder.logits(hidden[row : row + _ROWS]))
                targets = token_ids[len(found) + 1 : len(found) + 1 + len(logprobs)]
                found += logprobs[np.arange(len(logprobs)), targets].tolist()
    finally:
        cache.close(request.id)
    return np.array(found, dtype=np.float32)
