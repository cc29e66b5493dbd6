"""How likely a model finds a text it is given."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ruvllm_core.decode.batch import Batch
from ruvllm_core.model.spec import ModelSpec
from ruvllm_core.protocols import Decoder, FloatArray, KVCachePolicy

_ROWS = 64


def token_logprobs(
    spec: ModelSpec, decoder: Decoder, cache: KVCachePolicy, token_ids: Sequence[int], chunk: int
) -> FloatArray:
    """Natural log-probability of each of ``token_ids[1:]`` given those before it, float32 ``[n - 1]``.

    Runs one sequence through `cache`, `chunk` tokens at a time. Raises `CacheFull` if it does not fit.
    """
    ids = np.asarray(token_ids, dtype=np.int64)
    found = np.empty(len(ids) - 1, dtype=np.float32)
    name, last = "score", len(ids) - 1
    # The last token is only predicted; nothing follows from it.
    cache.open(name, token_ids, last)
    try:
        for start in range(0, last, chunk):
            stop = min(start + chunk, last)
            cache.extend(name, stop - start)
            batch = Batch(
                tokens=ids[start:stop],
                positions=np.arange(start, stop, dtype=np.int64),
                cu_q=np.array([0, stop - start], dtype=np.int32),
                rows=np.arange(stop - start, dtype=np.int64),
                kv=cache.view([name]),
                rope_variants=np.array([spec.rope_variant(last)], dtype=np.uint8),
            )
            hidden = decoder.forward(batch)
            cache.commit(name)
            for row in range(0, stop - start, _ROWS):
                logits = decoder.logits(hidden[row : row + _ROWS]).astype(np.float64)
                targets = ids[start + row + 1 : start + row + 1 + len(logits)]
                top = logits.max(-1, keepdims=True)
                chosen = logits[np.arange(len(logits)), targets]
                found[start + row : start + row + len(logits)] = (
                    chosen - top[:, 0] - np.log(np.exp(logits - top).sum(-1))
                )
    finally:
        cache.close(name)
    return found
