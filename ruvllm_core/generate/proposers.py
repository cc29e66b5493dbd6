"""What drafts tokens for speculative decoding: the text itself, or a smaller model."""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from dataclasses import replace

import numpy as np

from ruvllm_core.decode.contiguous import ContiguousCache
from ruvllm_core.generate.request import Request
from ruvllm_core.generate.sampler import Sampler
from ruvllm_core.generate.sequence import Sequence, advance
from ruvllm_core.model.loader import ModelFile
from ruvllm_core.protocols import CacheContext, Decoder, Draft, FloatArray, KVCachePolicy
from ruvllm_core.settings import CacheConfig, Settings

_RUN = 3  # tokens that must be found again


class NGramProposer:
    """Goes on as the text itself did after the last tokens (prompt look-up decoding).

    A draft is as long as the match before it: whoever is copying for long goes on copying for long.
    """

    def __init__(self) -> None:
        self._texts: dict[str, tuple[int, dict[tuple[int, ...], int]]] = {}

    def propose(self, request: Request, token_ids: SequenceOf[int], k: int, hidden: FloatArray) -> Draft:
        seen, ends = self._texts.get(request.id, (_RUN, {}))
        length = len(token_ids)
        for end in range(seen, length):  # not the run at the very end, which would find itself
            ends[tuple(token_ids[end - _RUN : end])] = end
        self._texts[request.id] = length, ends
        if (start := ends.get(tuple(token_ids[-_RUN:]))) is None:
            return Draft(())
        match = _RUN
        while match < min(k, start) and token_ids[start - match - 1] == token_ids[-match - 1]:
            match += 1
        return Draft([token_ids[start + i % (length - start)] for i in range(min(k, match))])

    def forget(self, request_id: str) -> None:
        self._texts.pop(request_id, None)

    def close(self) -> None:
        self._texts.clear()


class DraftModel:
    """Goes on as a smaller model would, drawing with the request's own parameters, but for penalties by occurrence.

    Args:
        model: the smaller one.
        decoder: computes it.
        settings: how to; `cache.precision` and `prefill_chunk` count here too.
        vocab_size: V of the model that drafts are for; the two may differ in what pads them.
    """

    def __init__(self, model: ModelFile, decoder: Decoder, settings: Settings, vocab_size: int) -> None:
        self._model, self._decoder, self._settings, self._vocab_size = model, decoder, settings, vocab_size
        self._running: dict[str, tuple[Sequence, KVCachePolicy]] = {}
        # Not of the requests' seeds: what is drafted must not depend on the numbers that it is judged by.
        self._random = np.random.default_rng()

    def propose(self, request: Request, token_ids: SequenceOf[int], k: int, hidden: FloatArray) -> Draft:
        if len(token_ids) + k > self._decoder.spec.max_context:
            return Draft(())
        sequence, cache = self._resume(request, token_ids)
        sampler = Sampler(request.params, token_ids, self._vocab_size)
        rows: list[FloatArray] = []
        for _ in range(k):
            while count := min(self._settings.prefill_chunk, sequence.pending):
                cache.extend(request.id, count)
                hidden, _ = advance(self._decoder, cache, [(sequence, count)])
            logits = np.full(self._vocab_size, -np.inf, dtype=np.float32)
            known = self._decoder.logits(hidden)[0, : self._vocab_size]
            logits[: len(known)] = known
            adjusted = sampler.adjust(logits)
            if request.params.repeatable:
                token = int(np.argmax(adjusted))
            else:
                drawn_from = sampler.distribution(adjusted)
                token = drawn_from.draw(self._random.random())
                rows.append(np.zeros(self._vocab_size, dtype=np.float32))
                rows[-1][drawn_from.ids] = drawn_from.probabilities
            sequence.token_ids.append(token)
        return Draft(sequence.token_ids[len(token_ids) :], np.stack(rows) if rows else None)

    def forget(self, request_id: str) -> None:
        self._running.pop(request_id, None)

    def close(self) -> None:
        self._running.clear()
        self._decoder.close()
        self._model.close()

    def _resume(self, request: Request, token_ids: SequenceOf[int]) -> tuple[Sequence, KVCachePolicy]:
        """The request in this model, up to its last token; what was computed of drafts that were right stays."""
        if request.id not in self._running:
            spec = self._decoder.spec
            own = replace(request, adapter=None, capacity=min(request.capacity, spec.max_context))
            config = CacheConfig(precision=self._settings.cache.precision)
            cache = ContiguousCache(CacheContext(spec, self._decoder, config, own.capacity, 1))
            self._running[request.id] = Sequence(own, cache, spec), cache
        sequence, kept_by = self._running[request.id]
        kept = min(sequence.computed, len(token_ids) - 1)
        while sequence.token_ids[:kept] != token_ids[:kept]:
            kept -= 1
        kept_by.truncate(request.id, kept)
        sequence.token_ids, sequence.computed = list(token_ids), kept
        return sequence, kept_by
